// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"errors"
	"fmt"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// errStale means that the source announced a newer version of a page that QEMU has
// already. The guest may have seen an outdated page, so nothing can mend it.
var errStale = errors.New("the source announced a newer version of a page that the guest has already")

// book knows where every page is and decides what is done next. It does no I/O; the
// engine guards it by its mutex. It takes about one byte and six bits a page, and one
// bit more for every intermediary.
//
// A page that is not sent is in at most one of these places:
//
//	local       in the store, to be written to QEMU
//	zero        a page of zeros, to be written to QEMU
//	ready       of a shelf: at that intermediary, to be asked for
//	requested   asked of an intermediary (or about to be), or its answer waits here
//	busy        brought by the source a moment ago
//	aside       at an intermediary that did not have it or gave a wrong one: see retry
//
// or in none of them while it is Absent, or belongs to a host page of several pages,
// which units looks after.
type book struct {
	layout *pages.Layout
	where  *pages.Map

	sent      *pages.Bitmap // in QEMU's stream, or claimed by the writer for it
	busy      *pages.Bitmap // just brought by the source, neither stored nor placed
	requested *pages.Bitmap
	aside     *pages.Bitmap
	local     *pages.Bitmap
	zero      *pages.Bitmap
	shelves   []*shelf
	units     *units

	order    *pages.Order // of local pages
	pivots   int
	zeroFrom pages.Index

	faults   map[pages.Index]fault // by the first page of the host page
	demand   fifo[pages.Index]     // host pages that a guest waits for and that can be sent
	wants    []pages.Index         // pages to ask the source for
	express  fifo[*parcel]         // parcels that hold a page a guest waits for
	passing  fifo[*parcel]         // the other parcels
	demanded fifo[*reply]          // answers that hold a page a guest waits for
	arrived  fifo[*reply]          // the other answers

	committed bool

	was [512]pages.Holder // scratch of apply
	ver [512]pages.Version
}

// shelf is what one intermediary holds.
type shelf struct {
	ready  *pages.Bitmap
	order  *pages.Order
	urgent fifo[wire.PageRef] // demand reads to send; their pages are requested
	freed  runs               // placed pages that it may forget
}

// fault is a host page that a guest waits for.
type fault struct {
	at     time.Time
	wanted bool // asked of the source
	hedged bool // asked for a second time: see hedge
}

// maxFaults bounds the faults kept; a guest has at most one for each of its threads.
// A request beyond it is dropped, and its page comes by prepaging.
const maxFaults = 64 << 10

func newBook(l *pages.Layout, where *pages.Map, pivots int) *book {
	n := l.Pages()
	b := &book{
		layout: l, where: where, pivots: pivots,
		sent: pages.NewBitmap(n), busy: pages.NewBitmap(n), requested: pages.NewBitmap(n), aside: pages.NewBitmap(n),
		local: pages.NewBitmap(n), zero: pages.NewBitmap(n),
		order:  pages.NewOrder(l, pivots),
		faults: make(map[pages.Index]fault),
	}
	b.units = newUnits(b)
	return b
}

// addShelf adds the next intermediary of the table.
func (b *book) addShelf() {
	b.shelves = append(b.shelves, &shelf{
		ready: pages.NewBitmap(b.layout.Pages()), order: pages.NewOrder(b.layout, b.pivots),
	})
}

// apply takes a record of the source.
func (b *book) apply(r pages.Record) error {
	if k, ok := r.Holder.Intermediary(); ok && k >= len(b.shelves) {
		return fmt.Errorf("record of page %d names intermediary %d of a table of %d: %w",
			r.First, k, len(b.shelves), pages.ErrHolder)
	}
	total := b.layout.Pages()
	if uint64(r.First) >= total || uint64(r.Count) > total-uint64(r.First) || r.Count == 0 {
		_, err := b.where.Apply(r) // refuses it in its own words
		return err
	}
	for r.Count > 0 {
		part := r
		part.Count = min(r.Count, uint32(len(b.was)))
		if err := b.applyPart(part); err != nil {
			return err
		}
		r.First += pages.Index(part.Count)
		r.Count -= part.Count
	}
	return nil
}

func (b *book) applyPart(r pages.Record) error {
	for k := range r.Count {
		b.was[k], b.ver[k] = b.where.At(r.First + pages.Index(k))
	}
	if _, err := b.where.Apply(r); err != nil {
		return err
	}
	for k := range r.Count {
		i := r.First + pages.Index(k)
		h, v := b.where.At(i)
		if h == b.was[k] && v == b.ver[k] {
			continue
		}
		if b.sent.Test(i) {
			if v == b.ver[k] {
				continue // it went past the store, and is known elsewhere, too
			}
			return fmt.Errorf("page %d, version %d after %d: %w", i, v, b.ver[k], errStale)
		}
		b.moved(i, b.was[k], h)
	}
	return nil
}

// stored notes that version v of page i lies in the store now. fresh is false when
// the page is outdated or was known already.
func (b *book) stored(i pages.Index, v pages.Version) (fresh bool, err error) {
	old, _ := b.where.At(i)
	fresh, err = b.where.Store(i, v)
	if !fresh || err != nil {
		return false, err
	}
	if b.sent.Test(i) {
		return false, fmt.Errorf("page %d, version %d: %w", i, v, errStale)
	}
	b.moved(i, old, pages.Local)
	return true, nil
}

// wantsVersion tells whether version v of page i, if it arrived, would be taken.
func (b *book) wantsVersion(i pages.Index, v pages.Version) bool {
	h, have := b.where.At(i)
	return v > have || v == have && h == pages.Absent
}

