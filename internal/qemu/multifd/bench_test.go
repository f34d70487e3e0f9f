// SPDX-License-Identifier: Apache-2.0

package multifd

import (
	"net"
	"path/filepath"
	"testing"
)

// BenchmarkReceiver reads full packets from a unix socket, as from a QEMU.
func BenchmarkReceiver(b *testing.B) {
	l, err := net.Listen("unix", filepath.Join(b.TempDir(), "s"))
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	go func() {
		conn, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			return
		}
		conn.Write(hello(0))
		for packet := fullPacket(); err == nil; {
			_, err = conn.Write(packet)
		}
	}()
	conn, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	rx := NewReceiver(conn, Options{})
	if _, err := rx.Hello(); err != nil {
		b.Fatal(err)
	}
	var p Packet
	b.SetBytes(100 * PageSize)
	b.ReportAllocs()
	for b.Loop() {
		if err := rx.Next(&p); err != nil {
			b.Fatal(err)
		}
		for range p.Normal {
			if _, err := rx.Page(); err != nil {
				b.Fatal(err)
			}
		}
	}
}
