// SPDX-License-Identifier: Apache-2.0

package wire

import "time"

// Reserve is the source's first message to an intermediary. Sent again, with the same
// reader, it changes the number of bytes.
type Reserve struct {
	// Bytes of sealed pages that the source would like to store.
	Bytes uint64
	// Reader is the only node that may read the pages: the destination's.
	Reader Identity
	// Grace is how long the intermediary keeps the pages while neither source nor
	// destination is connected. Whole seconds.
	Grace time.Duration
}

// Reserved answers Reserve.
type Reserved struct {
	Session Session
	// Bytes granted, at most what was asked for; 0 is an Error instead.
	Bytes uint64
}

// Attach is the destination's first message to an intermediary.
type Attach struct{ Session Session }

// Attached answers Attach.
type Attached struct {
	// Pages and Bytes that the session holds now.
	Pages, Bytes uint64
}

// Dissolve ends a session: the intermediary zeroes and frees its memory. The source
// may send it until the destination has attached, the destination at any time.
type Dissolve struct{}

// Dissolved answers Dissolve once the memory is zeroed.
type Dissolved struct{}

func (*Reserve) Type() Type  { return TypeReserve }
func (*Reserved) Type() Type { return TypeReserved }
func (*Attach) Type() Type   { return TypeAttach }
func (*Attached) Type() Type { return TypeAttached }
func (Dissolve) Type() Type  { return TypeDissolve }
func (Dissolved) Type() Type { return TypeDissolved }

func (*Reserve) Append(dst []byte) ([]byte, error)  { return nil, errSkeleton }
func (*Reserved) Append(dst []byte) ([]byte, error) { return nil, errSkeleton }
func (*Attach) Append(dst []byte) ([]byte, error)   { return nil, errSkeleton }
func (*Attached) Append(dst []byte) ([]byte, error) { return nil, errSkeleton }
func (Dissolve) Append(dst []byte) ([]byte, error)  { return nil, errSkeleton }
func (Dissolved) Append(dst []byte) ([]byte, error) { return nil, errSkeleton }

// ParseReserve reads the body of a Reserve frame.
func ParseReserve(body []byte) (Reserve, error) { return Reserve{}, errSkeleton }

// ParseReserved reads the body of a Reserved frame.
func ParseReserved(body []byte) (Reserved, error) { return Reserved{}, errSkeleton }

// ParseAttach reads the body of an Attach frame.
func ParseAttach(body []byte) (Attach, error) { return Attach{}, errSkeleton }

// ParseAttached reads the body of an Attached frame.
func ParseAttached(body []byte) (Attached, error) { return Attached{}, errSkeleton }
