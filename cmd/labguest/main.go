// SPDX-License-Identifier: Apache-2.0

// Labguest is the lab's guest: a static program that runs as init of an
// initramfs and owns the whole virtual machine. It fills memory with a pattern,
// dirties a working set, serves small requests and verifies every page without
// end; what it sees it tells the host on its second serial port, in the frames
// of internal/lab/guest. A page that was wrong once is counted for ever.
//
// It allocates nothing while it works and never collects garbage, so that what
// the host sees stall is the guest's memory and not its runtime.
package main

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"

	"scattergather.io/scattergather/internal/lab/guest"
)

// telemetryPort is the guest's second serial port; the first is the console.
const telemetryPort = "/dev/ttyS1"

func main() {
	debug.SetGCPercent(-1)
	l, err := setUp()
	if err != nil {
		fmt.Fprintln(os.Stderr, "labguest:", err)
		// Init must not return: the kernel would panic and hide the message.
		_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
		select {}
	}
	l.start()
}

func setUp() (*loop, error) {
	if err := mountFileSystems(); err != nil {
		return nil, err
	}
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	config, err := guest.ParseCommandLine(string(line))
	if err != nil {
		return nil, err
	}
	runtime.GOMAXPROCS(config.CPUs)
	port, err := openPort(telemetryPort)
	if err != nil {
		return nil, err
	}
	mem, err := newMemory(config)
	if err != nil {
		return nil, err
	}
	return &loop{config: config, mem: mem, port: port}, nil
}

func mountFileSystems() error {
	for _, m := range []struct{ kind, dir string }{{"devtmpfs", "/dev"}, {"proc", "/proc"}} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mounting %s on %s: %w", m.kind, m.dir, err)
		}
	}
	return nil
}

// port is a serial port in raw mode. Its calls bypass the scheduler, because a
// blocked read would hand the only CPU to another thread.
type port int

func openPort(path string) (port, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("opening %s: %w", path, err)
	}
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return -1, fmt.Errorf("%s is no serial port: %w", path, err)
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 0, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, t); err != nil {
		return -1, fmt.Errorf("setting %s to raw: %w", path, err)
	}
	return port(fd), nil
}

// write gives up the rest of a frame when the line is full: the decoder on the
// host finds the next one.
func (p port) write(b []byte) {
	_, _, _ = syscall.RawSyscall(syscall.SYS_WRITE, uintptr(p), address(b), uintptr(len(b)))
}

// read returns what has arrived, without waiting.
func (p port) read(b []byte) int {
	n, _, errno := syscall.RawSyscall(syscall.SYS_READ, uintptr(p), address(b), uintptr(len(b)))
	if errno != 0 {
		return 0
	}
	return int(n)
}
