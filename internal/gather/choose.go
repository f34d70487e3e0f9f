// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// reply is a Read from the moment it is made to the moment its answer is written. It
// belongs in turn to its holder's list, the book's queues and the writer.
type reply struct {
	holder int
	urgent bool
	bytes  int // expected size of the answer
	refs   []wire.PageRef
	sent   time.Time
	frame  *wire.Frame // the answer
	pages  wire.PageFrame
	// missing has a bit for each page that the writer must leave out.
	missing uint64
}

func (r *reply) has(i pages.Index) bool {
	for _, ref := range r.refs {
		if ref.Index == i {
			return true
		}
	}
	return false
}

// kind says where the pages of a segment come from.
type kind uint8

const (
	fromStore  kind = iota + 1 // of n pages from first, all in the store
	fromZero                   // of n pages from first, all zero
	fromReply                  // those pages of reply that mask names
	fromUnit                   // of the host page of n pages from first
	fromParcel                 // those pages of parcel that mask names
)

// segment is what the writer puts into QEMU's stream next. Its pages are claimed: they
// count as sent, and nobody else sends them.
type segment struct {
	kind   kind
	first  pages.Index
	n      int
	reply  *reply
	parcel *parcel
	mask   uint64
}

// next claims the next pages to write, at most max unless they are one host page or
// one answer or parcel. What a guest waits for comes first; then what just came from
// the source and what lies in the store, since these take memory here; then what intermediaries answered; pages of zeros, which a guest
// that does not run into them never misses, only when there is nothing else. Without
// background only the first is looked at.
func (b *book) next(max int, background bool) (s segment, demand, ok bool) {
	if s, ok = b.nextDemand(); ok {
		return s, true, true
	}
	if !background {
		return segment{}, false, false
	}
	if b.passing.len() > 0 {
		return b.claimParcel(b.passing.pop()), false, true
	}
	if first, n, ok := b.order.Next(b.local, max); ok {
		b.claimRun(first, n)
		return segment{kind: fromStore, first: first, n: n}, false, true
	}
	if first, n, ok := b.units.next(false); ok {
		return segment{kind: fromUnit, first: first, n: int(n)}, false, true
	}
	if b.arrived.len() > 0 {
		return b.claimReply(b.arrived.pop()), false, true
	}
	if s, ok = b.nextZeros(max); ok {
		return s, false, true
	}
	if first, n, ok := b.units.next(true); ok {
		return segment{kind: fromUnit, first: first, n: int(n)}, false, true
	}
	return segment{}, false, false
}

func (b *book) nextDemand() (s segment, ok bool) {
	for b.demand.len() > 0 {
		first := b.demand.pop()
		if b.sent.Test(first) {
			continue
		}
		if _, n := b.layout.Unit(first); n > 1 {
			if !b.units.complete(first) {
				continue // it is routed again when it is
			}
			b.units.claim(first, n)
			return segment{kind: fromUnit, first: first, n: int(n)}, true
		}
		s := segment{kind: fromZero, first: first, n: 1}
		if h, _ := b.where.At(first); h == pages.Local {
			s.kind = fromStore
		}
		b.claimRun(first, 1)
		return s, true
	}
	if b.express.len() > 0 {
		return b.claimParcel(b.express.pop()), true
	}
	if b.demanded.len() > 0 {
		return b.claimReply(b.demanded.pop()), true
	}
	return segment{}, false
}

// nextZeros claims a run of zero pages of one block.
func (b *book) nextZeros(max int) (segment, bool) {
	if b.zero.Count() == 0 {
		return segment{}, false
	}
	first, ok := b.zero.NextSet(b.zeroFrom)
	if !ok {
		first, _ = b.zero.NextSet(0)
	}
	block, _ := b.layout.Locate(first)
	base, count := b.layout.Extent(block)
	end := min(first+pages.Index(max), base+pages.Index(count))
	if gap, ok := b.zero.NextClear(first); ok {
		end = min(end, gap)
	}
	b.zeroFrom = end
	b.claimRun(first, int(end-first))
	return segment{kind: fromZero, first: first, n: int(end - first)}, true
}

// claimRun marks pages of small blocks as sent.
func (b *book) claimRun(first pages.Index, n int) {
	b.sent.SetRange(first, uint64(n))
	b.local.ClearRange(first, uint64(n))
	b.zero.ClearRange(first, uint64(n))
}

// claimReply claims those pages of an answer that are still wanted in its version.
func (b *book) claimReply(r *reply) segment {
	s := segment{kind: fromReply, reply: r}
	for k, ref := range r.refs {
		if r.missing>>k&1 == 1 || b.units.has(ref.Index) {
			continue
		}
		b.requested.Clear(ref.Index)
		if b.sent.Test(ref.Index) {
			continue
		}
		if h, v := b.where.At(ref.Index); v != ref.Version || h < pages.FirstHolder {
			b.refile(ref.Index)
			continue
		}
		b.sent.Set(ref.Index)
		b.unready(ref.Index)
		b.aside.Clear(ref.Index)
		s.mask |= 1 << k
		s.n++
	}
	return s
}

// unclaim takes a claimed page of an answer back that could not be written.
func (b *book) unclaim(i pages.Index) {
	b.sent.Clear(i)
	b.setAside(i)
}

// nextRead chooses up to max pages to prepage from intermediary k and marks them as
// requested. They are appended to refs.
func (b *book) nextRead(k, max int, refs []wire.PageRef) []wire.PageRef {
	s := b.shelves[k]
	for len(refs) < max {
		first, n, ok := s.order.Next(s.ready, max-len(refs))
		if !ok {
			break
		}
		s.ready.ClearRange(first, uint64(n))
		for i := first; i < first+pages.Index(n); i++ {
			h, v := b.where.At(i)
			if at, ok := h.Intermediary(); !ok || at != k || b.sent.Test(i) || b.requested.Test(i) {
				continue
			}
			b.requested.Set(i)
			refs = append(refs, wire.PageRef{Index: i, Version: v})
		}
	}
	return refs
}

// nextUrgent takes up to max demand reads for intermediary k. They are appended to
// refs.
func (b *book) nextUrgent(k, max int, refs []wire.PageRef) []wire.PageRef {
	s := b.shelves[k]
	for len(refs) < max && s.urgent.len() > 0 {
		ref := s.urgent.pop()
		if b.sent.Test(ref.Index) {
			b.requested.Clear(ref.Index)
			continue
		}
		refs = append(refs, ref)
	}
	return refs
}
