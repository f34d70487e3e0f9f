// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"errors"
	"testing"

	"pgregory.net/rapid"
)

// bitModel is the naive twin of a Bitmap.
type bitModel []bool

func (m bitModel) next(from int, want bool) (Index, bool) {
	for i := from; i < len(m); i++ {
		if m[i] == want {
			return Index(i), true
		}
	}
	return 0, false
}

func (m bitModel) prev(from int, want bool) (Index, bool) {
	for i := min(from, len(m)-1); i >= 0; i-- {
		if m[i] == want {
			return Index(i), true
		}
	}
	return 0, false
}

func (m bitModel) check(t *rapid.T, b *Bitmap, from int) {
	type answer struct {
		i  Index
		ok bool
	}
	ask := func(name string, gi Index, gok bool, wi Index, wok bool) {
		if (answer{gi, gok}) != (answer{wi, wok}) {
			t.Fatalf("%s(%d) of %d: got %d %v, want %d %v", name, from, len(m), gi, gok, wi, wok)
		}
	}
	i, ok := b.NextSet(Index(from))
	wi, wok := m.next(from, true)
	ask("NextSet", i, ok, wi, wok)
	i, ok = b.NextClear(Index(from))
	wi, wok = m.next(from, false)
	ask("NextClear", i, ok, wi, wok)
	i, ok = b.PrevSet(Index(from))
	wi, wok = m.prev(from, true)
	ask("PrevSet", i, ok, wi, wok)
	i, ok = b.PrevClear(Index(from))
	wi, wok = m.prev(from, false)
	ask("PrevClear", i, ok, wi, wok)
	if got, want := b.Test(Index(from)), from < len(m) && m[from]; got != want {
		t.Fatalf("Test(%d): %v, want %v", from, got, want)
	}
}

func TestBitmapAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		// Past 4096 words the summaries have a third level.
		n := rapid.OneOf(rapid.IntRange(0, 200), rapid.IntRange(4000, 4200),
			rapid.IntRange(262100, 262300)).Draw(t, "n")
		b, m := NewBitmap(uint64(n)), make(bitModel, n)
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			first := rapid.IntRange(0, n).Draw(t, "first")
			run := rapid.IntRange(0, n-first).Draw(t, "run")
			switch op := rapid.IntRange(0, 3).Draw(t, "op"); {
			case op < 2:
				if op == 0 {
					b.SetRange(Index(first), uint64(run))
				} else {
					b.ClearRange(Index(first), uint64(run))
				}
				for k := range run {
					m[first+k] = op == 0
				}
			case first < n && op == 2:
				b.Set(Index(first))
				m[first] = true
			case first < n:
				b.Clear(Index(first))
				m[first] = false
			}
			count := uint64(0)
			for _, set := range m {
				if set {
					count++
				}
			}
			if b.Count() != count {
				t.Fatalf("count %d, want %d", b.Count(), count)
			}
			for range 3 {
				m.check(t, b, rapid.IntRange(0, n+70).Draw(t, "from"))
			}
			m.check(t, b, first)
			m.check(t, b, first+run)
		}
	})
}

func TestBitmapLittleEndian(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Uint64Range(1, 500).Draw(t, "n")
		first := rapid.Uint64Range(0, n).Draw(t, "first")
		run := rapid.Uint64Range(0, n-first).Draw(t, "run")
		size := int((run + 63) / 64 * 8)
		data := rapid.SliceOfN(rapid.Byte(), size, size).Draw(t, "data")
		full := rapid.Bool().Draw(t, "full")
		b := NewBitmap(n)
		if full {
			b.SetRange(0, n)
		}
		if err := b.LoadLittleEndian(Index(first), run, data); err != nil {
			t.Fatal(err)
		}
		count := uint64(0)
		for i := range n {
			want := full
			if k := i - first; i >= first && k < run {
				want = data[k/8]>>(k%8)&1 != 0
			}
			if want {
				count++
			}
			if b.Test(Index(i)) != want {
				t.Fatalf("page %d: %v, want %v", i, !want, want)
			}
		}
		if b.Count() != count {
			t.Fatalf("count %d, want %d", b.Count(), count)
		}
		if run%64 != 0 { // what follows the last page is ignored, and written as 0
			for k := run; k < uint64(size)*8; k++ {
				data[k/8] &^= 1 << (k % 8)
			}
		}
		if got := b.AppendLittleEndian(nil, Index(first), run); string(got) != string(data) {
			t.Fatalf("got % x, want % x", got, data)
		}
	})
}

func TestBitmapLoadRefuses(t *testing.T) {
	b := NewBitmap(100)
	if err := b.LoadLittleEndian(90, 11, make([]byte, 8)); !errors.Is(err, ErrRange) {
		t.Errorf("past the end: %v", err)
	}
	if err := b.LoadLittleEndian(^Index(0), 2, make([]byte, 8)); !errors.Is(err, ErrRange) {
		t.Errorf("far past the end: %v", err)
	}
	for _, size := range []int{0, 9, 13, 24} {
		if err := b.LoadLittleEndian(0, 100, make([]byte, size)); err == nil {
			t.Errorf("took %d bytes for 100 pages", size)
		}
	}
	if b.Count() != 0 {
		t.Error("a refused bitmap was taken in part")
	}
}

func TestBitmapPanicsPastTheEnd(t *testing.T) {
	b := NewBitmap(100)
	for name, f := range map[string]func(){
		"Set":        func() { b.Set(100) },
		"Clear":      func() { b.Clear(1 << 63) },
		"SetRange":   func() { b.SetRange(99, 2) },
		"ClearRange": func() { b.ClearRange(0, 101) },
		"Append":     func() { b.AppendLittleEndian(nil, 50, 51) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s took a page past the end", name)
				}
			}()
			f()
		}()
	}
}
