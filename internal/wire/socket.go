// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// notSentBulk and notSentSmall bound what waits unsent in a socket, in bytes. More
	// would only add to the delay that the sender's window measures. On bulk lanes
	// it also is faster than the kernel's default of no bound: what is sent is still
	// in the processor's cache.
	notSentBulk  = 128 << 10
	notSentSmall = 64 << 10
	// interactive is the kernel's TC_PRIO_INTERACTIVE (linux/pkt_sched.h): the
	// node's own queue lets these packets pass bulk.
	interactive = 6
)

// tune sets the options of a lane's TCP connection. Go has set TCP_NODELAY. What is no
// socket, as in tests, is left alone.
func tune(raw net.Conn, kind LaneKind) error {
	s, ok := raw.(syscall.Conn)
	if !ok {
		return nil
	}
	control, err := s.SyscallConn()
	if err != nil {
		return fmt.Errorf("setting options of the %v lane: %w", kind, err)
	}
	var failed error
	err = control.Control(func(fd uintptr) {
		notSent := notSentBulk
		if kind != LaneBulk {
			notSent = notSentSmall
			failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PRIORITY, interactive)
		}
		if failed == nil {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, notSent)
		}
	})
	if err == nil {
		err = failed
	}
	if err != nil {
		return fmt.Errorf("setting options of the %v lane: %w", kind, err)
	}
	return nil
}
