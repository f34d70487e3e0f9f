// SPDX-License-Identifier: Apache-2.0

package wire

import "fmt"

// Type is the type of a frame.
type Type uint8

// The types of frames. Which conversation may carry which, and in which direction,
// is in docs/protocol.md.
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

// Frame is a received frame. The zero Frame is ready for Receive, which grows its
// buffer as frames need it and reuses it. A Frame is not safe for concurrent use,
// but may be handed to another goroutine together with what was parsed from it.
type Frame struct {
	// Type is the frame's type. Receive gives known types only.
	Type Type
	// Seq is the sequence number that the sender gave the frame. In an answer it
	// is the number of the frame answered.
	Seq uint64
	// Body is what follows the header; it is valid until the next Receive.
	Body []byte

	count int // descriptors in the body, of a Pages frame
	buf   []byte
}

// Message is what Lane.Send takes: every message of the protocol but Pages.
type Message interface {
	// Type returns the type of the frame that carries the message.
	Type() Type
	// Append appends the body to dst. It fails, naming the field, when the message
	// exceeds a limit of the protocol; dst is then undefined.
	Append(dst []byte) ([]byte, error)
}

// Pages returns the pages of a frame of TypePages after checking the count and all
// lengths. They alias the frame. Whether an index lies in the RAM of the VM is the
// caller's to check, who knows the layout.
func (f *Frame) Pages() (PageFrame, error) {
	return PageFrame{}, fmt.Errorf("%w: not built yet", ErrProtocol)
}
