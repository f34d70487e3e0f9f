// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

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
	Memory    Memory // what holds the guest's memory
	Guest     guest.Config
	Incoming  bool     // wait for a migration instead of booting
	Extra     []string // further arguments
}

// Memory is what holds a guest's memory. The two ends of a migration may differ in it
// but not in the size of the pages, on which QEMU insists for post-copy.
type Memory string

// The kinds of memory.
const (
	MemoryPrivate Memory = ""        // anonymous, what "-m" alone gives
	MemoryShared  Memory = "memfd"   // shared, what vhost-user devices and virtiofs need
	MemoryHuge    Memory = "hugetlb" // pages of 2 MiB, of which the machine must have enough free
)

// arguments puts the guest's memory where it belongs. The block of memory is
// called "pc.ram" in the migration stream whatever holds it.
func (m Memory) arguments(machine string, mib int) []string {
	args := []string{"-m", strconv.Itoa(mib), "-machine", machine}
	if m == MemoryPrivate {
		return args
	}
	args[3] += ",memory-backend=pc.ram"
	object := fmt.Sprintf("memory-backend-memfd,id=pc.ram,size=%dM", mib)
	if m == MemoryHuge {
		return append(args, "-object", object+",share=off,hugetlb=on,hugetlbsize=2M")
	}
	return append(args, "-object", object+",share=on")
}

// freeHugePages is where the kernel counts the free pages of 2 MiB.
const freeHugePages = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"

// available says whether this machine has the memory. QEMU itself would start
// without huge pages and die of SIGBUS on the first touch of a missing one.
func (m Memory) available(mib int) error {
	switch m {
	case MemoryPrivate, MemoryShared:
		return nil
	case MemoryHuge:
	default:
		return fmt.Errorf("memory %q: want %q, %q or %q", m, MemoryPrivate, MemoryShared, MemoryHuge)
	}
	text, err := os.ReadFile(freeHugePages)
	if err != nil {
		return fmt.Errorf("this kernel has no pages of 2 MiB: %w", err)
	}
	free, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return fmt.Errorf("reading %s: %w", freeHugePages, err)
	}
	if free*2 < mib {
		return fmt.Errorf("%d MiB of huge pages are free, the guest needs %d: raise the sysctl vm.nr_hugepages", free*2, mib)
	}
	return nil
}

// QEMU is a stock QEMU on a node.
type QEMU struct {
	*Process
	QMP *qmp.Client

	// Monitor is the unix socket of a second QEMU monitor, for an agent: one
	// monitor serves one client at a time, and the first is the lab's.
	Monitor string

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
		"-accel", c.Assets.Accelerator, "-cpu", cpu, "-smp", strconv.Itoa(max(1, c.Guest.CPUs)),
		"-kernel", c.Assets.Kernel, "-initrd", c.Assets.Initramfs, "-append", KernelCommandLine(c.Guest),
		"-qmp", "unix:" + q.socket + ",server=on,wait=off",
		"-qmp", "unix:" + q.Monitor + ",server=on,wait=off",
		"-serial", "file:" + q.console,
		"-chardev", "socket,id=telemetry,path=" + q.Telemetry + ",server=on,wait=off", "-serial", "chardev:telemetry",
	}
	if c.Incoming {
		args = append(args, "-incoming", "defer")
	}
	args = append(args, c.Memory.arguments(machine, c.MemoryMiB)...)
	return append(args, c.Extra...)
}

// StartQEMU starts a QEMU on a node and connects to its monitor.
func StartQEMU(ctx context.Context, node *Node, c QEMUConfig) (*QEMU, error) {
	if err := c.Memory.available(c.MemoryMiB); err != nil {
		return nil, fmt.Errorf("starting %s: %w", c.Name, err)
	}
	base := filepath.Join(node.run.Path, c.Name)
	q := &QEMU{Telemetry: base + ".telemetry", Monitor: base + ".monitor", socket: base + ".qmp", console: base + ".console"}
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
