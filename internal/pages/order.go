// SPDX-License-Identifier: Apache-2.0

package pages

// DefaultPivots is the number of fault pivots that served best in "Post-copy live
// migration of virtual machines" (Hines, Deshpande, Gopalan), section 4.2.
const DefaultPivots = 7

// mergePages is the distance below which a new fault moves the pivot that is there
// instead of opening another one: a guest that walks through memory faults again and
// again near the same place, and must not push out the pivots of other threads.
const mergePages = 256

// Order chooses which pages to prepay a fault for: bubbling with several pivots. From
// each of the most recent faults two edges grow, one upwards and one downwards; beside
// them a sweep runs through all of memory from page 0, so that every page has its
// turn. The edges take turns, those of the newest fault first.
//
// An edge is not a position but the nearest page to the pivot that is ready, so
// pages that become ready behind it are found as well.
type Order struct {
	layout *Layout
	pivots []Index // newest first
	limit  int
	turn   int // the edge whose turn it is: 2*pivot, +1 for the downward one
	waited int // turns since the sweep's last
	sweep  Index
}

// NewOrder returns an order that keeps that many pivots, DefaultPivots for 0 or less.
func NewOrder(l *Layout, pivots int) *Order {
	if pivots <= 0 {
		pivots = DefaultPivots
	}
	return &Order{layout: l, limit: pivots, pivots: make([]Index, 0, pivots)}
}

// Fault tells that the guest touched page i before it was there. The pivot is the
// first page of its host page, so that the upward edge completes that one first. A
// page that does not exist is ignored.
func (o *Order) Fault(i Index) {
	i, n := o.layout.Unit(i)
	if n == 0 {
		return
	}
	slot := o.near(i, Index(max(mergePages, n+1)))
	if slot == o.limit {
		slot-- // the oldest goes
	} else if slot == len(o.pivots) {
		o.pivots = o.pivots[:slot+1]
	}
	copy(o.pivots[1:slot+1], o.pivots[:slot])
	o.pivots[0] = i
	o.turn = 0
}

// near returns the slot of a pivot closer to i than that, or else the slot after the
// last pivot.
func (o *Order) near(i, distance Index) int {
	for slot, p := range o.pivots {
		if i-p < distance || p-i < distance { // one of the two wraps around
			return slot
		}
	}
	return len(o.pivots)
}

// Next returns the next run of pages to fetch: up to max pages, all of them in ready
// and in one block. ok is false when ready is empty. The caller removes from ready
// those that it takes, else it is offered them again. ready must be as large as the
// layout.
func (o *Order) Next(ready *Bitmap, max int) (first Index, n int, ok bool) {
	if ready.Count() == 0 || max <= 0 {
		return 0, 0, false
	}
	edges := 2 * len(o.pivots)
	if o.waited < edges {
		for range edges {
			edge := o.turn % edges
			o.turn = edge + 1
			if first, n, ok = o.grow(ready, edge, max); ok {
				o.waited++
				return first, n, true
			}
		}
	}
	o.waited = 0
	at, ok := ready.NextSet(o.sweep)
	if !ok {
		at, _ = ready.NextSet(0)
	}
	n = o.up(ready, at, max)
	o.sweep = at + Index(n)
	return at, n, true
}

// grow takes a run from an edge.
func (o *Order) grow(ready *Bitmap, edge, max int) (first Index, n int, ok bool) {
	pivot := o.pivots[edge/2]
	if edge%2 == 0 {
		at, ok := ready.NextSet(pivot)
		if !ok {
			return 0, 0, false
		}
		return at, o.up(ready, at, max), true
	}
	if pivot == 0 {
		return 0, 0, false
	}
	at, ok := ready.PrevSet(pivot - 1)
	if !ok {
		return 0, 0, false
	}
	n = o.down(ready, at, max)
	return at - Index(n-1), n, true
}

// up returns the length of the run that begins with at.
func (o *Order) up(ready *Bitmap, at Index, max int) int {
	block, offset := o.layout.Locate(at)
	n := min(uint64(max), (o.layout.blocks[block].Length-offset)/Size)
	if end, ok := ready.NextClear(at); ok {
		n = min(n, uint64(end-at))
	}
	return int(n)
}

// down returns the length of the run that ends with at.
func (o *Order) down(ready *Bitmap, at Index, max int) int {
	_, offset := o.layout.Locate(at)
	n := min(uint64(max), offset/Size+1)
	if end, ok := ready.PrevClear(at); ok {
		n = min(n, uint64(at-end))
	}
	return int(n)
}
