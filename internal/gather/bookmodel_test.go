// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// hedge asks again for what prepaging does not bring.
func (m *bookModel) hedge(*rapid.T) { m.b.hedge(time.Time{}.Add(time.Hour)) }

// wantAgain is a source that came back: it is asked again.
func (m *bookModel) wantAgain(*rapid.T) {
	m.b.wantAgain()
	for _, i := range m.b.wants {
		if m.final[i] {
			m.t.Fatalf("the source is asked for page %d, which it has given", i)
		}
	}
}

// broken loses QEMU's stream with what was written last; QEMU tells what it has.
func (m *bookModel) broken(*rapid.T) {
	if !m.switched {
		return
	}
	lost := rapid.IntRange(0, len(m.flying)).Draw(m.t, "lost")
	for _, batch := range m.flying[lost:] {
		for _, r := range batch.runs {
			for i := r.First; i < r.First+pages.Index(r.Count); i++ {
				// Host pages are placed whole or not at all.
				first, n := m.l.Unit(i)
				m.placed.ClearRange(first, n)
			}
		}
	}
	for _, batch := range m.flying {
		if batch.parcel != nil {
			m.b.pass(batch.parcel)
		}
	}
	m.flying = nil
	has := pages.NewBitmap(m.l.Pages())
	for i, ok := m.placed.NextSet(0); ok; i, ok = m.placed.NextSet(i + 1) {
		has.Set(i)
	}
	if err := m.b.rebuild(has); err != nil {
		m.t.Fatal(err)
	}
	for i, ok := m.placed.NextSet(0); ok; i, ok = m.placed.NextSet(i + 1) {
		m.b.placed(i)
	}
}

func (m *bookModel) commit(*rapid.T) {
	if !m.switched {
		return
	}
	if m.b.busy.Count() > 0 {
		return // the source waits for these acknowledgements first
	}
	known := uint64(0)
	for _, f := range m.final {
		if f {
			known++
		}
	}
	// Pages that were given to the guest as zeros count as known, too, when the
	// question comes again.
	if m.b.committed {
		return
	}
	if m.b.commit(known+1) == nil {
		m.t.Fatal("a wrong count was committed")
	}
	if err := m.b.commit(known); err != nil {
		m.t.Fatal(err)
	}
}

// check is what always holds.
func (m *bookModel) check(t *rapid.T) {
	b := m.b
	for i := pages.Index(0); uint64(i) < m.l.Pages(); i++ {
		places := 0
		for _, in := range []*pages.Bitmap{b.local, b.zero, b.requested, b.aside, b.busy} {
			if in.Test(i) {
				places++
			}
		}
		for _, s := range b.shelves {
			if s.ready.Test(i) {
				places++
			}
		}
		// A page that was asked for twice may be sent while one answer is out.
		if places > 1 || places > 0 && b.sent.Test(i) && !b.requested.Test(i) && !b.busy.Test(i) {
			t.Fatalf("page %d is in %d places, sent: %v", i, places, b.sent.Test(i))
		}
	}
	if b.sent.Count() < m.placed.Count() {
		t.Fatal("QEMU has more pages than were sent")
	}
}

// settle lets everything come to its end.
func (m *bookModel) settle() {
	m.switched = true
	for m.b.busy.Count() > 0 {
		m.write(m.t)
		m.pong(m.t)
	}
	m.commit(m.t)
	for round := 0; !m.b.finished(); round++ {
		if round > 100000 {
			m.t.Fatal("it never ends")
		}
		m.b.retry()
		m.b.units.assemble()
		for k := range modelHolders {
			for _, urgent := range []bool{true, false} {
				r := &reply{holder: k, urgent: urgent}
				if urgent {
					r.refs = m.b.nextUrgent(k, wire.MaxBatch, nil)
				} else {
					r.refs = m.b.nextRead(k, wire.MaxBatch, nil)
				}
				m.reads = append(m.reads, r)
			}
		}
		for _, r := range m.reads {
			for _, ref := range r.refs {
				if m.b.units.has(ref.Index) {
					m.b.units.fetch(ref.Index)
				}
			}
			m.b.arrive(r)
		}
		m.reads = nil
		for {
			s, _, ok := m.b.next(16, true)
			if !ok {
				break
			}
			m.take(s)
		}
	}
	for i, final := range m.final {
		if final && !m.placed.Test(pages.Index(i)) {
			m.t.Fatalf("page %d was never written", i)
		}
	}
}

func (m *bookModel) take(s segment) {
	if s.kind == fromReply {
		for k, ref := range s.reply.refs {
			if s.mask>>k&1 == 1 {
				m.send(ref.Index, true)
				m.b.served(ref.Index, 1, time.Time{}, func(time.Duration) {})
			}
		}
		return
	}
	for i := s.first; i < s.first+pages.Index(s.n); i++ {
		m.send(i, true)
	}
	m.b.served(s.first, uint64(s.n), time.Time{}, func(time.Duration) {})
}

// TestBook checks that whatever happens, in whatever order, every page is written
// exactly once, in its newest version, and never before that is known.
func TestBook(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newBookModel(t)
		t.Repeat(map[string]func(*rapid.T){
			"announce": m.announce, "announce2": m.announce, "discard": m.discard, "stale": m.stale,
			"switch": m.hasSwitched, "fault": m.fault, "read": m.read, "read2": m.read, "answer": m.answer, "answer2": m.answer,
			"write": m.write, "write2": m.write, "pong": m.pong, "retry": m.retry, "hedge": m.hedge, "pass": m.pass, "again": m.wantAgain, "broken": m.broken, "commit": m.commit,
			"": m.check,
		})
		m.settle()
		m.check(t)
	})
}
