// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"
)

// preamble is what a dialler sends first on a lane that is not control, in the clear. A
// control lane begins with a TLS record, whose first byte is 0x16.
type preamble struct {
	kind   LaneKind
	number uint8
	group  [16]byte
}

const (
	preambleMagic = 0x53474c4e // "SGLN"
	preambleSize  = 4 + 1 + 1 + 2 + 16

	tlsHandshake  = 0x16
	laneFirstByte = preambleMagic >> 24
)

func (p *preamble) encode() []byte {
	dst := binary.BigEndian.AppendUint32(nil, preambleMagic)
	dst = append(dst, byte(p.kind), p.number, 0, 0)
	return append(dst, p.group[:]...)
}

func parsePreamble(b []byte) (preamble, error) {
	d := decoder{message: "lane preamble", rest: b}
	if m := d.u32("magic"); d.err == nil && m != preambleMagic {
		d.fail("magic", "%#x, want %#x", m, preambleMagic)
	}
	p := preamble{kind: LaneKind(d.u8("kind")), number: d.u8("number")}
	d.zero("padding")
	d.zero("padding")
	p.group = d.array("group")
	switch {
	case d.err != nil:
	case p.kind != LaneUrgent && p.kind != LaneBulk:
		d.fail("kind", "%d is neither urgent nor bulk", p.kind)
	case p.kind == LaneUrgent && p.number != 0:
		d.fail("number", "urgent lane %d", p.number)
	case p.number >= MaxLanes:
		d.fail("number", "bulk lane %d, at most %d lanes allowed", p.number, MaxLanes)
	}
	return p, d.end()
}

// secure gives a lane its ciphers, from the TLS session of the control lane.
func (l *Lane) secure(s *tls.ConnectionState, dialler bool) error {
	ours, err := laneKey(s, l.kind, l.number, dialler)
	if err != nil {
		return err
	}
	theirs, err := laneKey(s, l.kind, l.number, !dialler)
	if err != nil {
		return err
	}
	l.sealer = newFrameCipher(ours, l.conn.role.coverage())
	l.opener = newFrameCipher(theirs, l.conn.role.coverage())
	return nil
}

// sendOpening sends the first frame of one side on a protected lane, empty, which proves
// that it holds the key of that direction. front is sent before it.
func (l *Lane) sendOpening(t Type, front []byte) error {
	frame := make([]byte, headerSize, headerSize+tagSize)
	h := header{typ: t, length: tagSize}
	h.put(frame)
	_, err := l.raw.Write(append(front, l.sealer.seal(frame, headerSize)...))
	return err
}

func (l *Lane) receiveOpening(t Type) error {
	var frame [headerSize + tagSize]byte
	if _, err := io.ReadFull(l.in, frame[:]); err != nil {
		return fmt.Errorf("waiting for %v: %w", t, err)
	}
	if h := parseHeader(frame[:]); h != (header{typ: t, length: tagSize}) {
		return fmt.Errorf("%w: %v where %v is wanted", ErrProtocol, h.typ, t)
	}
	_, err := l.opener.open(frame[:], headerSize)
	return err
}

// maxOpening bounds the body of Hello, Welcome and the Error in Welcome's place, with
// room for what later versions add to Hello.
const maxOpening = 2 << 10

// sendPlain sends a frame on a control lane that is being opened.
func sendPlain(w io.Writer, t Type, body []byte) error {
	frame := make([]byte, headerSize, headerSize+len(body))
	h := header{typ: t, length: uint32(len(body))}
	h.put(frame)
	_, err := w.Write(append(frame, body...))
	return err
}

// receivePlain reads a frame on a control lane that is being opened.
func receivePlain(r io.Reader) (Type, []byte, error) {
	var head [headerSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	h := parseHeader(head[:])
	if h.length > maxOpening {
		return 0, nil, fmt.Errorf("%w: first frame (%v) of %d bytes, at most %d allowed", ErrProtocol, h.typ, h.length, maxOpening)
	}
	body := make([]byte, h.length)
	if _, err := io.ReadFull(r, body); err != nil {
		return 0, nil, fmt.Errorf("first frame (%v): %w", h.typ, err)
	}
	return h.typ, body, nil
}

// laneReader is how much of a lane is read ahead. Larger reads go past it.
const laneReader = 4096

// peeked is a connection of which something was read ahead.
type peeked struct {
	net.Conn
	in *bufio.Reader
}

func (p *peeked) Read(b []byte) (int, error) { return p.in.Read(b) }

// millis is a peer's idle time.
func millis(ms uint32) time.Duration { return time.Duration(ms) * time.Millisecond }
