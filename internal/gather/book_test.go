// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"time"

	"pgregory.net/rapid"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// bookModel drives a book as the engine does, with a source, intermediaries and a QEMU
// that do anything they may, and knows what must come out.
type bookModel struct {
	t *rapid.T
	b *book
	l *pages.Layout

	switched bool
	version  []pages.Version // newest announced
	final    []bool          // that version's data or zero is known to the book
	placed   *pages.Bitmap
	flying   []modelFlight // written, not answered
	inParcel map[pages.Index]bool
	reads    []*reply // under way
}

type modelFlight struct {
	runs   []wire.Run
	parcel *parcel
}

const modelHolders = 3

func newBookModel(t *rapid.T) *bookModel {
	l, err := pages.NewLayout([]pages.Block{
		{Name: "small", Length: 40 * pages.Size, PageSize: pages.Size},
		{Name: "large", Length: 64 * pages.Size, PageSize: 16 * pages.Size},
		{Name: "rom", Length: 3 * pages.Size, PageSize: pages.Size},
	})
	if err != nil {
		t.Fatal(err)
	}
	m := &bookModel{
		t: t, l: l, b: newBook(l, pages.NewMap(l), 0), placed: pages.NewBitmap(l.Pages()),
		version: make([]pages.Version, l.Pages()), final: make([]bool, l.Pages()), inParcel: map[pages.Index]bool{},
	}
	for range modelHolders {
		m.b.addShelf()
	}
	return m
}

func (m *bookModel) page() pages.Index {
	return pages.Index(rapid.Uint64Range(0, m.l.Pages()-1).Draw(m.t, "page"))
}

// announce gives a page its data, at any place, in the newest version.
func (m *bookModel) announce(*rapid.T) {
	i := m.page()
	if m.final[i] && m.switched || m.b.committed {
		return
	}
	if m.final[i] {
		m.version[i]++
	}
	h := pages.Holder(rapid.IntRange(1, int(pages.FirstHolder)+modelHolders-1).Draw(m.t, "holder"))
	if m.b.busy.Test(i) && (h == pages.Local || h == pages.Placed) {
		return // its lane waits
	}
	m.final[i] = true
	if h == pages.Local || h == pages.Placed {
		if fresh, err := m.b.stored(i, m.version[i]); err != nil || !fresh {
			m.t.Fatalf("page %d: stored: %v, %v", i, fresh, err)
		}
		return
	}
	if err := m.b.apply(pages.Record{First: i, Count: 1, Holder: h, Version: m.version[i]}); err != nil {
		m.t.Fatal(err)
	}
}

// discard makes a page absent, as before the switch.
func (m *bookModel) discard(*rapid.T) {
	i := m.page()
	if m.switched || !m.final[i] {
		return
	}
	m.version[i]++
	m.final[i] = false
	if err := m.b.apply(pages.Record{First: i, Count: 1, Holder: pages.Absent, Version: m.version[i]}); err != nil {
		m.t.Fatal(err)
	}
}

// stale repeats something old, which must change nothing.
func (m *bookModel) stale(*rapid.T) {
	i := m.page()
	if m.version[i] == 0 {
		return
	}
	if fresh, err := m.b.stored(i, m.version[i]-1); fresh || err != nil {
		m.t.Fatalf("page %d: a stale version was stored: %v, %v", i, fresh, err)
	}
}

func (m *bookModel) hasSwitched(*rapid.T) { m.switched = true }

func (m *bookModel) fault(*rapid.T) {
	if !m.switched {
		return
	}
	block, offset := m.l.Locate(m.page())
	size := m.l.Blocks()[block].PageSize
	m.b.fault(block, offset&^(size-1), size, time.Time{})
}

// read sends a Read to an intermediary.
func (m *bookModel) read(*rapid.T) {
	if !m.switched {
		return
	}
	m.b.units.assemble()
	k := rapid.IntRange(0, modelHolders-1).Draw(m.t, "holder")
	most := rapid.IntRange(1, 20).Draw(m.t, "pages")
	r := &reply{holder: k, urgent: rapid.Bool().Draw(m.t, "urgent")}
	if r.urgent {
		r.refs = m.b.nextUrgent(k, most, nil)
	} else {
		r.refs = m.b.nextRead(k, most, nil)
	}
	h, _ := pages.HolderOf(k)
	for _, ref := range r.refs {
		if at, v := m.b.where.At(ref.Index); at != h || v != ref.Version || v != m.version[ref.Index] {
			m.t.Fatalf("asked intermediary %d for page %d version %d, which is at %v in version %d", k, ref.Index, ref.Version, at, v)
		}
	}
	if len(r.refs) > 0 {
		m.reads = append(m.reads, r)
	}
}

