// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

var (
	listenCommand = []byte{itemCommand, 0, byte(CommandPostcopyListen), 0, 0}
	runCommand    = []byte{itemCommand, 0, byte(CommandPostcopyRun), 0, 0}
	pingPrefix    = []byte{itemCommand, 0, byte(CommandPing), 0, 4}
)

const pingBytes = 9

// WrapTail turns the device state of a migration that ended in pre-copy into
// the package of one that ends in post-copy: LISTEN, the tail, PING, RUN. The
// destination answers the PING when it has loaded the device state.
func WrapTail(tail []byte, ping uint32) []byte {
	p := make([]byte, 0, len(listenCommand)+len(tail)+pingBytes+len(runCommand))
	p = append(p, listenCommand...)
	p = append(p, tail...)
	p = AppendPing(p, ping)
	return append(p, runCommand...)
}

// PackagePings returns the values of the PINGs at the end of a package, in the
// order of the stream. The source may wait for the PONG of any of them. A
// package that does not begin with LISTEN and end with RUN is an error. The
// sections inside have no lengths, so the walk goes backwards; a section ends
// with its footer, which cannot be taken for a PING.
func PackagePings(pkg []byte) ([]uint32, error) {
	if !bytes.HasPrefix(pkg, listenCommand) {
		return nil, errors.New("device-state package does not begin with POSTCOPY_LISTEN")
	}
	rest := pkg[len(listenCommand):]
	if !bytes.HasSuffix(rest, runCommand) {
		return nil, errors.New("device-state package does not end with POSTCOPY_RUN")
	}
	rest = rest[:len(rest)-len(runCommand)]
	var pings []uint32
	for len(rest) >= pingBytes && bytes.HasPrefix(rest[len(rest)-pingBytes:], pingPrefix) {
		if len(pings) == maxPackagePings {
			return nil, fmt.Errorf("device-state package ends with more than %d PINGs", maxPackagePings)
		}
		pings = append(pings, binary.BigEndian.Uint32(rest[len(rest)-4:]))
		rest = rest[:len(rest)-pingBytes]
	}
	for i, j := 0, len(pings)-1; i < j; i, j = i+1, j-1 {
		pings[i], pings[j] = pings[j], pings[i]
	}
	return pings, nil
}
