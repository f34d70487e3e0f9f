// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"errors"
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// letter is a statement on its way from the source to the destination.
type letter struct {
	i Index
	h Holder
	v Version
}

// exchange drives a ledger and collects what the destination must be told.
type exchange struct {
	ledger  *Ledger
	letters []letter
	newest  map[Index]cell    // what the map must say in the end
	nonces  map[[2]uint64]int // data sealed under each page and version
}

func (x *exchange) data(t *rapid.T, i Index, v Version) {
	h := rapid.SampledFrom([]Holder{Zero, Local, FirstHolder, FirstHolder + 1}).Draw(t, "holder")
	x.letters = append(x.letters, letter{i, h, v})
	x.newest[i] = cell{h, v}
	if x.nonces[[2]uint64{uint64(i), uint64(v)}]++; x.nonces[[2]uint64{uint64(i), uint64(v)}] > 1 {
		t.Fatalf("version %d of page %d was given out twice", v, i)
	}
}

func (x *exchange) discard(t *rapid.T, first Index, n uint64) {
	err := x.ledger.Discard(first, n, func(r Record) {
		if r.Holder != Absent || r.Count == 0 || r.First < first || r.First+Index(r.Count) > first+Index(n) {
			t.Fatalf("discard of %d from %d emits %+v", n, first, r)
		}
		for k := range Index(r.Count) {
			i := r.First + k
			if c, ok := x.newest[i]; !ok || c.Holder == Absent || r.Version != c.Version+1 {
				t.Fatalf("discard record %+v of page %d, which is %+v", r, i, c)
			}
			x.letters = append(x.letters, letter{i, Absent, r.Version})
			x.newest[i] = cell{Absent, r.Version}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	for i := first; i < first+Index(n); i++ {
		if c, ok := x.newest[i]; ok && c.Holder != Absent {
			t.Fatalf("page %d is %+v after its discard", i, c)
		}
	}
}

// Whatever order the statements of a whole migration arrive in, and some of them
// twice, the destination's map ends as the source's ledger has it.
func TestLedgerAndMapAgree(t *testing.T) {
	l := flat(t, spanning)
	rapid.Check(t, func(t *rapid.T) {
		x := &exchange{ledger: NewLedger(l), newest: map[Index]cell{}, nonces: map[[2]uint64]int{}}
		for range rapid.IntRange(0, 60).Draw(t, "before the switch") {
			i := genPage(t)
			if rapid.IntRange(0, 3).Draw(t, "op") == 0 {
				x.discard(t, i, min(uint64(spanning-i), 30))
				continue
			}
			v, err := x.ledger.Precopy(i)
			if err != nil {
				t.Fatal(err)
			}
			x.data(t, i, v)
		}
		for range rapid.IntRange(0, 40).Draw(t, "after the switch") {
			i := genPage(t)
			c, ok := x.newest[i]
			v, fresh := x.ledger.Postcopy(i)
			if sent := ok && c.Holder != Absent; fresh == sent {
				t.Fatalf("page %d is %+v %v, fresh %v", i, c, ok, fresh)
			}
			if fresh {
				x.data(t, i, v)
			}
		}
		x.arrive(t, l)
	})
}

// arrive delivers the letters in any order and compares.
func (x *exchange) arrive(t *rapid.T, l *Layout) {
	m := NewMap(l)
	if len(x.letters) > 0 {
		x.letters = append(x.letters, x.letters[rapid.IntRange(0, len(x.letters)-1).Draw(t, "twice")])
		x.letters = rapid.Permutation(x.letters).Draw(t, "arrival")
	}
	for _, e := range x.letters {
		var err error
		if e.h == Local {
			_, err = m.Store(e.i, e.v)
		} else {
			_, err = m.Apply(Record{First: e.i, Count: 1, Holder: e.h, Version: e.v})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var sent uint64
	for i, want := range x.newest {
		if h, v := m.At(i); (cell{h, v}) != want {
			t.Fatalf("page %d: %s in %d, want %+v", i, h, v, want)
		}
		if want.Holder != Absent {
			sent++
		}
		if got := x.ledger.Current(i, want.Version); got != (want.Holder != Absent) {
			t.Fatalf("page %d is %+v, current %v", i, want, got)
		}
		if want.Version > 0 && x.ledger.Current(i, want.Version-1) {
			t.Fatalf("page %d is %+v, but the version before is current", i, want)
		}
	}
	if x.ledger.Sent() != sent || m.Counts().Absent != l.Pages()-sent {
		t.Fatalf("ledger claims %d, map lacks %d of %d; sent %d", x.ledger.Sent(), m.Counts().Absent, l.Pages(), sent)
	}
}

func TestLedgerJoinsDiscards(t *testing.T) {
	g := NewLedger(flat(t, 100))
	for _, i := range []Index{10, 11, 12, 12, 13, 20, 99} {
		if _, err := g.Precopy(i); err != nil {
			t.Fatal(err)
		}
	}
	var got []Record
	for range 2 { // the second time there is nothing to tell
		if err := g.Discard(0, 100, func(r Record) { got = append(got, r) }); err != nil {
			t.Fatal(err)
		}
	}
	want := []Record{{10, 2, Absent, 1}, {12, 1, Absent, 2}, {13, 1, Absent, 1}, {20, 1, Absent, 1}, {99, 1, Absent, 1}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if i, ok := g.NextUnsent(11); !ok || i != 11 || g.Sent() != 0 {
		t.Errorf("next unsent %d %v, sent %d", i, ok, g.Sent())
	}
}

func TestLedgerRunsOutOfVersions(t *testing.T) {
	g := NewLedger(flat(t, 4))
	for want := range Version(math.MaxUint16) {
		if v, err := g.Precopy(2); err != nil || v != want {
			t.Fatalf("version %d, %v; want %d", v, err, want)
		}
	}
	if v, err := g.Precopy(2); !errors.Is(err, ErrVersions) {
		t.Fatalf("version %d, %v; want none left", v, err)
	}
	var got []Record
	if err := g.Discard(0, 4, func(r Record) { got = append(got, r) }); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Record{{2, 1, Absent, math.MaxUint16}}, got); diff != "" {
		t.Fatal(diff)
	}
	if _, err := g.Precopy(2); !errors.Is(err, ErrVersions) {
		t.Fatalf("before the switch: %v", err)
	}
	if v, fresh := g.Postcopy(2); !fresh || v != math.MaxUint16 {
		t.Fatalf("after the switch: version %d, fresh %v", v, fresh)
	}
	if err := g.Discard(2, 1, func(r Record) { t.Errorf("emitted %+v", r) }); !errors.Is(err, ErrVersions) {
		t.Fatalf("discard of the last version: %v", err)
	}
	if v, err := g.Precopy(2); !errors.Is(err, ErrVersions) {
		t.Fatalf("version %d, %v; want none after the last one", v, err)
	}
}

func TestLedgerOutside(t *testing.T) {
	g := NewLedger(flat(t, 10))
	if _, err := g.Precopy(10); !errors.Is(err, ErrRange) {
		t.Errorf("precopy: %v", err)
	}
	if _, fresh := g.Postcopy(10); fresh {
		t.Error("postcopy took a page past the end")
	}
	if err := g.Discard(9, 2, nil); !errors.Is(err, ErrRange) {
		t.Errorf("discard: %v", err)
	}
	if err := g.Discard(^Index(0), 2, nil); !errors.Is(err, ErrRange) {
		t.Errorf("discard far outside: %v", err)
	}
	if g.Current(1<<40, 0) || g.Sent() != 0 {
		t.Error("a page past the end is current")
	}
}
