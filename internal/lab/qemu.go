// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"scattergather.io/scattergather/internal/lab/guest"
	"scattergather.io/scattergather/internal/qemu/qmp"
)

// QEMUConfig says what a QEMU is started with. Source and destination of a
// migration differ in Name, Node and Incoming only.
type QEMUConfig struct {
	Name      string // unique in the run
	Assets    *Assets
	Machine   string // machine type; empty means "q35"
	MemoryMiB int
	Guest     guest.Config
	Incoming  bool     // wait for a migration instead of booting
	Extra     []string // further arguments
}

// QEMU is a stock QEMU on a node.
type QEMU struct {
	*Process
	QMP *qmp.Client

	// Telemetry is the unix socket of the guest's second serial port, for
	// Guest.Attach.
	Telemetry string

	socket  string
	console string
}

// arguments is the command line. Both ends of a migration must agree on all of
// it but the sockets.
func (c QEMUConfig) arguments(q *QEMU) []string {
	machine, cpu := c.Machine, "qemu64"
	if machine == "" {
		machine = "q35"
	}
	if c.Assets.Accelerator == "kvm" {
		cpu = "host"
	}
	args := []string{
		"-name", c.Name, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", machine, "-accel", c.Assets.Accelerator, "-cpu", cpu,
		"-smp", strconv.Itoa(max(1, c.Guest.CPUs)), "-m", strconv.Itoa(c.MemoryMiB),
		"-kernel", c.Assets.Kernel, "-initrd", c.Assets.Initramfs, "-append", KernelCommandLine(c.Guest),
		"-qmp", "unix:" + q.socket + ",server=on,wait=off",
		"-serial", "file:" + q.console,
		"-chardev", "socket,id=telemetry,path=" + q.Telemetry + ",server=on,wait=off", "-serial", "chardev:telemetry",
	}
	if c.Incoming {
		args = append(args, "-incoming", "defer")
	}
	return append(args, c.Extra...)
}

// StartQEMU starts a QEMU on a node and connects to its monitor.
func StartQEMU(ctx context.Context, node *Node, c QEMUConfig) (*QEMU, error) {
	base := filepath.Join(node.run.Path, c.Name)
	q := &QEMU{Telemetry: base + ".telemetry", socket: base + ".qmp", console: base + ".console"}
	var err error
	if q.Process, err = node.Start(c.Name, exec.Command(c.Assets.QEMU, c.arguments(q)...)); err != nil {
		return nil, err
	}
	err = q.waitFor(ctx, "its monitor", func() bool {
		q.QMP, err = qmp.Dial(ctx, q.socket)
		return err == nil
	})
	if err != nil {
		q.Kill()
		return nil, fmt.Errorf("starting QEMU: %w", err)
	}
	return q, nil
}

// Console is what the guest's kernel said so far; a panic ends there.
func (q *QEMU) Console() string {
	text, err := os.ReadFile(q.console)
	if err != nil {
		return ""
	}
	return string(text[max(0, len(text)-4096):])
}

// Close ends QEMU and the connection to its monitor.
func (q *QEMU) Close() {
	if q.QMP != nil {
		_ = q.QMP.Close()
	}
	q.Kill()
}
