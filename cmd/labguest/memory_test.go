// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"scattergather.io/scattergather/internal/lab/guest"
)

func newTestMemory(t *testing.T) (*memory, *[]guest.Wrong) {
	t.Helper()
	m, err := newMemory(guest.Config{Seed: 5, FillMiB: 1, WorkingSet: 1, Mix: guest.Mix{100, 0, 0, 0}, CPUs: 1})
	if err != nil {
		t.Fatal(err)
	}
	var told []guest.Wrong
	m.onWrong = func(w guest.Wrong) { told = append(told, w) }
	m.fill(func() {})
	return m, &told
}

func TestVerifyFindsEveryDamageOnceAndForEver(t *testing.T) {
	m, told := newTestMemory(t)
	for page := range uint32(len(m.pages)) {
		m.verify(page)
	}
	if len(*told) != 0 {
		t.Fatalf("fresh memory is wrong: %v", *told)
	}
	before := m.pages[7]
	m.dirty(7)
	m.verify(7)
	if len(*told) != 0 {
		t.Fatalf("a dirtied page is wrong: %v", *told)
	}

	m.pages[7] = before        // the update is lost
	m.pages[8] = guest.Page{}  // the page never came
	m.pages[9][511] ^= 1 << 63 // a bit flipped in the last word
	m.pages[10], m.pages[11] = m.pages[11], m.pages[10]
	for range 3 {
		for page := range uint32(len(m.pages)) {
			m.verify(page)
		}
	}
	m.dirty(8) // a later content does not mend the past
	m.verify(8)
	got := map[uint32]guest.Damage{}
	for _, w := range *told {
		got[w.Page] = w.Damage
	}
	want := map[uint32]guest.Damage{
		7: guest.DamageStale, 8: guest.DamageZero, 9: guest.DamageOther, 10: guest.DamageOther, 11: guest.DamageOther,
	}
	if diff := cmp.Diff(want, got); diff != "" || len(*told) != len(want) || m.wrongCount.Load() != uint32(len(want)) {
		t.Errorf("told %d times, counted %d, damages (-want +got):\n%s", len(*told), m.wrongCount.Load(), diff)
	}
}

func TestFaultsCountsFirstTouchesInTheWindow(t *testing.T) {
	m, _ := newTestMemory(t)
	m.log = m.log[:logged]
	copy(m.log, []slow{
		{at: 50, latency: 900, page: 1, before: 10},   // before the switch
		{at: 120, latency: 300, page: 2, before: 10},  // counts
		{at: 130, latency: 500, page: 3, before: 99},  // counts
		{at: 140, latency: 700, page: 2, before: 120}, // touched since
		{at: 250, latency: 800, page: 4, before: 10},  // after the end
	})
	m.logEnd.Store(5)
	want := guest.Faults{Count: 2, P50: 500, P99: 500, Max: 500, Sum: 800}
	if diff := cmp.Diff(want, m.faults(100e6, 200e6)); diff != "" {
		t.Errorf("faults from 100 to 200 ms (-want +got):\n%s", diff)
	}
}

func TestWorkDoesNotAllocate(t *testing.T) {
	m, _ := newTestMemory(t)
	page := uint32(0)
	if n := testing.AllocsPerRun(100, func() { m.dirty(page); m.verify(page); page++ }); n != 0 {
		t.Errorf("%v allocations for dirtying and verifying a page, want 0", n)
	}
}
