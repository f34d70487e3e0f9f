// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// bareRun is a run of pages that share one sealed page.
func bareRun(n int) []Page {
	ps := make([]Page, n)
	sealed := make([]byte, wire.MaxSealed)
	for k := range ps {
		ps[k].Sealed = sealed
	}
	return ps
}

func number(ps []Page, first pages.Index) []Page {
	for k := range ps {
		ps[k].Index = first + pages.Index(k)
	}
	return ps
}

func TestPagePathDoesNotAllocate(t *testing.T) {
	p := open(t, config(shm(t)))
	w := reserve(t, p, 64<<20)
	r := attach(t, p, w.Session())
	ps := bareRun(wire.MaxBatch)
	puts := func(first, n pages.Index) {
		for at := first; at < first+n; at += wire.MaxBatch {
			if err := w.Put(number(ps, at)); err != nil {
				t.Fatal(err)
			}
		}
	}
	zero := func(what string, step func()) {
		t.Helper()
		if n := testing.AllocsPerRun(100, step); n != 0 {
			t.Errorf("%s allocates %v times", what, n)
		}
	}
	// Tables of the index double now and then, and keep their size while more than
	// an eighth of it is used.
	puts(0, 16_384)
	if _, err := r.Free(4096, 8192); err != nil {
		t.Fatal(err)
	}
	next := pages.Index(4096)
	zero("putting 64 new pages", func() { puts(next, 64); next += 64 })
	zero("putting 64 pages again", func() { puts(0, 64) })
	zero("putting newer versions of 64 pages", func() {
		for k := range ps {
			ps[k].Version++
		}
		puts(0, 64)
	})
	zero("getting 64 pages", func() {
		if err := r.Get(ps, getBuffer); err != nil {
			t.Fatal(err)
		}
		if ps[63].Sealed == nil {
			t.Fatal("a page is missing")
		}
	})
	ps = bareRun(1)
	zero("freeing a page and putting it again", func() {
		if _, err := r.Free(5000, 1); err != nil {
			t.Fatal(err)
		}
		puts(5000, 1)
	})
}

// pageCost reports what one page costs in elapsed and in processor time. The latter
// can be compared between runs on machines that do something else as well.
func pageCost(b *testing.B, pages int) (report func()) {
	before := cpuTime(b)
	return func() {
		n := float64(b.N * pages)
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/n, "ns/page")
		b.ReportMetric(float64((cpuTime(b)-before).Nanoseconds())/n, "cpu-ns/page")
	}
}

func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

const benchPages = 128 << 10 // 512 MiB

func benchPool(b *testing.B) (*Pool, *Writer, *Reader) {
	p := open(b, config(shm(b)))
	w := reserve(b, p, benchPages*pages.Size)
	return p, w, attach(b, p, w.Session())
}

// BenchmarkPut puts batches of new pages into memory that the node's kernel has to find
// for them, and gives it back now and then, which is not counted in elapsed time.
func BenchmarkPut(b *testing.B) {
	p, w, r := benchPool(b)
	ps := bareRun(wire.MaxBatch)
	b.SetBytes(wire.MaxBatch * pages.Size)
	var busy time.Duration
	at := 0
	for b.Loop() {
		if at == benchPages {
			b.StopTimer()
			if _, err := r.Free(0, benchPages); err != nil {
				b.Fatal(err)
			}
			at = 0
			b.StartTimer()
		}
		before := cpuTime(b)
		if err := w.Put(number(ps, pages.Index(at))); err != nil {
			b.Fatal(err)
		}
		busy += cpuTime(b) - before
		at += len(ps)
	}
	n := float64(b.N * len(ps))
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/n, "ns/page")
	b.ReportMetric(float64(busy.Nanoseconds())/n, "cpu-ns/page")
	if st := p.Stats(); st.Pages > 0 {
		b.ReportMetric(float64(st.Index)/float64(st.Pages), "index-B/page")
	}
}

func benchFill(b *testing.B, w *Writer) {
	ps := bareRun(wire.MaxBatch)
	for at := 0; at < benchPages; at += len(ps) {
		if err := w.Put(number(ps, pages.Index(at))); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkGet reads batches, and single pages as a stalled guest wants them.
func BenchmarkGet(b *testing.B) {
	_, w, r := benchPool(b)
	benchFill(b, w)
	for name, n := range map[string]int{"batch": wire.MaxBatch, "single": 1} {
		b.Run(name, func(b *testing.B) {
			ps := make([]Page, n)
			b.SetBytes(int64(n) * pages.Size)
			b.ReportAllocs()
			at, report := 0, pageCost(b, n)
			for b.Loop() {
				if err := r.Get(number(ps, pages.Index(at)), getBuffer); err != nil {
					b.Fatal(err)
				}
				at = (at + 64*77) % benchPages
			}
			report()
		})
	}
}

// BenchmarkFree frees runs of 64 pages.
func BenchmarkFree(b *testing.B) {
	_, w, r := benchPool(b)
	at := benchPages
	for b.Loop() {
		if at == benchPages {
			b.StopTimer()
			benchFill(b, w)
			at = 0
			b.StartTimer()
		}
		if _, err := r.Free(pages.Index(at), wire.MaxBatch); err != nil {
			b.Fatal(err)
		}
		at += wire.MaxBatch
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*wire.MaxBatch), "ns/page")
}

// BenchmarkLanes puts and frees from all processors at once.
func BenchmarkLanes(b *testing.B) {
	_, w, r := benchPool(b)
	var next atomic.Uint64
	b.SetBytes(wire.MaxBatch * pages.Size)
	defer pageCost(b, wire.MaxBatch)()
	b.RunParallel(func(pb *testing.PB) {
		ps := bareRun(wire.MaxBatch)
		for pb.Next() {
			at := next.Add(wire.MaxBatch) % (benchPages / 2)
			if err := w.Put(number(ps, pages.Index(at))); err != nil {
				b.Error(err)
			}
			if _, err := r.Free(pages.Index(at), wire.MaxBatch); err != nil {
				b.Error(err)
			}
		}
	})
}

// BenchmarkReopen takes up a session of 512 MiB.
func BenchmarkReopen(b *testing.B) {
	p, w, _ := benchPool(b)
	benchFill(b, w)
	for b.Loop() {
		if err := p.Close(); err != nil {
			b.Fatal(err)
		}
		p = open(b, p.cfg)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*benchPages), "ns/page")
}
