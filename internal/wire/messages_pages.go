// SPDX-License-Identifier: Apache-2.0

package wire

import "scattergather.io/scattergather/internal/pages"

// Ack says that the pages of the frame with the same Seq on this lane are stored: at
// an intermediary in its pool, at the destination in its store and its map.
type Ack struct{}

// Nack says that none of the pages of the frame with the same Seq on this lane was
// stored.
type Nack struct{ Code Code }

// Want asks the source for pages that the guest at the destination waits for and the
// map does not have. At most MaxWant. It is not answered: the pages come as soon as
// QEMU gives them out, on any lane.
type Want []pages.Index

// PageRef names the content of a page.
type PageRef struct {
	Index   pages.Index
	Version pages.Version
}

// Read asks an intermediary for pages, 1 to MaxBatch. The answer is one Pages frame
// with the same Seq on the same lane, with the same pages in the same order; those
// not held are marked missing.
type Read []PageRef

// Run is a run of pages.
type Run struct {
	First pages.Index
	Count uint32
}

// Free tells an intermediary that it may forget all versions of these pages, at most
// MaxRuns runs. It is not answered.
type Free []Run

func (Ack) Type() Type   { return TypeAck }
func (*Nack) Type() Type { return TypeNack }
func (Want) Type() Type  { return TypeWant }
func (Read) Type() Type  { return TypeRead }
func (Free) Type() Type  { return TypeFree }

func (Ack) Append(dst []byte) ([]byte, error)   { return nil, errSkeleton }
func (*Nack) Append(dst []byte) ([]byte, error) { return nil, errSkeleton }
func (Want) Append(dst []byte) ([]byte, error)  { return nil, errSkeleton }
func (Read) Append(dst []byte) ([]byte, error)  { return nil, errSkeleton }
func (Free) Append(dst []byte) ([]byte, error)  { return nil, errSkeleton }

// ParseNack reads the body of a Nack frame.
func ParseNack(body []byte) (Nack, error) { return Nack{}, errSkeleton }

// ParseWant appends the pages of a Want frame to dst.
func ParseWant(dst []pages.Index, body []byte) ([]pages.Index, error) { return nil, errSkeleton }

// ParseRead appends the page references of a Read frame to dst.
func ParseRead(dst []PageRef, body []byte) ([]PageRef, error) { return nil, errSkeleton }

// ParseFree appends the runs of a Free frame to dst.
func ParseFree(dst []Run, body []byte) ([]Run, error) { return nil, errSkeleton }
