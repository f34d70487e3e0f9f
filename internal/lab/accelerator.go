// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"scattergather.io/scattergather/internal/lab/guest"
)

// kvmPatience is how long a guest may take to boot under KVM. It is there in
// one or two seconds where it boots at all.
const kvmPatience = 8 * time.Second

// chooseAccelerator tries whether our guest boots under KVM: some machines have
// a /dev/kvm that runs no ordinary Linux guest. The answer is kept in the
// cache for this kernel, QEMU and guest kernel.
func (a *Assets) chooseAccelerator(ctx context.Context, cache string) (string, error) {
	if unix.Access("/dev/kvm", unix.R_OK|unix.W_OK) != nil {
		return "tcg", nil //nolint:nilerr // without access to it there is no KVM
	}
	var host unix.Utsname
	if err := unix.Uname(&host); err != nil {
		return "", err
	}
	info, err := os.Stat(a.Kernel)
	if err != nil {
		return "", err
	}
	key := strings.Join([]string{unix.ByteSliceToString(host.Release[:]), a.Version, info.ModTime().UTC().Format(time.RFC3339)}, " ")
	path := filepath.Join(cache, "accelerator")
	if known, err := os.ReadFile(path); err == nil {
		if answer, found := strings.CutPrefix(string(known), key+" "); found {
			return strings.TrimSpace(answer), nil
		}
	}
	answer := "tcg"
	if a.bootsUnderKVM(ctx) {
		answer = "kvm"
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	return answer, writeAtomically(path, []byte(key+" "+answer+"\n"))
}

// bootsUnderKVM boots a small guest and waits for its first word.
func (a *Assets) bootsUnderKVM(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, kvmPatience)
	defer cancel()
	config := guest.Config{FillMiB: 1, WorkingSet: 1, Mix: guest.DefaultMix, CPUs: 1}
	cmd := exec.CommandContext(ctx, a.QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "128",
		"-kernel", a.Kernel, "-initrd", a.Initramfs, "-append", KernelCommandLine(config),
		"-serial", "null", "-serial", "stdio")
	out, err := cmd.StdoutPipe()
	if err != nil || cmd.Start() != nil {
		return false
	}
	defer func() { _ = cmd.Wait() }()
	defer cancel()
	var decoder guest.Decoder
	heard := false
	for buf := make([]byte, 4096); !heard; {
		n, err := out.Read(buf)
		decoder.Feed(buf[:n], func(t guest.Type, _ []byte) { heard = heard || t == guest.TypeFilled })
		if err == io.EOF || err != nil {
			break
		}
	}
	return heard
}

// KernelCommandLine is what the guest's kernel is booted with. The console says
// little, a panic ends QEMU, and the clock is the one that costs no exit.
func KernelCommandLine(c guest.Config) string {
	return "console=ttyS0 quiet panic=-1 tsc=reliable mitigations=off init_on_alloc=0 " + c.CommandLine()
}
