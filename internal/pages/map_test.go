// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// cell is one page of the naive twin of a Map.
type cell struct {
	Holder  Holder
	Version Version
}

type mapModel []cell

func (m mapModel) tell(i Index, h Holder, v Version) (took, tooLate bool) {
	c := &m[i]
	if v < c.Version || v == c.Version && (c.Holder != Absent || h == Absent) {
		return false, false
	}
	if c.Holder == Placed {
		return false, true
	}
	*c = cell{h, v}
	return true, false
}

func (m mapModel) counts() (c Counts) {
	for _, page := range m {
		c.ByHolder[page.Holder]++
		if page.Holder >= FirstHolder {
			c.Remote++
		}
	}
	c.Absent, c.Zero, c.Local, c.Placed = c.ByHolder[0], c.ByHolder[1], c.ByHolder[2], c.ByHolder[3]
	return c
}

// spanning is a number of pages that has a border between chunks of versions.
const spanning = chunkPages + 40

// genPage draws pages near both ends and near the border between chunks.
func genPage(t *rapid.T) Index {
	at := rapid.SampledFrom([]Index{0, chunkPages - 20, spanning - 20}).Draw(t, "area")
	return at + rapid.Custom(func(t *rapid.T) Index { return Index(rapid.IntRange(0, 19).Draw(t, "k")) }).Draw(t, "page")
}

func genHolder(t *rapid.T) Holder {
	return rapid.SampledFrom([]Holder{Absent, Zero, FirstHolder, FirstHolder + 3, FirstHolder + MaxHolders - 1}).Draw(t, "holder")
}

func (m mapModel) check(t *rapid.T, got *Map) {
	if diff := cmp.Diff(m.counts(), got.Counts()); diff != "" {
		t.Fatalf("counts (-want +got):\n%s", diff)
	}
	for i, want := range m {
		if h, v := got.At(Index(i)); (cell{h, v}) != want {
			t.Fatalf("page %d: %s in %d, want %s in %d", i, h, v, want.Holder, want.Version)
		}
	}
}

func TestMapAgainstModel(t *testing.T) {
	l := flat(t, spanning)
	rapid.Check(t, func(t *rapid.T) {
		got, want := NewMap(l), make(mapModel, spanning)
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			mapStep(t, got, want)
		}
		want.check(t, got)
	})
}

// mapStep does the same to a map and its model and compares the answers.
func mapStep(t *rapid.T, got *Map, want mapModel) {
	i := genPage(t)
	v := Version(rapid.IntRange(0, 3).Draw(t, "version"))
	switch rapid.IntRange(0, 4).Draw(t, "op") {
	case 0, 1:
		r := Record{First: i, Count: uint32(rapid.IntRange(1, 60).Draw(t, "count")), Holder: genHolder(t), Version: v}
		if uint64(r.First)+uint64(r.Count) > spanning {
			if n, err := got.Apply(r); n != 0 || !errors.Is(err, ErrRange) {
				t.Fatalf("%+v: %d, %v", r, n, err)
			}
			return
		}
		var applied uint64
		var tooLate bool
		for k := range Index(r.Count) {
			took, late := want.tell(i+k, r.Holder, v)
			if took {
				applied++
			}
			tooLate = tooLate || late
		}
		if n, err := got.Apply(r); n != applied || errors.Is(err, ErrPlaced) != tooLate || (err != nil) != tooLate {
			t.Fatalf("%+v: %d, %v; want %d, too late %v", r, n, err, applied, tooLate)
		}
	case 2, 3:
		took, tooLate := want.tell(i, Local, v)
		if fresh, err := got.Store(i, v); fresh != took || errors.Is(err, ErrPlaced) != tooLate || (err != nil) != tooLate {
			t.Fatalf("store of %d in %d: %v, %v; want %v, too late %v", i, v, fresh, err, took, tooLate)
		}
	case 4:
		got.Place(i)
		want[i].Holder = Placed
	}
}

