// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"testing"

	"pgregory.net/rapid"
)

// Every page that is ready, at once or later, comes exactly once, in runs that are
// ready, short enough and inside one block.
func TestOrderFindsEachPageOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := genLayout(t)
		n := l.Pages()
		o := NewOrder(l, rapid.IntRange(0, 3).Draw(t, "pivots"))
		ready, taken := NewBitmap(n), NewBitmap(n)
		most := rapid.IntRange(1, 70).Draw(t, "most")
		grow := func() {
			first := rapid.Uint64Range(0, n-1).Draw(t, "first")
			run := rapid.Uint64Range(1, n-first).Draw(t, "run")
			for i := Index(first); i < Index(first+run); i++ {
				if !taken.Test(i) {
					ready.Set(i)
				}
			}
		}
		take := func() bool {
			had := ready.Count()
			first, k, ok := o.Next(ready, most)
			if ok != (had > 0) {
				t.Fatalf("%d pages are ready, ok %v", had, ok)
			}
			if !ok {
				return false
			}
			end := first + Index(k-1)
			b0, _ := l.Locate(first)
			b1, _ := l.Locate(end)
			if k < 1 || k > most || b0 < 0 || b0 != b1 {
				t.Fatalf("run of %d from %d, at most %d, in blocks %d and %d", k, first, most, b0, b1)
			}
			for i := first; i <= end; i++ {
				if !ready.Test(i) {
					t.Fatalf("page %d of run %d+%d is not ready", i, first, k)
				}
			}
			ready.ClearRange(first, uint64(k))
			taken.SetRange(first, uint64(k))
			return true
		}
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			switch rapid.IntRange(0, 3).Draw(t, "op") {
			case 0:
				grow()
			case 1:
				o.Fault(Index(rapid.Uint64Range(0, n+2).Draw(t, "fault")))
			default:
				take()
			}
		}
		ready.SetRange(0, n)
		for i, ok := taken.NextSet(0); ok; i, ok = taken.NextSet(i + 1) {
			ready.Clear(i)
		}
		for take() {
		}
		if taken.Count() != n {
			t.Fatalf("%d of %d pages came", taken.Count(), n)
		}
	})
}

// The nearest pages above and below the newest fault come next, whatever was taken
// before. The sweep may have a turn between.
func TestOrderGrowsAroundTheNewestFault(t *testing.T) {
	const n, run = 100000, 16
	l := flat(t, n)
	rapid.Check(t, func(t *rapid.T) {
		o, ready := NewOrder(l, 0), NewBitmap(n)
		ready.SetRange(0, n)
		take := func() (first, last Index) {
			first, k, _ := o.Next(ready, run)
			ready.ClearRange(first, uint64(k))
			return first, first + Index(k-1)
		}
		for range rapid.IntRange(0, 30).Draw(t, "earlier") {
			o.Fault(Index(rapid.IntRange(0, n-1).Draw(t, "fault")))
			take()
		}
		pivot := Index(rapid.IntRange(5000, n-5000).Draw(t, "pivot"))
		o.Fault(pivot)
		for range 5 {
			up, _ := ready.NextSet(pivot)
			down, _ := ready.PrevSet(pivot - 1)
			if first, last := take(); first != up && last != down {
				if first, last = take(); first != up && last != down {
					t.Fatalf("after a fault at %d came %d to %d, want from %d or to %d", pivot, first, last, up, down)
				}
			}
			o.Fault(pivot)
		}
	})
}

// With one pivot and all pages ready, those near it come in the order of distance,
// the upper and the lower side in turn.
func TestOrderAlternates(t *testing.T) {
	o, ready := NewOrder(flat(t, 100000), 1), NewBitmap(100000)
	ready.SetRange(0, 100000)
	o.Fault(50000)
	for _, want := range []Index{50000, 49992, 0, 50008, 49984, 8, 50016, 49976, 16} {
		first, k, ok := o.Next(ready, 8)
		if first != want || k != 8 || !ok {
			t.Fatalf("got %d+%d %v, want %d+8", first, k, ok, want)
		}
		ready.ClearRange(first, 8)
	}
}

