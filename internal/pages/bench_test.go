// SPDX-License-Identifier: Apache-2.0

package pages

import "testing"

// tebi is the number of pages of a VM of 1 TiB.
const tebi = 1 << 28

// hot returns the operations that happen per page or per batch, each on its own
// state, as functions of the number of the call.
func hot(t testing.TB, n uint64) map[string]func(k uint64) {
	l := flat(t, n)
	runs, singles, file := NewMap(l), NewMap(l), mustOpen(t, l, memfd(t))
	t.Cleanup(func() { file.Close() })
	newer := NewMap(l)
	before, after := NewLedger(l), NewLedger(l)
	ready, order := NewBitmap(n), NewOrder(l, 0)
	ready.SetRange(0, n)
	for k := range Index(DefaultPivots) {
		order.Fault(k * Index(n) / DefaultPivots)
	}
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	apply := func(m *Map, k uint64, v Version) {
		_, err := m.Apply(Record{First: Index(k * 64 % n), Count: 64, Holder: FirstHolder, Version: v})
		check(err)
	}
	store := func(m *Map, k uint64, v Version) {
		_, err := m.Store(Index(k%n), v)
		check(err)
	}
	precopy := func(k uint64) {
		_, err := before.Precopy(Index(k % n))
		check(err)
	}
	// Chunks of versions are made once per 128 MiB of RAM, which is not per page.
	for i := uint64(0); i < n; i += chunkPages {
		store(newer, i, 1)
		precopy(i)
		precopy(i)
	}
	return map[string]func(k uint64){
		"MapApply64":      func(k uint64) { apply(runs, k, 0) },
		"MapApply64Newer": func(k uint64) { apply(newer, k, Version(2+k*64/n)) },
		"MapApply64File":  func(k uint64) { apply(file, k, 0) },
		"MapStore":        func(k uint64) { store(singles, k, 0) },
		"MapStoreNewer":   func(k uint64) { store(newer, k, 2) },
		"MapPlace":        func(k uint64) { singles.Place(Index(k % n)) },
		"LedgerPrecopy":   precopy,
		"LedgerPostcopy":  func(k uint64) { after.Postcopy(Index(k % n)) },
		"OrderFault":      func(k uint64) { order.Fault(Index(k * 7919 % n)) },
		"OrderNext64": func(uint64) {
			first, k, ok := order.Next(ready, 64)
			if !ok {
				ready.SetRange(0, n)
				return
			}
			ready.ClearRange(first, uint64(k))
		},
	}
}

func TestHotPathAllocatesNothing(t *testing.T) {
	for name, do := range hot(t, 1<<20) {
		k := uint64(0)
		if allocs := testing.AllocsPerRun(1000, func() { do(k); k++ }); allocs != 0 {
			t.Errorf("%s: %v allocations a call", name, allocs)
		}
	}
}

func BenchmarkHotPath(b *testing.B) {
	for name, do := range hot(b, 1<<22) { // 16 GiB
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for k := uint64(0); b.Loop(); k++ {
				do(k)
			}
		})
	}
}

// BenchmarkOrderTebi is the worst case: a VM of 1 TiB of which single pages, far
// apart, are ready.
func BenchmarkOrderTebi(b *testing.B) {
	for name, gap := range map[string]Index{"Dense": 1, "Sparse": 1 << 22, "Few": 1 << 27} {
		b.Run(name, func(b *testing.B) {
			l := flat(b, tebi)
			o, ready := NewOrder(l, 0), NewBitmap(tebi)
			if gap == 1 {
				ready.SetRange(0, tebi)
			}
			for i := Index(0); gap > 1 && i < tebi; i += gap {
				ready.Set(i)
			}
			for k := range Index(DefaultPivots) {
				o.Fault(k*tebi/DefaultPivots + 1000)
			}
			b.ReportAllocs()
			for b.Loop() {
				first, k, _ := o.Next(ready, 64)
				if ready.ClearRange(first, uint64(k)); gap > 1 {
					ready.Set((first + 12345) % tebi) // ever elsewhere
				}
				if ready.Count() == 0 {
					ready.SetRange(0, tebi)
				}
			}
		})
	}
}

// BenchmarkMemory reports what a VM of 1 TiB costs.
func BenchmarkMemory(b *testing.B) {
	l := flat(b, tebi)
	report := func(name string, size func() uint64) {
		b.Run(name, func(b *testing.B) {
			var n uint64
			for b.Loop() {
				n = size()
			}
			b.ReportMetric(float64(n)/tebi, "bytes/page")
			b.ReportMetric(float64(n)/(1<<20), "MiB/TiB")
			b.ReportMetric(0, "ns/op")
		})
	}
	every := func(mark func(i Index)) {
		for i := Index(0); i < tebi; i += chunkPages {
			mark(i)
		}
	}
	report("Map", func() uint64 { return NewMap(l).MemoryBytes() })
	report("MapAllNewer", func() uint64 {
		m := NewMap(l)
		every(func(i Index) {
			if _, err := m.Store(i, 1); err != nil {
				b.Fatal(err)
			}
		})
		return m.MemoryBytes()
	})
	report("Ledger", func() uint64 { return NewLedger(l).MemoryBytes() })
	report("LedgerAllNewer", func() uint64 {
		g := NewLedger(l)
		every(func(i Index) { g.versions.put(i, 1) })
		return g.MemoryBytes()
	})
	report("Bitmap", func() uint64 { return NewBitmap(tebi).MemoryBytes() })
}

// BenchmarkOpenMap is what a restarted agent waits for: counting the pages again.
func BenchmarkOpenMap(b *testing.B) {
	l, f := flat(b, tebi), memfd(b)
	m := mustOpen(b, l, f)
	for i := Index(0); i < tebi; i += 4096 {
		if _, err := m.Apply(Record{i, 4000, FirstHolder + Holder(i/4096%9), 0}); err != nil {
			b.Fatal(err)
		}
	}
	if err := m.Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := mustOpen(b, l, f).Close(); err != nil {
			b.Fatal(err)
		}
	}
}
