// SPDX-License-Identifier: Apache-2.0

package gather

import "scattergather.io/scattergather/internal/pages"

// activeUnitBytes bounds the host pages that are being assembled by prepaging, which
// bounds what assembling takes of the store; at least two are, whatever their size.
const activeUnitBytes = 32 << 20

// units looks after host pages of more than pages.Size. QEMU takes such a page whole,
// so what comes from intermediaries is assembled in the store first. Small blocks are
// none of its business, and a nil *units has none.
type units struct {
	b     *book
	spans []span
	state []unit
	// Each over unit numbers; a unit is in at most one.
	ready   *pages.Bitmap // complete, with data
	allZero *pages.Bitmap // complete, of zeros
	idle    *pages.Bitmap // to be assembled
	// here has the pages of intermediaries that are in the store.
	here   *pages.Bitmap
	active int
	near   pages.Index // unit after that of the last fault
}

// span is a block with large host pages.
type span struct {
	first, end pages.Index
	per        uint64 // pages of a unit
	base       int    // number of its first unit
}

// unit counts what is known of one host page.
type unit struct {
	known  uint32 // pages that are not Absent
	have   uint32 // pages that are zero or in the store
	zeros  uint32
	active bool // being assembled
}

func newUnits(b *book) *units {
	u := &units{b: b}
	total := 0
	for k, blk := range b.layout.Blocks() {
		if blk.PageSize == pages.Size {
			continue
		}
		first, n := b.layout.Extent(k)
		per := blk.PageSize / pages.Size
		u.spans = append(u.spans, span{first: first, end: first + pages.Index(n), per: per, base: total})
		total += int(n / per)
	}
	if total == 0 {
		return nil
	}
	u.state = make([]unit, total)
	u.reset()
	return u
}

// reset forgets all that was counted, but not which pages are in the store.
func (u *units) reset() {
	if u == nil {
		return
	}
	clear(u.state)
	n := uint64(len(u.state))
	u.ready, u.allZero, u.idle = pages.NewBitmap(n), pages.NewBitmap(n), pages.NewBitmap(n)
	u.active = 0
	if u.here == nil {
		u.here = pages.NewBitmap(u.b.layout.Pages())
	}
}

// of returns the number of the unit that holds page i, and its pages; n is 0 for a
// page of a small block.
func (u *units) of(i pages.Index) (number int, first pages.Index, n uint64) {
	if u == nil {
		return 0, 0, 0
	}
	for _, s := range u.spans {
		if i >= s.first && i < s.end {
			k := uint64(i-s.first) / s.per
			return s.base + int(k), s.first + pages.Index(k*s.per), s.per
		}
	}
	return 0, 0, 0
}

// at is the inverse of of.
func (u *units) at(number int) (first pages.Index, n uint64) {
	for _, s := range u.spans {
		k := uint64(number - s.base)
		if number >= s.base && k < uint64(s.end-s.first)/s.per {
			return s.first + pages.Index(k*s.per), s.per
		}
	}
	return 0, 0
}

func (u *units) has(i pages.Index) bool {
	_, _, n := u.of(i)
	return n > 0
}

// fetched tells whether page i of an intermediary is in the store.
func (u *units) fetched(i pages.Index) bool { return u != nil && u.here.Test(i) }

// forget ends fetched; it returns what it was.
func (u *units) forget(i pages.Index) bool {
	if !u.fetched(i) {
		return false
	}
	u.here.Clear(i)
	return true
}

// count adds page i, which is at h, to its unit.
func (u *units) count(i pages.Index, h pages.Holder) {
	number, _, _ := u.of(i)
	u.add(&u.state[number], i, h, 1)
}

func (u *units) add(s *unit, i pages.Index, h pages.Holder, d uint32) {
	if h == pages.Absent {
		return
	}
	s.known += d
	if h == pages.Zero {
		s.zeros += d
	}
	if h == pages.Zero || h == pages.Local || u.here.Test(i) {
		s.have += d
	}
}

