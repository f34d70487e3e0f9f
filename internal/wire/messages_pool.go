// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"encoding/binary"
	"fmt"
	"math"
	"time"
)

// Reserve is the source's first message to an intermediary. Sent again, with the same
// reader, it changes the number of bytes.
type Reserve struct {
	// Bytes of sealed pages that the source would like to store.
	Bytes uint64
	// Reader is the only node that may read the pages: the destination's.
	Reader Identity
	// Grace is how long the intermediary keeps the pages while neither source nor
	// destination is connected: whole seconds, 0 to 2^32-1.
	Grace time.Duration
}

// Type returns TypeReserve.
func (*Reserve) Type() Type { return TypeReserve }

// Append appends the body to dst.
func (m *Reserve) Append(dst []byte) ([]byte, error) {
	seconds := m.Grace / time.Second
	if seconds < 0 || seconds > math.MaxUint32 {
		return nil, fmt.Errorf("Reserve: grace of %v, 0 to 2^32-1 seconds allowed", m.Grace)
	}
	if err := m.Reader.check(); err != nil {
		return nil, fmt.Errorf("Reserve: reader: %w", err)
	}
	dst = binary.BigEndian.AppendUint64(dst, m.Bytes)
	dst = binary.BigEndian.AppendUint32(dst, uint32(seconds))
	return appendText(dst, "Reserve", "reader", string(m.Reader), MaxIdentity)
}

// ParseReserve reads the body of a Reserve frame.
func ParseReserve(body []byte) (Reserve, error) {
	d := decoder{message: "Reserve", rest: body}
	m := Reserve{Bytes: d.u64("bytes"), Grace: time.Duration(d.u32("grace")) * time.Second}
	m.Reader = d.identity("reader")
	return m, d.end()
}

// Reserved answers Reserve.
type Reserved struct {
	Session Session
	// Bytes granted, at most what was asked for. An intermediary that has nothing
	// to grant answers with an Error of CodeFull instead.
	Bytes uint64
}

// Type returns TypeReserved.
func (*Reserved) Type() Type { return TypeReserved }

// Append appends the body to dst.
func (m *Reserved) Append(dst []byte) ([]byte, error) {
	return binary.BigEndian.AppendUint64(append(dst, m.Session[:]...), m.Bytes), nil
}

// ParseReserved reads the body of a Reserved frame.
func ParseReserved(body []byte) (Reserved, error) {
	d := decoder{message: "Reserved", rest: body}
	m := Reserved{Session: d.array("session"), Bytes: d.u64("bytes")}
	return m, d.end()
}

// Attach is the destination's first message to an intermediary.
type Attach struct{ Session Session }

// Type returns TypeAttach.
func (*Attach) Type() Type { return TypeAttach }

// Append appends the body to dst.
func (m *Attach) Append(dst []byte) ([]byte, error) { return append(dst, m.Session[:]...), nil }

// ParseAttach reads the body of an Attach frame.
func ParseAttach(body []byte) (Attach, error) {
	d := decoder{message: "Attach", rest: body}
	m := Attach{Session: d.array("session")}
	return m, d.end()
}

// Attached answers Attach.
type Attached struct {
	// Pages and Bytes that the session holds now.
	Pages, Bytes uint64
}

// Type returns TypeAttached.
func (*Attached) Type() Type { return TypeAttached }

// Append appends the body to dst.
func (m *Attached) Append(dst []byte) ([]byte, error) {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(dst, m.Pages), m.Bytes), nil
}

// ParseAttached reads the body of an Attached frame.
func ParseAttached(body []byte) (Attached, error) {
	d := decoder{message: "Attached", rest: body}
	m := Attached{Pages: d.u64("pages"), Bytes: d.u64("bytes")}
	return m, d.end()
}

// Dissolve ends a session: the intermediary zeroes and frees its memory. The source
// may send it until the destination has attached, the destination at any time.
type Dissolve struct{}

// Type returns TypeDissolve.
func (Dissolve) Type() Type { return TypeDissolve }

// Append appends the body, which is empty.
func (Dissolve) Append(dst []byte) ([]byte, error) { return dst, nil }

// Dissolved answers Dissolve once the memory is zeroed.
type Dissolved struct{}

// Type returns TypeDissolved.
func (Dissolved) Type() Type { return TypeDissolved }

// Append appends the body, which is empty.
func (Dissolved) Append(dst []byte) ([]byte, error) { return dst, nil }