// A page that becomes ready behind an edge comes with the pivot's next turn.
func TestOrderLooksBehindItsEdges(t *testing.T) {
	const n = 10000
	o, ready := NewOrder(flat(t, n), 0), NewBitmap(n)
	ready.SetRange(0, n)
	ready.ClearRange(5010, 10)
	o.Fault(5000)
	for range 40 {
		first, k, _ := o.Next(ready, 16)
		ready.ClearRange(first, uint64(k))
	}
	ready.SetRange(5010, 10)
	for range 3 { // up, down and the sweep
		first, k, _ := o.Next(ready, 16)
		if first == 5010 && k == 10 {
			return
		}
		ready.ClearRange(first, uint64(k))
	}
	t.Error("pages behind the upward edge did not come")
}

// Faults before each turn must not starve the rest of memory.
func TestOrderNeverStarvesTheSweep(t *testing.T) {
	const n, run, busy = 1 << 20, 64, 1 << 19
	o, ready := NewOrder(flat(t, n), 0), NewBitmap(n)
	ready.SetRange(0, n)
	turns := 0
	for ; ready.Test(0) || ready.Test(run*50-1); turns++ {
		o.Fault(Index(busy + turns*7919%busy))
		first, k, ok := o.Next(ready, run)
		if !ok || turns > 10000 {
			t.Fatalf("page %d is waiting after %d turns", run*50-1, turns)
		}
		ready.ClearRange(first, uint64(k))
	}
	if most := 50 * (2*DefaultPivots + 1); turns > most {
		t.Errorf("the sweep took %d turns for 50 runs, want at most %d", turns, most)
	}
}

// A walk through memory must not push out the pivots elsewhere.
func TestOrderMergesNearFaults(t *testing.T) {
	o := NewOrder(flat(t, 1<<20), 3)
	for _, i := range []Index{900000, 500000} {
		o.Fault(i)
	}
	for i := Index(1000); i < 3000; i += 100 {
		o.Fault(i)
	}
	if got := o.pivots; len(got) != 3 || got[0] != 2900 || got[1] != 500000 || got[2] != 900000 {
		t.Fatalf("pivots %v", got)
	}
	o.Fault(300000)
	o.Fault(2950)
	if got := o.pivots; len(got) != 3 || got[0] != 2950 || got[1] != 300000 || got[2] != 500000 {
		t.Fatalf("pivots %v", got)
	}
}

// The point of it all: a guest with several walkers finds most pages already there.
func TestOrderSavesFaults(t *testing.T) {
	const n, walkers = 1 << 18, 5
	l := flat(t, n)
	faults := func(tell bool) (faults int) {
		o, ready := NewOrder(l, 0), NewBitmap(n)
		ready.SetRange(0, n)
		for step := 0; ready.Count() > 0; step++ {
			// Each walker goes 40 pages a step, every other one downwards.
			for w := range walkers {
				for k := range 40 {
					way := Index(step*40 + k)
					i := Index(w)*(n/walkers) + way
					if w%2 == 1 {
						i = Index(w+1)*(n/walkers) - way
					}
					if i %= n; ready.Test(i) {
						faults++
						ready.Clear(i)
						if tell {
							o.Fault(i)
						}
					}
				}
			}
			for range 15 {
				first, k, _ := o.Next(ready, 32)
				ready.ClearRange(first, uint64(k))
			}
		}
		return faults
	}
	plain, bubbling := faults(false), faults(true)
	t.Logf("faults: %d with the sweep alone, %d with bubbling", plain, bubbling)
	if bubbling*5 > plain {
		t.Errorf("bubbling took %d faults, the sweep alone %d", bubbling, plain)
	}
}