// moved notes that unsent page i changed its place.
func (u *units) moved(i pages.Index, old, now pages.Holder) {
	number, _, _ := u.of(i)
	s := &u.state[number]
	u.add(s, i, old, ^uint32(0))
	if k, ok := old.Intermediary(); ok {
		u.b.shelves[k].ready.Clear(i)
	}
	u.here.Clear(i)
	u.add(s, i, now, 1)
	u.put(i, now)
	u.review(number)
}

// fetch notes that page i, which was requested, is in the store now.
func (u *units) fetch(i pages.Index) {
	u.b.requested.Clear(i)
	if u.here.Test(i) {
		return
	}
	number, first, n := u.of(i)
	u.here.Set(i)
	u.state[number].have++
	u.review(number)
	if _, waited := u.b.faults[first]; waited && u.complete(first) {
		u.b.route(first, n)
	}
}

// put offers page i for prepaging if its unit is being assembled.
func (u *units) put(i pages.Index, h pages.Holder) {
	number, _, _ := u.of(i)
	if k, ok := h.Intermediary(); ok && u.state[number].active &&
		!u.here.Test(i) && !u.b.requested.Test(i) && !u.b.aside.Test(i) && !u.b.busy.Test(i) {
		u.b.shelves[k].ready.Set(i)
	}
}

// complete tells whether all of the host page that begins with first can be sent.
func (u *units) complete(first pages.Index) bool {
	number, _, n := u.of(first)
	s := u.state[number]
	return s.have == s.known && (u.b.committed || uint64(s.known) == n)
}

// review files a unit whose counts changed.
func (u *units) review(number int) {
	first, n := u.at(number)
	s := &u.state[number]
	sent := u.b.sent.Test(first)
	done := !sent && s.known > 0 && u.complete(first)
	if s.active && (done || sent) {
		s.active = false
		u.active--
	}
	assign(u.ready, number, done && s.zeros < s.known)
	assign(u.allZero, number, done && s.zeros == s.known)
	assign(u.idle, number, !sent && !done && !s.active && s.have < s.known &&
		(u.b.committed || uint64(s.known) == n))
}

func (u *units) reviewAll() {
	if u == nil {
		return
	}
	for k := range u.state {
		u.review(k)
	}
}

func assign(b *pages.Bitmap, k int, on bool) {
	if on {
		b.Set(pages.Index(k))
	} else {
		b.Clear(pages.Index(k))
	}
}

// activate begins to assemble a host page.
func (u *units) activate(first pages.Index) {
	number, _, n := u.of(first)
	s := &u.state[number]
	u.near = pages.Index(number + 1)
	if s.active || u.b.sent.Test(first) {
		return
	}
	s.active = true
	u.active++
	u.idle.Clear(pages.Index(number))
	for i := first; i < first+pages.Index(n); i++ {
		h, _ := u.b.where.At(i)
		u.put(i, h)
	}
}

// assemble begins with more host pages if few are being assembled: those behind the
// last fault first.
func (u *units) assemble() {
	if u == nil {
		return
	}
	for u.idle.Count() > 0 {
		number, ok := u.idle.NextSet(u.near)
		if !ok {
			number, _ = u.idle.NextSet(0)
		}
		first, n := u.at(int(number))
		if u.active >= max(2, activeUnitBytes/int(n*pages.Size)) {
			return
		}
		u.activate(first)
	}
}

// next claims a complete host page for the writer; zeros selects those without data.
func (u *units) next(zeros bool) (first pages.Index, n uint64, ok bool) {
	if u == nil {
		return 0, 0, false
	}
	from := u.ready
	if zeros {
		from = u.allZero
	}
	number, ok := from.NextSet(0)
	if !ok {
		return 0, 0, false
	}
	first, n = u.at(int(number))
	u.claim(first, n)
	return first, n, true
}

// claim marks a complete host page as sent.
func (u *units) claim(first pages.Index, n uint64) {
	u.b.sent.SetRange(first, n)
	number, _, _ := u.of(first)
	u.review(number)
}

// left returns the number of host pages that are known and not sent.
func (u *units) left() uint64 {
	if u == nil {
		return 0
	}
	return u.ready.Count() + u.allZero.Count() + u.idle.Count() + uint64(u.active)
}