// answer takes the answer to a Read, which may be short of pages, or the loss of its
// connection.
func (m *bookModel) answer(*rapid.T) {
	if len(m.reads) == 0 {
		return
	}
	k := rapid.IntRange(0, len(m.reads)-1).Draw(m.t, "read")
	r := m.reads[k]
	m.reads = append(m.reads[:k], m.reads[k+1:]...)
	if rapid.IntRange(0, 9).Draw(m.t, "lost") == 0 {
		m.b.returned(r.refs)
		return
	}
	for k, ref := range r.refs {
		if rapid.IntRange(0, 19).Draw(m.t, "missing") == 0 {
			r.missing |= 1 << k
			m.b.setAside(ref.Index)
		} else if m.b.units.has(ref.Index) {
			m.b.units.fetch(ref.Index)
		}
	}
	m.b.arrive(r)
}

// write takes what the writer would write next.
func (m *bookModel) write(*rapid.T) {
	if !m.switched {
		return
	}
	background := rapid.Bool().Draw(m.t, "background")
	s, demand, ok := m.b.next(rapid.IntRange(1, 16).Draw(m.t, "most"), background)
	if !ok {
		return
	}
	if !background && !demand {
		m.t.Fatal("background pages in spite of it")
	}
	var wrote runs
	if s.kind == fromParcel {
		for k, ref := range s.parcel.refs {
			if s.mask>>k&1 == 1 {
				m.send(ref.Index, true)
				wrote.add(ref.Index)
			}
		}
	} else if s.kind == fromReply {
		for k, ref := range s.reply.refs {
			if s.mask>>k&1 == 0 {
				continue
			}
			if rapid.IntRange(0, 19).Draw(m.t, "bad") == 0 {
				m.b.unclaim(ref.Index)
				continue
			}
			m.send(ref.Index, true)
			wrote.add(ref.Index)
		}
	} else {
		for i := s.first; i < s.first+pages.Index(s.n); i++ {
			h, _ := m.b.where.At(i)
			inStore := h == pages.Local || m.b.units.fetched(i)
			switch s.kind {
			case fromStore:
				m.send(i, inStore)
			case fromZero:
				m.send(i, h == pages.Zero || h == pages.Absent)
			case fromUnit:
				m.send(i, inStore || h == pages.Zero || h == pages.Absent)
			}
			wrote.add(i)
		}
	}
	for _, r := range wrote.list {
		m.b.served(r.First, uint64(r.Count), time.Time{}, func(time.Duration) {})
	}
	m.flying = append(m.flying, modelFlight{wrote.list, s.parcel})
}

// send is QEMU taking a page.
func (m *bookModel) send(i pages.Index, right bool) {
	if m.placed.Test(i) {
		m.t.Fatalf("page %d was written twice", i)
	}
	if !right {
		h, _ := m.b.where.At(i)
		m.t.Fatalf("page %d was written from the wrong place, it is at %v", i, h)
	}
	if !m.final[i] && !m.b.committed && !m.inParcel[i] {
		// Only as a part of a host page that was committed could that be right.
		m.t.Fatalf("page %d was written before its newest version was known", i)
	}
	m.placed.Set(i)
}

func (m *bookModel) pong(*rapid.T) {
	if len(m.flying) == 0 {
		return
	}
	for _, r := range m.flying[0].runs {
		for i := r.First; i < r.First+pages.Index(r.Count); i++ {
			m.b.placed(i)
		}
	}
	if p := m.flying[0].parcel; p != nil {
		m.passed(p)
	}
	m.flying = m.flying[1:]
}

func (m *bookModel) retry(*rapid.T) { m.b.retry() }

// pass brings pages past the store: they are busy until they are placed.
func (m *bookModel) pass(*rapid.T) {
	if !m.switched || m.b.committed {
		return
	}
	p := &parcel{}
	for range rapid.IntRange(1, 5).Draw(m.t, "pages") {
		i := m.page()
		if m.final[i] || m.b.busy.Test(i) || m.b.units.has(i) || !m.b.wantsVersion(i, m.version[i]) {
			continue
		}
		m.b.busy.Set(i)
		m.inParcel[i] = true
		p.refs = append(p.refs, wire.PageRef{Index: i, Version: m.version[i]})
	}
	if len(p.refs) > 0 {
		m.b.pass(p)
	}
}

// passed ends a parcel; the caller says whether QEMU has it.
func (m *bookModel) passed(p *parcel) {
	for _, ref := range p.refs {
		if !m.placed.Test(ref.Index) {
			m.t.Fatalf("page %d was acknowledged and is not placed", ref.Index)
		}
		m.b.settle(ref.Index)
		m.final[ref.Index] = true
	}
}
