// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"fmt"
	"sync"
)

// Journal keeps the control frames of a source that the destination has not applied
// yet, so that they can be sent again when the connection was lost. It numbers them
// from 1. It is safe for concurrent use.
//
// A source journals everything it says on the control lane: Setup, Holders, Records,
// Package, State, Commit and Abort.
type Journal struct {
	// sending keeps frames in order on the lane. It is held while a lane blocks, so
	// Applied, which the receiver of the same lane calls, must not need it.
	sending sync.Mutex

	mu      sync.Mutex
	lane    *Lane
	entries []journalled // not applied, in order
	bytes   int          // of the bodies in entries
	last    uint64       // number given out last
	applied uint64       // number applied last
}

type journalled struct {
	seq  uint64
	typ  Type
	body []byte
}

// NewJournal returns an empty journal without a lane.
func NewJournal() *Journal { return &Journal{} }

// Send numbers and keeps a message, and sends it on the attached lane. While no lane is
// attached, or when sending fails, the message waits for the next Attach. It fails only
// for messages that the protocol does not allow. It blocks like Lane.Send.
func (j *Journal) Send(m Message) (seq uint64, err error) {
	body, err := m.Append(nil)
	if err == nil {
		err = allowed(m.Type(), sourceToDestination, LaneControl, len(body))
	}
	if err != nil {
		return 0, fmt.Errorf("journalling: %w", err)
	}
	j.sending.Lock()
	defer j.sending.Unlock()
	j.mu.Lock()
	j.last++
	e := journalled{seq: j.last, typ: m.Type(), body: body}
	j.entries = append(j.entries, e)
	j.bytes += len(body)
	lane := j.lane
	j.mu.Unlock()
	if lane != nil && lane.sendBody(e.typ, e.seq, e.body) != nil {
		j.detach(lane)
	}
	return e.seq, nil
}

// Attach sends everything after applied, which is from Resume, on a new control lane,
// and uses that lane from now on. The old connection must be closed before. It fails
// when the lane does, or when the destination has forgotten what it had applied, or
// claims to have applied what was never sent.
func (j *Journal) Attach(l *Lane, applied uint64) error {
	j.sending.Lock()
	defer j.sending.Unlock()
	j.mu.Lock()
	floor := j.applied
	j.mu.Unlock()
	if applied < floor {
		return fmt.Errorf("%w: %s applied control frames up to %d and now only knows %d: it lost its state",
			ErrProtocol, l.conn.peer, floor, applied)
	}
	if err := j.Applied(applied); err != nil {
		return err
	}
	j.mu.Lock()
	// A copy: Applied may shorten entries while they are sent.
	again := append([]journalled(nil), j.entries...)
	j.lane = nil
	j.mu.Unlock()
	for _, e := range again {
		if err := l.sendBody(e.typ, e.seq, e.body); err != nil {
			return fmt.Errorf("sending control frame %d again: %w", e.seq, err)
		}
	}
	j.mu.Lock()
	j.lane = l
	j.mu.Unlock()
	return nil
}

// Detach forgets the lane: messages are kept only.
func (j *Journal) Detach() {
	j.mu.Lock()
	j.lane = nil
	j.mu.Unlock()
}

func (j *Journal) detach(l *Lane) {
	j.mu.Lock()
	if j.lane == l {
		j.lane = nil
	}
	j.mu.Unlock()
}

// Applied drops the frames up to and including seq, which the destination reported as
// applied. It fails when seq was never given out. Repeated and older reports do nothing.
func (j *Journal) Applied(seq uint64) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if seq > j.last {
		return fmt.Errorf("%w: control frame %d is reported as applied, only %d were sent", ErrProtocol, seq, j.last)
	}
	n := 0
	for n < len(j.entries) && j.entries[n].seq <= seq {
		j.bytes -= len(j.entries[n].body)
		j.entries[n].body = nil
		n++
	}
	j.entries = j.entries[n:]
	j.applied = max(j.applied, seq)
	return nil
}

// Pending returns the number of frames, and the bytes of their bodies, that are not
// applied yet: what the journal holds in memory.
func (j *Journal) Pending() (frames, bytes int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.entries), j.bytes
}
