// SPDX-License-Identifier: Apache-2.0

package multifd_test

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
)

// mainConnection reads the main connection of a pre-copy migration without return
// path, no byte further than it must. It is small because it believes the source.
type mainConnection struct {
	r        *bufio.Reader
	sync     func() error                      // at each synchronisation point
	zero     func(block string, offset uint64) // a page of zeros
	flushing bool                              // MULTIFD_FLUSH marks the points, not EOS
	syncs    int
	err      error
}

func (m *mainConnection) bytes(n int) []byte {
	b := make([]byte, n)
	if m.err == nil {
		_, m.err = io.ReadFull(m.r, b)
	}
	return b
}

func (m *mainConnection) u8() int     { return int(m.bytes(1)[0]) }
func (m *mainConnection) u32() uint32 { return binary.BigEndian.Uint32(m.bytes(4)) }
func (m *mainConnection) u64() uint64 { return binary.BigEndian.Uint64(m.bytes(8)) }

func (m *mainConnection) fail(format string, args ...any) {
	if m.err == nil {
		m.err = fmt.Errorf(format, args...)
	}
}

// run reads to the end of the RAM section and discards the device state.
func (m *mainConnection) run() error {
	if magic, version := m.u32(), m.u32(); magic != 0x5145564d || version != 3 {
		m.fail("magic %#x version %d", magic, version)
	}
	if kind := m.u8(); kind != 7 {
		m.fail("no configuration but %#x", kind)
	}
	m.bytes(int(m.u32()))
	for ended := false; !ended && m.err == nil; {
		kind := m.u8()
		if kind == 8 { // a command: SWITCHOVER_START
			m.bytes(2)
			length := binary.BigEndian.Uint16(m.bytes(2))
			m.bytes(int(length))
			continue
		}
		m.bytes(4)
		switch kind {
		case 1:
			m.bytes(m.u8() + 8)
			m.table()
			m.records(true)
		case 2, 3:
			m.records(false)
			ended = kind == 3
		default:
			m.fail("item %#x", kind)
		}
		if foot := m.u8(); foot != 0x7e {
			m.fail("no footer but %#x", foot)
		}
		m.bytes(4)
	}
	if m.err == nil {
		_, m.err = io.Copy(io.Discard, m.r)
	}
	return m.err
}

func (m *mainConnection) table() {
	total := m.u64() &^ 0xfff
	for got := uint64(0); got < total && m.err == nil; {
		m.bytes(m.u8())
		got += m.u64()
	}
}

func (m *mainConnection) records(start bool) {
	var block string
	for m.err == nil {
		header := m.u64()
		if header&0xfff&^0x20 == 2 { // zero page, perhaps of the same block
			if header&0x20 == 0 {
				block = string(m.bytes(m.u8()))
			}
			m.bytes(1)
			if m.err == nil {
				m.zero(block, header&^0xfff)
			}
			continue
		}
		switch header {
		case 0x200:
			m.flushing = m.flushing || start
			m.point()
		case 0x10:
			if !m.flushing {
				m.point()
			}
			return
		default:
			m.fail("record %#x", header)
		}
	}
}

func (m *mainConnection) point() {
	m.syncs++
	if m.err == nil {
		m.err = m.sync()
	}
}
