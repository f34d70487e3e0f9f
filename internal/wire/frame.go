// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"encoding/binary"
	"fmt"
)

// Type is the type of a frame.
type Type uint8

// The types of frames. Which conversation may carry which, and in which direction,
// is in docs/protocol.md and in rules.go.
const (
	TypeHello     Type = 1
	TypeWelcome   Type = 2
	TypeLaneOpen  Type = 3
	TypeLaneReady Type = 4
	TypePing      Type = 5
	TypeError     Type = 6

	TypeResume    Type = 16
	TypeSetup     Type = 17
	TypeReady     Type = 18
	TypeHolders   Type = 19
	TypeRecords   Type = 20
	TypePackage   Type = 21
	TypeLoaded    Type = 22
	TypeState     Type = 23
	TypeCredit    Type = 24
	TypeApplied   Type = 25
	TypeCommit    Type = 26
	TypeCommitted Type = 27
	TypeAbort     Type = 28

	TypePages Type = 32
	TypeAck   Type = 33
	TypeNack  Type = 34
	TypeWant  Type = 35
	TypeRead  Type = 36

	TypeReserve   Type = 48
	TypeReserved  Type = 49
	TypeAttach    Type = 50
	TypeAttached  Type = 51
	TypeFree      Type = 52
	TypeDissolve  Type = 53
	TypeDissolved Type = 54
)

var typeNames = [...]string{
	TypeHello: "Hello", TypeWelcome: "Welcome", TypeLaneOpen: "LaneOpen",
	TypeLaneReady: "LaneReady", TypePing: "Ping", TypeError: "Error",
	TypeResume: "Resume", TypeSetup: "Setup", TypeReady: "Ready", TypeHolders: "Holders",
	TypeRecords: "Records", TypePackage: "Package", TypeLoaded: "Loaded",
	TypeState: "State", TypeCredit: "Credit", TypeApplied: "Applied",
	TypeCommit: "Commit", TypeCommitted: "Committed", TypeAbort: "Abort",
	TypePages: "Pages", TypeAck: "Ack", TypeNack: "Nack", TypeWant: "Want", TypeRead: "Read",
	TypeReserve: "Reserve", TypeReserved: "Reserved", TypeAttach: "Attach",
	TypeAttached: "Attached", TypeFree: "Free", TypeDissolve: "Dissolve",
	TypeDissolved: "Dissolved",
}

// String returns the type's name.
func (t Type) String() string {
	if int(t) < len(typeNames) && typeNames[t] != "" {
		return typeNames[t]
	}
	return fmt.Sprintf("frame type %d", uint8(t))
}

const (
	// headerSize is the size of a frame's header: type 1, flags 1, count 2, length 4
	// and sequence number 8.
	headerSize = 16
	// tagSize is what the cipher of a lane adds to a frame.
	tagSize = 16

	// flagOptional lets a receiver that does not know the type skip the frame.
	flagOptional = 1
)

// header is the beginning of a frame.
type header struct {
	typ   Type
	flags uint8
	// count is the number of descriptors of a Pages frame, else 0.
	count uint16
	// length is the number of bytes after the header, with the tag if there is one.
	length uint32
	seq    uint64
}

func (h *header) put(b []byte) {
	b[0], b[1] = byte(h.typ), h.flags
	binary.BigEndian.PutUint16(b[2:], h.count)
	binary.BigEndian.PutUint32(b[4:], h.length)
	binary.BigEndian.PutUint64(b[8:], h.seq)
}

func parseHeader(b []byte) header {
	return header{
		typ: Type(b[0]), flags: b[1], count: binary.BigEndian.Uint16(b[2:]),
		length: binary.BigEndian.Uint32(b[4:]), seq: binary.BigEndian.Uint64(b[8:]),
	}
}

// Frame is a received frame. The zero Frame is ready for Receive, which grows its
// buffer as frames need it and reuses it. A Frame is not safe for concurrent use, but
// may be handed to another goroutine together with what was parsed from it.
type Frame struct {
	// Type is the frame's type. Receive gives known types only.
	Type Type
	// Seq is the sequence number that the sender gave the frame. In an answer it is
	// the number of the frame answered.
	Seq uint64
	// Body is what follows the header; it is valid until the next Receive.
	Body []byte

	count  int // descriptors in Body, of a Pages frame
	stride int // size of one descriptor's entry in Body
	buf    []byte
}

// room returns the first n bytes of f's buffer, with their old content, and makes the
// buffer larger if need be. The caller has bounded n.
func (f *Frame) room(n int) []byte {
	if cap(f.buf) < n {
		larger := make([]byte, n)
		copy(larger, f.buf[:cap(f.buf)])
		f.buf = larger
	}
	return f.buf[:n]
}

// Pages returns the pages of a frame of TypePages after checking the count and all
// lengths. They alias the frame. Whether an index lies in the RAM of the VM is the
// caller's to check, who knows the layout.
func (f *Frame) Pages() (PageFrame, error) {
	if f.Type != TypePages {
		return PageFrame{}, fmt.Errorf("%w: %v frame where Pages is wanted", ErrProtocol, f.Type)
	}
	return parsePages(f.Body, f.count, f.stride)
}

// Message is what Lane.Send takes: every message of the protocol but Pages.
type Message interface {
	// Type returns the type of the frame that carries the message.
	Type() Type
	// Append appends the body to dst. It fails, naming the field, when the message
	// exceeds a limit of the protocol; dst's spare capacity is then undefined.
	Append(dst []byte) ([]byte, error)
}
