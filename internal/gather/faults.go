// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

const (
	// maxRequestUnits bounds the host pages that one request of QEMU may name. Stock
	// QEMU names one.
	maxRequestUnits = 64
	// urgentUnit is the largest host page, in pages, that a fault fetches at once;
	// that of larger ones only goes ahead of the other prepaging.
	urgentUnit = 512
)

// fault notes that QEMU asked for length bytes of a block, because a thread of the
// guest or of QEMU waits for them. Pages that were sent are on their way and are
// ignored. It returns how many host pages became known to be waited for.
func (b *book) fault(block int, start, length uint64, now time.Time) (news int) {
	at, err := b.layout.Index(block, start&^(pages.Size-1))
	if err != nil {
		return 0
	}
	base, count := b.layout.Extent(block)
	end := min(base+pages.Index(count), at+pages.Index((length+pages.Size-1)/pages.Size))
	for range maxRequestUnits {
		if at >= end {
			return news
		}
		first, n := b.layout.Unit(at)
		at = first + pages.Index(n)
		if _, known := b.faults[first]; known || b.sent.Test(first) || len(b.faults) >= maxFaults {
			continue
		}
		b.faults[first] = fault{at: now}
		b.order.Fault(first)
		for _, s := range b.shelves {
			s.order.Fault(first)
		}
		news++
		b.route(first, n)
	}
	return news
}

// route takes the next step for a host page that is waited for.
func (b *book) route(first pages.Index, n uint64) {
	if b.sent.Test(first) {
		delete(b.faults, first)
		return
	}
	if n > 1 {
		b.routeUnit(first, n)
		return
	}
	switch h, _ := b.where.At(first); {
	case h == pages.Zero || h == pages.Local:
		b.demand.push(first)
	case b.busy.Test(first):
		b.hasten(first)
	case h == pages.Absent:
		b.routeAbsent(first, first)
	default:
		b.ask(first)
	}
}

// routeAbsent asks the source for a page that nobody here knows, once for a fault.
// After the commit such a page is zero.
func (b *book) routeAbsent(first, page pages.Index) {
	if b.committed {
		b.demand.push(first)
		return
	}
	if f := b.faults[first]; !f.wanted {
		f.wanted = true
		b.faults[first] = f
		b.wants = append(b.wants, page)
	}
}

// routeUnit fetches all that is missing of a host page of several pages.
func (b *book) routeUnit(first pages.Index, n uint64) {
	if b.units.complete(first) {
		b.demand.push(first)
		return
	}
	b.units.activate(first)
	asked := false
	for i := first; i < first+pages.Index(n); i++ {
		h, _ := b.where.At(i)
		if h == pages.Absent && !b.committed && !asked {
			// QEMU sends host pages whole, so one page of it is enough.
			asked = true
			b.routeAbsent(first, i)
		}
		if n <= urgentUnit {
			b.ask(i)
		}
	}
}

// ask fetches a page at once if it is at an intermediary and not here yet.
func (b *book) ask(i pages.Index) {
	h, v := b.where.At(i)
	k, ok := h.Intermediary()
	if !ok || b.aside.Test(i) || b.units.fetched(i) {
		return
	}
	if b.requested.Test(i) {
		b.promote(i)
		return
	}
	b.requested.Set(i)
	b.shelves[k].ready.Clear(i)
	b.shelves[k].urgent.push(wire.PageRef{Index: i, Version: v})
}

// promote moves an answer that waits for its turn, and holds page i, to the front.
func (b *book) promote(i pages.Index) {
	for k := range b.arrived.len() {
		if b.arrived.at(k).has(i) {
			b.demanded.push(b.arrived.remove(k))
			return
		}
	}
}

// hedgeAfter is how long a guest waits for a page that prepaging has asked for before
// the page is asked for again on the urgent lane. Prepaging keeps the queue shorter
// than that, unless something is wrong with that intermediary's bulk lanes.
const hedgeAfter = 15 * time.Millisecond

// hedge asks again for pages that prepaging does not bring in time. Whichever answer
// comes first is written.
func (b *book) hedge(now time.Time) {
	for first, f := range b.faults {
		if f.hedged || now.Sub(f.at) < hedgeAfter || b.sent.Test(first) || b.units.has(first) {
			continue
		}
		h, v := b.where.At(first)
		if k, ok := h.Intermediary(); ok && b.requested.Test(first) {
			f.hedged = true
			b.faults[first] = f
			b.shelves[k].urgent.push(wire.PageRef{Index: first, Version: v})
		}
	}
}

// arrive queues an answer of an intermediary for the writer.
func (b *book) arrive(r *reply) {
	if len(b.faults) > 0 {
		for _, ref := range r.refs {
			if _, ok := b.faults[ref.Index]; ok {
				b.demanded.push(r)
				return
			}
		}
	}
	b.arrived.push(r)
}

// served forgets the faults on pages that were written and calls each for the time
// since they were noted.
func (b *book) served(first pages.Index, n uint64, now time.Time, each func(time.Duration)) {
	for i := first; i < first+pages.Index(n) && len(b.faults) > 0; i++ {
		if f, ok := b.faults[i]; ok {
			delete(b.faults, i)
			each(now.Sub(f.at))
		}
	}
}

// wantAgain asks a source that came back for the pages it was asked for before.
func (b *book) wantAgain() {
	b.wants = b.wants[:0]
	for first, f := range b.faults {
		f.wanted = false
		b.faults[first] = f
		_, n := b.layout.Unit(first)
		b.route(first, n)
	}
}
