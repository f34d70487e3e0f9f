// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"math"
	"slices"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

const (
	// maxPending is how many records may wait before the source QEMU is made to wait;
	// 1 MiB of memory.
	maxPending = 64 << 10
	// maxJournal is how many bytes of control frames the destination may leave
	// unapplied before the source QEMU is made to wait. A record takes 16 bytes.
	maxJournal = 64 << 20
)

// outbox orders what the destination is told on the control lane. Records gather
// while the sender is busy, so that they travel in large frames when they come fast
// and at once when they do not. It is guarded by Engine.mu.
type outbox struct {
	// open is set by the first message, which goes ahead of records told before it.
	open    bool
	queue   []wire.Message
	pending []pages.Record
	records wire.Records // the sender's, while it sends them
	// busy means that the sender has a message that the journal does not have yet.
	busy bool
}

// record adds a page map record behind everything posted before. It is joined with
// its predecessor where it continues it.
func (o *outbox) record(r pages.Record) {
	if n := len(o.pending); n > 0 {
		last := &o.pending[n-1]
		if r.First == last.First+pages.Index(last.Count) && r.Holder == last.Holder &&
			r.Version == last.Version && r.Count <= math.MaxUint32-last.Count {
			last.Count += r.Count
			return
		}
	}
	o.pending = append(o.pending, r)
}

// post adds a message behind all records.
func (o *outbox) post(m wire.Message) {
	for chunk := range slices.Chunk(o.pending, wire.MaxRecords) {
		o.queue = append(o.queue, wire.Records(slices.Clone(chunk)))
	}
	o.pending = o.pending[:0]
	o.queue = append(o.queue, m)
}

// next takes the next message; it is valid until the next call. Records are taken only
// when nothing is posted before them.
func (o *outbox) next() (m wire.Message, ok bool) {
	defer func() { o.busy = ok }()
	if len(o.queue) > 0 {
		m = o.queue[0]
		o.queue[0] = nil
		if o.queue = o.queue[1:]; len(o.queue) == 0 {
			o.queue = nil
		}
		return m, true
	}
	if len(o.pending) == 0 || !o.open {
		return nil, false
	}
	n := min(len(o.pending), wire.MaxRecords)
	o.records = append(o.records[:0], o.pending[:n]...)
	o.pending = o.pending[:copy(o.pending, o.pending[n:])]
	return &o.records, true
}

// empty tells whether the journal has everything that was told and posted.
func (o *outbox) empty() bool { return len(o.queue) == 0 && len(o.pending) == 0 && !o.busy }

// tell queues a record and wakes the sender; the caller holds e.mu.
func (e *Engine) tell(r pages.Record) {
	e.out.record(r)
	e.outWake.Signal()
}

// post queues a message behind all records told so far; the caller holds e.mu.
func (e *Engine) post(m wire.Message) {
	e.out.post(m)
	e.outWake.Signal()
}

// lead posts the first message of all; the caller holds e.mu.
func (e *Engine) lead(m wire.Message) {
	e.out.open = true
	e.out.queue = append(e.out.queue, m)
	e.outWake.Signal()
}

// sendControl is the only sender of journalled frames, which gives them their order.
// The journal keeps what the destination has not applied, over lost connections too,
// so the sender never fails for the network's sake.
func (e *Engine) sendControl() {
	for {
		e.mu.Lock()
		m, ok := e.out.next()
		for !ok && e.ctx.Err() == nil {
			e.outWake.Wait()
			m, ok = e.out.next()
		}
		e.mu.Unlock()
		if !ok {
			return
		}
		if _, err := e.journal.Send(m); err != nil {
			e.fail(err)
			return
		}
		e.noteJournal(true)
	}
}

// noteJournal tells those who wait for the journal that it has changed; sent is true
// for the sender of control frames.
func (e *Engine) noteJournal(sent bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if sent {
		e.out.busy = false
	}
	e.changed.Broadcast()
	e.room.Broadcast()
}

// unapplied is how many bytes the destination has not applied.
func (e *Engine) unapplied() int {
	_, n := e.journal.Pending()
	return n
}

// congested tells whether the control lane is so far behind that no page more should
// be taken in; the caller holds e.mu.
func (e *Engine) congested() bool {
	return len(e.out.pending) > maxPending || e.unapplied() > maxJournal
}
