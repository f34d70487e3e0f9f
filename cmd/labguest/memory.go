// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"scattergather.io/scattergather/internal/lab/guest"
)

// logged is how many slow accesses are remembered.
const logged = 1 << 15

// slow is one access that took longer than guest.SlowAccess.
type slow struct {
	at      uint32 // guest's clock, ms
	latency uint32 // us
	page    uint32
	before  uint32 // guest's clock of the touch before it, ms; 0 = never
}

// memory is the filled part of the guest's RAM and what is known about it. All
// of it lies in anonymous mappings that are touched before work begins.
type memory struct {
	pattern     guest.Pattern
	pages       []guest.Page
	generations []uint32 // what each page must hold
	touched     []uint32 // guest's clock of the last touch, ms
	locks       []uint32 // one spinning lock for every page modulo their number
	wrong       []uint64 // bitmap of the pages ever found wrong
	wrongCount  atomic.Uint32
	log         []slow
	logEnd      atomic.Uint32 // entries ever logged
	onWrong     func(guest.Wrong)
}

func mapped[T any](n int) ([]T, error) {
	var zero T
	size := n * int(unsafe.Sizeof(zero))
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("mapping %d MiB: %w", size>>20, err)
	}
	// Huge pages make the first touch of memory several times quicker under TCG.
	// The migration below sees 4 KiB pages either way.
	_ = unix.Madvise(b, unix.MADV_HUGEPAGE)
	return unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(b))), n), nil
}

func address(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

func newMemory(c guest.Config) (*memory, error) {
	n := c.FillMiB << 20 / guest.PageSize
	m := &memory{pattern: guest.Pattern{Seed: c.Seed, Mix: c.Mix}, locks: make([]uint32, 1024), wrong: make([]uint64, (n+63)/64)}
	var err error
	if m.pages, err = mapped[guest.Page](n); err != nil {
		return nil, err
	}
	if m.generations, err = mapped[uint32](n); err != nil {
		return nil, err
	}
	if m.touched, err = mapped[uint32](n); err != nil {
		return nil, err
	}
	m.log, err = mapped[slow](logged)
	return m, err
}

// fill writes every page for the first time and calls tick now and then.
func (m *memory) fill(tick func()) (zeros uint32) {
	for i := range m.pages {
		page := uint32(i)
		m.pattern.Fill(&m.pages[i], page, 0)
		m.generations[i], m.touched[i] = 0, millis()
		if m.pattern.Kind(page) == guest.Zero {
			zeros++
		}
		tick()
	}
	for i := range m.log {
		m.log[i] = slow{}
	}
	return zeros
}

// lock takes a page's lock. The time a touch takes is measured around all that
// it needs of the guest's memory, the page's generation included.
func (m *memory) lock(page uint32) *uint32 {
	l := &m.locks[page%uint32(len(m.locks))]
	for !atomic.CompareAndSwapUint32(l, 0, 1) {
		unix.RawSyscallNoError(unix.SYS_SCHED_YIELD, 0, 0, 0)
	}
	return l
}

// verify compares a page with what it must hold.
func (m *memory) verify(page uint32) {
	l := m.lock(page)
	began := nanos()
	generation := atomic.LoadUint32(&m.generations[page])
	p := &m.pages[page]
	_ = atomic.LoadUint64(&p[0])
	m.noteTouch(page, began)
	if word, want := m.pattern.Check(p, page, generation); word >= 0 {
		m.noteWrong(page, generation, word, want)
	}
	atomic.StoreUint32(l, 0)
}

// dirty gives a page its next content.
func (m *memory) dirty(page uint32) {
	l := m.lock(page)
	began := nanos()
	generation := m.generations[page] + 1
	p := &m.pages[page]
	// The first write is the touch: it is what may have to wait for the page.
	atomic.StoreUint64(&p[0], atomic.LoadUint64(&p[0]))
	m.noteTouch(page, began)
	m.generations[page] = generation
	m.pattern.Fill(p, page, generation)
	atomic.StoreUint32(l, 0)
}

func (m *memory) noteTouch(page uint32, began uint64) {
	now := nanos()
	ms := uint32(now / 1e6)
	before := m.touched[page]
	m.touched[page] = ms
	if now-began > guest.SlowAccess {
		at := (m.logEnd.Add(1) - 1) % logged
		m.log[at] = slow{at: ms, latency: uint32((now - began) / 1e3), page: page, before: before}
	}
}

// noteWrong counts a page once and tells about it once.
func (m *memory) noteWrong(page, generation uint32, word int, want uint64) {
	bit := uint64(1) << (page % 64)
	if atomic.OrUint64(&m.wrong[page/64], bit)&bit != 0 {
		return
	}
	m.wrongCount.Add(1)
	p := &m.pages[page]
	w := guest.Wrong{Page: page, Generation: generation, Word: uint16(word), Got: p[word], Want: want}
	if at, _ := m.pattern.Check(p, page, generation-1); generation > 0 && at < 0 {
		w.Damage = guest.DamageStale
	} else if *p == (guest.Page{}) {
		w.Damage = guest.DamageZero
	}
	m.onWrong(w)
}

// faults sums up the slow touches between two moments that were the first of
// their page since the first moment. A page that was touched since and is slow
// later does not count: that is noise of the host and no fault.
func (m *memory) faults(since, until uint64) guest.Faults {
	from, to := uint32(since/1e6), uint32(until/1e6)
	end := m.logEnd.Load()
	var f guest.Faults
	if end > logged {
		f.Lost = end - logged
	}
	latencies := make([]uint32, 0, min(end, logged))
	for _, s := range m.log[:min(end, logged)] {
		if s.at >= from && s.at <= to && s.before <= from {
			latencies = append(latencies, s.latency)
			f.Sum += uint64(s.latency)
		}
	}
	if len(latencies) == 0 {
		return f
	}
	slices.Sort(latencies)
	n := len(latencies)
	f.Count = uint32(n)
	f.P50, f.P99, f.Max = latencies[n/2], latencies[n*99/100], latencies[n-1]
	return f
}