// moved puts an unsent page that the map said to be at old where it is now.
func (b *book) moved(i pages.Index, old, now pages.Holder) {
	if b.units.has(i) {
		b.units.moved(i, old, now)
	} else {
		b.remove(i, old)
		b.put(i, now)
	}
	if len(b.faults) > 0 {
		first, n := b.layout.Unit(i)
		if _, ok := b.faults[first]; ok {
			b.route(first, n)
		}
	}
}

func (b *book) remove(i pages.Index, h pages.Holder) {
	switch h {
	case pages.Local:
		b.local.Clear(i)
	case pages.Zero:
		b.zero.Clear(i)
	default:
		if k, ok := h.Intermediary(); ok {
			b.shelves[k].ready.Clear(i)
		}
	}
}

// put files an unsent page of a block with small host pages.
func (b *book) put(i pages.Index, h pages.Holder) {
	if b.busy.Test(i) {
		return // settle files it
	}
	switch h {
	case pages.Local:
		b.local.Set(i)
	case pages.Zero:
		b.zero.Set(i)
	default:
		if k, ok := h.Intermediary(); ok && !b.requested.Test(i) && !b.aside.Test(i) {
			b.shelves[k].ready.Set(i)
		}
	}
}

// refile files an unsent page that is no longer requested or set aside.
func (b *book) refile(i pages.Index) {
	if b.sent.Test(i) {
		return
	}
	h, _ := b.where.At(i)
	if len(b.faults) > 0 {
		first, n := b.layout.Unit(i)
		if _, ok := b.faults[first]; ok {
			b.route(first, n)
			return
		}
	}
	if b.units.has(i) {
		b.units.put(i, h)
		return
	}
	b.put(i, h)
}

// returned takes pages back that were asked of an intermediary in vain: its
// connection broke.
func (b *book) returned(refs []wire.PageRef) {
	for _, r := range refs {
		b.requested.Clear(r.Index)
		b.refile(r.Index)
	}
}

// setAside keeps a page from being asked for until the next retry.
func (b *book) setAside(i pages.Index) {
	b.requested.Clear(i)
	if !b.sent.Test(i) {
		b.unready(i)
		b.aside.Set(i)
	}
}

// unready takes a page off its shelf. It can be there although an answer with it has
// come, when it had been asked for twice.
func (b *book) unready(i pages.Index) {
	h, _ := b.where.At(i)
	if k, ok := h.Intermediary(); ok {
		b.shelves[k].ready.Clear(i)
	}
}

// retry files all pages set aside once more and returns how many they were.
func (b *book) retry() uint64 {
	n := b.aside.Count()
	for i, ok := b.aside.NextSet(0); ok; i, ok = b.aside.NextSet(i + 1) {
		b.aside.Clear(i)
		b.refile(i)
	}
	return n
}

// placed notes that QEMU has these pages; it returns whether they were in the store.
func (b *book) placed(i pages.Index) (stored bool) {
	h, _ := b.where.At(i)
	if h == pages.Placed {
		return false
	}
	b.where.Place(i)
	if k, ok := h.Intermediary(); ok {
		b.shelves[k].freed.add(i)
	}
	return h == pages.Local || b.units.forget(i)
}

// commit checks the source's count against the map. Afterwards a page that is Absent
// is a page of zeros.
func (b *book) commit(claimed uint64) error {
	c := b.where.Counts()
	if known := b.layout.Pages() - c.Absent; known != claimed {
		return fmt.Errorf("the source committed %d pages and the map has %d of %d (%d zero, %d direct, %d at intermediaries, %d placed): %d too %s",
			claimed, known, b.layout.Pages(), c.Zero, c.Local, c.Remote, c.Placed, max(known, claimed)-min(known, claimed), lessOrMore(known, claimed))
	}
	b.setCommitted()
	return nil
}

func lessOrMore(known, claimed uint64) string {
	if known < claimed {
		return "few"
	}
	return "many"
}

func (b *book) setCommitted() {
	if b.committed {
		return
	}
	b.committed = true
	b.units.reviewAll()
	for first := range b.faults {
		_, n := b.layout.Unit(first)
		b.route(first, n)
	}
}

// finished tells whether QEMU was sent every page it needs.
func (b *book) finished() bool {
	if !b.committed || len(b.faults) > 0 || b.units.left() > 0 ||
		b.local.Count()+b.zero.Count()+b.requested.Count()+b.aside.Count()+b.busy.Count() > 0 {
		return false
	}
	for _, s := range b.shelves {
		if s.ready.Count() > 0 {
			return false
		}
	}
	return true
}

// rebuild makes the book agree with the pages that QEMU says it has, after its stream
// broke or this process began. Answers that wait stay: they are checked again when
// they are written. Faults are forgotten, QEMU repeats them.
func (b *book) rebuild(has *pages.Bitmap) error {
	b.sent = has
	clear(b.faults)
	b.demand.clear()
	b.wants = b.wants[:0]
	n := b.layout.Pages()
	b.local, b.zero = pages.NewBitmap(n), pages.NewBitmap(n)
	for _, s := range b.shelves {
		s.ready = pages.NewBitmap(n)
		for s.urgent.len() > 0 {
			b.requested.Clear(s.urgent.pop().Index)
		}
	}
	b.units.reset()
	for i := pages.Index(0); uint64(i) < n; i++ {
		h, _ := b.where.At(i)
		if has.Test(i) {
			continue
		}
		if h == pages.Placed {
			block, offset := b.layout.Locate(i)
			return fmt.Errorf("QEMU had placed offset %#x of block %q and says now that it has not", offset, b.layout.Blocks()[block].Name)
		}
		if b.units.has(i) {
			b.units.count(i, h)
			continue
		}
		b.put(i, h)
	}
	b.units.reviewAll()
	return nil
}