// The statements about one page's versions may come in any order, as records, stores
// or discards: the newest wins.
func TestMapIsIndependentOfOrder(t *testing.T) {
	l := flat(t, 64)
	type word struct {
		h Holder
		v Version
	}
	rapid.Check(t, func(t *rapid.T) {
		// Each version has data once at most, and may have been announced by a discard.
		var words []word
		last := rapid.IntRange(0, 5).Draw(t, "versions")
		want := cell{}
		for v := range Version(last + 1) {
			kind := rapid.IntRange(1, 3).Draw(t, "kind")
			want = cell{Absent, v}
			if kind&1 != 0 {
				words = append(words, word{Absent, v})
			}
			if kind&2 != 0 {
				h := rapid.SampledFrom([]Holder{Zero, Local, FirstHolder + Holder(v)}).Draw(t, "holder")
				words = append(words, word{h, v})
				want.Holder = h
			}
		}
		words = append(words, words[rapid.IntRange(0, len(words)-1).Draw(t, "twice")])
		m := NewMap(l)
		for _, w := range rapid.Permutation(words).Draw(t, "order") {
			var err error
			if w.h == Local {
				_, err = m.Store(7, w.v)
			} else {
				_, err = m.Apply(Record{First: 7, Count: 1, Holder: w.h, Version: w.v})
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if h, v := m.At(7); (cell{h, v}) != want {
			t.Fatalf("got %s in %d, want %s in %d", h, v, want.Holder, want.Version)
		}
	})
}

func TestMapRefuses(t *testing.T) {
	m := NewMap(flat(t, 100))
	for _, c := range []struct {
		r    Record
		want error
	}{
		{Record{First: 0, Count: 0, Holder: Zero}, ErrRange},
		{Record{First: 100, Count: 1, Holder: Zero}, ErrRange},
		{Record{First: 99, Count: 2, Holder: Zero}, ErrRange},
		{Record{First: ^Index(0), Count: 2, Holder: Zero}, ErrRange},
		{Record{First: 1, Count: ^uint32(0), Holder: Zero}, ErrRange},
		{Record{First: 0, Count: 1, Holder: Local}, ErrHolder},
		{Record{First: 0, Count: 1, Holder: Placed}, ErrHolder},
		{Record{First: 0, Count: 1, Holder: 254}, ErrHolder},
		{Record{First: 0, Count: 1, Holder: 255, Version: 1}, ErrHolder},
	} {
		if n, err := m.Apply(c.r); n != 0 || !errors.Is(err, c.want) {
			t.Errorf("%+v: %d, %v; want %v", c.r, n, err, c.want)
		}
	}
	if fresh, err := m.Store(100, 0); fresh || !errors.Is(err, ErrRange) {
		t.Errorf("store past the end: %v, %v", fresh, err)
	}
	m.Place(100)
	if c := m.Counts(); c.Absent != 100 || m.versions.used != 0 {
		t.Errorf("refused statements left %+v, %d chunks", c, m.versions.used)
	}
	if h, v := m.At(1 << 60); h != Absent || v != 0 {
		t.Errorf("page past the end: %s in %d", h, v)
	}
}

func TestHolders(t *testing.T) {
	for k := range MaxHolders {
		h, ok := HolderOf(k)
		if back, is := h.Intermediary(); !ok || !is || back != k {
			t.Fatalf("intermediary %d: holder %d, back %d %v", k, h, back, is)
		}
	}
	for _, k := range []int{-1, MaxHolders} {
		if h, ok := HolderOf(k); ok {
			t.Errorf("intermediary %d has holder %d", k, h)
		}
	}
	for h, want := range map[Holder]string{
		Absent: "absent", Zero: "zero", Local: "local", Placed: "placed",
		FirstHolder + 9: "intermediary 9", 255: "holder 255",
	} {
		if h.String() != want {
			t.Errorf("%d: %q, want %q", uint8(h), h, want)
		}
	}
}
