// SPDX-License-Identifier: Apache-2.0

package multifd

import (
	"context"
	"fmt"
	"strings"
	"sync"
)

// Barrier brings the readers of all channels and of the main connection together
// at each synchronisation point; the package's documentation says why. Each reader
// waits until every other has reached the same point. It is used over and over.
//
// A barrier that was broken, by [Barrier.Break] or by a reader whose context
// ended, stays broken: whoever waits then, or comes later, gets the reason.
type Barrier struct {
	channels int

	mu     sync.Mutex
	point  *point
	passed uint64
	broken chan struct{}
	err    error // set before broken is closed
}

// point is one synchronisation point.
type point struct {
	here    []bool // per channel, the main connection last
	missing int
	reached chan struct{} // closed when nobody is missing
}

// NewBarrier returns a barrier for that many channels and the main connection.
func NewBarrier(channels int) *Barrier {
	return &Barrier{channels: channels, point: newPoint(channels + 1), broken: make(chan struct{})}
}

func newPoint(parties int) *point {
	return &point{here: make([]bool, parties), missing: parties, reached: make(chan struct{})}
}

// Channel says that the reader of channel id, counted from 0, has taken all that
// is before its next synchronisation point, and waits for the others. It panics
// for a channel that the barrier does not have.
func (b *Barrier) Channel(ctx context.Context, id int) error {
	if id < 0 || id >= b.channels {
		panic(fmt.Sprintf("multifd: channel %d of %d", id, b.channels))
	}
	return b.wait(ctx, id)
}

// Main is Channel for the reader of the main connection.
func (b *Barrier) Main(ctx context.Context) error {
	return b.wait(ctx, b.channels)
}

// Passed returns how many points all have reached.
func (b *Barrier) Passed() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.passed
}

// Break ends all waiting with err, which must not be nil: a reader has failed, or
// its connection has ended, and will not come any more. A point that all had
// reached before counts as reached. Only the first call has an effect.
func (b *Barrier) Break(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.breakLocked(err)
}

func (b *Barrier) breakLocked(err error) {
	if b.err == nil {
		b.err = err
		close(b.broken)
	}
}

func (b *Barrier) wait(ctx context.Context, party int) error {
	p, err := b.arrive(party)
	if err != nil {
		return err
	}
	select {
	case <-p.reached:
	case <-b.broken:
	case <-ctx.Done():
	}
	return b.leave(ctx, p)
}

func (b *Barrier) arrive(party int) (*point, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.point
	if b.err != nil {
		return nil, b.err
	}
	if p.here[party] {
		// One reader calls at a time; this is another one with the same number.
		b.breakLocked(fmt.Errorf("multifd: %s is twice at sync %d", partyName(p, party), b.passed))
		return nil, b.err
	}
	p.here[party] = true
	if p.missing--; p.missing == 0 {
		close(p.reached)
		b.passed++
		b.point = newPoint(len(p.here))
	}
	return p, nil
}

// leave decides what a wait has brought: a point reached wins over all else.
func (b *Barrier) leave(ctx context.Context, p *point) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-p.reached:
		return nil
	default:
	}
	if b.err == nil {
		b.breakLocked(fmt.Errorf("multifd: sync %d not reached by %s: %w", b.passed, p.absent(), context.Cause(ctx)))
	}
	return b.err
}

func (p *point) absent() string {
	var names []string
	for i, here := range p.here {
		if !here {
			names = append(names, partyName(p, i))
		}
	}
	return strings.Join(names, ", ")
}

func partyName(p *point, party int) string {
	if party == len(p.here)-1 {
		return "the main connection"
	}
	return fmt.Sprintf("channel %d", party)
}
