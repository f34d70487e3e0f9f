// SPDX-License-Identifier: Apache-2.0

package multifd_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/qemu/qmp"
)

const (
	guestBytes   = 48 << 20
	dirtyFrom    = 1 << 20 // the guest writes to each page from here
	dirtyTo      = 9 << 20 // to here, for ever
	patternFrom  = 16 << 20
	patternBytes = 24 << 20
)

// firmware is a guest of its own: 94 bytes instead of a BIOS that enter protected
// mode and add one to the first word of each page of the dirty range, for ever.
func firmware() []byte {
	code := []byte{
		0xfa,                                     // cli
		0x2e, 0x66, 0x0f, 0x01, 0x16, 0x50, 0x00, // lgdtl %cs:0x50
		0x0f, 0x20, 0xc0, // mov %cr0,%eax
		0x0c, 0x01, // or $1,%al
		0x0f, 0x22, 0xc0, // mov %eax,%cr0
		0x66, 0xea, 0x18, 0x00, 0x0f, 0x00, 0x08, 0x00, // ljmpl $8,$0xf0018
		0xb8, 0x10, 0x00, 0x00, 0x00, // mov $16,%eax
		0x8e, 0xd8, // mov %eax,%ds
		0xbf, 0x00, 0x00, 0x10, 0x00, // outer: mov $0x100000,%edi
		0xff, 0x07, // inner: incl (%edi)
		0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add $0x1000,%edi
		0x81, 0xff, 0x00, 0x00, 0x90, 0x00, // cmp $0x900000,%edi
		0x72, 0xf0, // jb inner
		0xeb, 0xe9, // jmp outer
		0x66, 0x90,
		0, 0, 0, 0, 0, 0, 0, 0, // 0x38: descriptors: none, code, data
		0xff, 0xff, 0, 0, 0, 0x9a, 0xcf, 0,
		0xff, 0xff, 0, 0, 0, 0x92, 0xcf, 0,
		0x17, 0x00, 0x38, 0x00, 0x0f, 0x00, // 0x50: their table
	}
	rom := make([]byte, 64<<10)
	copy(rom, code)
	copy(rom[0xfff0:], []byte{0xea, 0x00, 0x00, 0x00, 0xf0}) // reset: ljmp $0xf000,$0
	return rom
}

// startGuest runs a QEMU with the guest above and a pattern in memory which the
// guest leaves alone.
func startGuest(t *testing.T, machine string) *qmp.Client {
	t.Helper()
	program, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Fatalf("%v: install it with: hack/setup.sh, or apt-get install qemu-system-x86", err)
	}
	dir := t.TempDir()
	write := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	pattern := make([]byte, patternBytes)
	rand.NewChaCha8([32]byte{1}).Read(pattern)
	socket := filepath.Join(dir, "qmp")
	cmd := exec.Command(program, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg",
		"-machine", machine, "-m", strconv.Itoa(guestBytes>>20), "-bios", write("firmware", firmware()),
		"-device", "loader,file="+write("pattern", pattern)+",force-raw=on,addr="+strconv.Itoa(patternFrom),
		"-qmp", "unix:"+socket+",server=on,wait=off")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("qemu said: %s", stderr.String())
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		c, err := qmp.Dial(ctx, socket)
		if err == nil {
			t.Cleanup(func() { c.Close() })
			return c
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
