// SPDX-License-Identifier: Apache-2.0

package wire

import "net"

// RemoteAddrForTest tells the lanes of a connection apart by their TCP ports.
func (l *Lane) RemoteAddrForTest() net.Addr { return l.raw.RemoteAddr() }
