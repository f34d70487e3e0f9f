// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"fmt"
	"sync"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// urgentLane carries pages that the destination's guest waits for. It has no window and
// needs no credit: such a page goes at once. All of it is guarded by Engine.mu.
type urgentLane struct {
	queue line
	lane  laneState
	wake  *sync.Cond
	bytes uint64
}

// detach returns the lane's flights to its queue, for the next connection.
func (u *urgentLane) detach() {
	u.queue.first(u.lane.flights)
	u.lane = laneState{}
}

// slot returns a flight with room for one page: the last one in the queue, or a new
// one, or nil when too many are under way.
func (e *Engine) slot() *flight {
	if e.urgent.queue.len() > 0 && !e.urgent.queue.last().batch.Full() {
		return e.urgent.queue.last()
	}
	f := e.pool.take(maxFlights + urgentFlights)
	if f != nil {
		e.urgent.queue.add(f)
	}
	return f
}

// express sends a page that just came from QEMU on the urgent lane alone. It returns
// false when that lane is full; the page then goes the ordinary way. The caller holds
// e.mu.
func (e *Engine) express(i pages.Index, v pages.Version, data []byte) bool {
	e.wanted.Clear(i)
	f := e.slot()
	if f == nil {
		return false
	}
	f.batch.Append(e.sealer, i, v, wire.EncodingRaw, data)
	e.urge(f, i, v, len(data)+wire.Overhead)
	return true
}

// repeat sends a copy of a page of a flight on the urgent lane; the flight goes on as
// it was. It does nothing when that lane is full. The caller holds e.mu.
func (e *Engine) repeat(from *flight, p pageRef) {
	var sealed []byte
	var desc wire.Desc
	_ = from.batch.Each(func(d wire.Desc, s []byte) error {
		if d.Index == p.index {
			desc, sealed = d, s
		}
		return nil
	})
	f := e.slot()
	if f == nil || sealed == nil {
		return
	}
	f.batch.AppendSealed(desc, sealed)
	e.urge(f, p.index, p.version, len(sealed))
	e.counts.Repeated++
}

func (e *Engine) urge(f *flight, i pages.Index, v pages.Version, sealed int) {
	f.add(i, v, sealed)
	e.pool.bytes += sealed
	e.urgent.wake.Signal()
}

// catchWanted looks for pages in a batch that were asked for while it was being
// filled. The caller holds e.mu.
func (e *Engine) catchWanted(f *flight) {
	if e.wanted.Count() == 0 {
		return
	}
	for _, p := range f.pages() {
		if e.wanted.Test(p.index) {
			e.wanted.Clear(p.index)
			e.repeat(f, p)
		}
	}
}

// want serves pages that the destination's guest waits for. Where a page is decides:
// safe pages are at the destination or their record is on its way there; one that QEMU
// has not sent is asked of it, in whole host pages; of one that is under way a copy is
// sent on the urgent lane; one in an open batch is caught when the batch is placed.
func (e *Engine) want(list []pages.Index) error {
	e.mu.Lock()
	units, err := e.sortWanted(list)
	if err == nil {
		e.repeatWanted()
	}
	e.room.Broadcast() // the backlog may be longer now
	e.mu.Unlock()
	if err != nil {
		return err
	}
	if err := e.source.request(e.layout, units); err != nil {
		// The reader of the stream learns of it, too, and it is his to act.
		e.log.Error(err, "Asking the source QEMU for pages")
	}
	return nil
}

// sortWanted marks the pages that are not safe as wanted. It returns the host pages to
// ask of QEMU, and leaves those that QEMU has sent in e.sought.
func (e *Engine) sortWanted(list []pages.Index) (units []pages.Index, err error) {
	for _, i := range list {
		if uint64(i) >= e.layout.Pages() {
			clear(e.sought)
			return nil, fmt.Errorf("%w: page %d of %d is wanted", wire.ErrProtocol, i, e.layout.Pages())
		}
		if !e.handed || e.wanted.Test(i) || e.safe.Test(i) {
			continue
		}
		e.counts.Wanted++
		e.wanted.Set(i)
		if next, ok := e.ledger.NextUnsent(i); !ok || next != i {
			e.sought[i] = struct{}{}
			continue
		}
		if e.drained {
			continue
		}
		e.counts.Fetched++
		unit, _ := e.layout.Unit(i)
		if n := len(units); n == 0 || units[n-1] != unit {
			units = append(units, unit)
		}
	}
	return units, nil
}

// repeatWanted looks for the pages of e.sought in all flights, and sends a copy of those
// that are there. The urgent lane comes first: what it has needs no copy.
func (e *Engine) repeatWanted() {
	e.searchWanted(e.urgent.queue.all(), true)
	e.searchWanted(e.urgent.lane.flights, true)
	e.searchWanted(e.backlog.all(), false)
	for _, h := range e.holders {
		e.searchWanted(h.queue.all(), false)
		for l := range h.lanes {
			e.searchWanted(h.lanes[l].flights, false)
		}
	}
	clear(e.sought)
}

func (e *Engine) searchWanted(list []*flight, urgent bool) {
	for _, f := range list {
		if len(e.sought) == 0 {
			return
		}
		for _, p := range f.pages() {
			if _, ok := e.sought[p.index]; !ok || !e.ledger.Current(p.index, p.version) {
				continue
			}
			delete(e.sought, p.index)
			e.wanted.Clear(p.index)
			if !urgent {
				e.repeat(f, p)
			}
		}
	}
}

// answerUrgent takes the answer to a batch of the urgent lane, or a Want.
func (l *link) answerUrgent(f *wire.Frame, scratch *[]pages.Index) error {
	e := l.e
	switch f.Type {
	case wire.TypeWant:
		list, err := wire.ParseWant((*scratch)[:0], f.Body)
		if err != nil {
			return err
		}
		*scratch = list
		return e.want(list)
	case wire.TypeAck, wire.TypeNack:
	default:
		return unexpected(f)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	st := &e.urgent.lane
	fl := st.find(f.Seq)
	switch {
	case fl == nil:
		return fmt.Errorf("%w: answer to frame %d, which is not under way", wire.ErrProtocol, f.Seq)
	case f.Type == wire.TypeAck:
		e.landed(fl, pages.Local)
		e.recycle(st, fl)
	case st.sending == fl:
		fl.verdict = refused
	default:
		// The destination has no room: another holder may, and then it reads there.
		e.replace([]*flight{fl})
	}
	return nil
}
