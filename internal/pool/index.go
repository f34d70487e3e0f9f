// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"math/bits"
	"sync"
)

// index finds the slot of a page. It is split into tables by the page's hash, so that
// lanes rarely meet at one lock and growing a table stops only a 256th of the pages.
type index [indexTables]table

const indexTables = 256

// table is an open-addressing hash table with linear probing and without tombstones.
// An entry packs 34 bits of page and 30 bits of slot plus one; 0 is empty. A table is
// at most three quarters full and doubles, so it takes 8/0.75 to 8/0.375 bytes a page.
//
// mu also guards the descriptors of the pages in the table: whoever holds it and
// finds a page knows that the slot is live and that its extent stays.
type table struct {
	mu      sync.Mutex
	entries []uint64
	n       int
	_       [64 - 8 - 24 - 8]byte // tables that lanes use at once share no cache line
}

const (
	entrySlotBits = 30
	entrySlotMask = 1<<entrySlotBits - 1
	minTable      = 16
)

func hash(page uint64) uint64 { return page * 0x9e3779b97f4a7c15 }

// table returns the table that has the page, if any has.
func (x *index) table(page uint64) *table { return &x[hash(page)>>(64-8)] }

// home is where the search for a page starts. The table was chosen by the eight
// highest bits of the hash; the following ones choose the place in it.
func (t *table) home(page uint64) int {
	return int(hash(page) << 8 >> (64 - bits.TrailingZeros(uint(len(t.entries)))))
}

// find returns the place of a page's entry, or of the empty one where it belongs.
func (t *table) find(page uint64) int {
	mask := len(t.entries) - 1
	for at := t.home(page); ; at = (at + 1) & mask {
		if e := t.entries[at]; e == 0 || e>>entrySlotBits == page {
			return at
		}
	}
}

func (t *table) lookup(page uint64) (slot uint32, ok bool) {
	if t.n == 0 {
		return 0, false
	}
	e := t.entries[t.find(page)]
	return uint32(e&entrySlotMask) - 1, e != 0
}

// set maps a page to a slot, whether or not it is mapped already.
func (t *table) set(page uint64, slot uint32) {
	if t.n >= len(t.entries)/4*3 {
		t.resize(max(minTable, 2*len(t.entries)))
	}
	at := t.find(page)
	if t.entries[at] == 0 {
		t.n++
	}
	t.entries[at] = page<<entrySlotBits | uint64(slot+1)
}

// remove forgets a page that is mapped. Entries behind it move up, so that no search
// stops early.
func (t *table) remove(page uint64) {
	mask := len(t.entries) - 1
	hole := t.find(page)
	for at := (hole + 1) & mask; t.entries[at] != 0; at = (at + 1) & mask {
		home := t.home(t.entries[at] >> entrySlotBits)
		// The entry may move into the hole unless its home lies behind the hole.
		if (at-home)&mask >= (at-hole)&mask {
			t.entries[hole] = t.entries[at]
			hole = at
		}
	}
	t.entries[hole] = 0
	t.n--
	switch {
	case t.n == 0:
		t.entries = nil
	case len(t.entries) > minTable && t.n < len(t.entries)/8:
		t.resize(len(t.entries) / 4)
	}
}

func (t *table) resize(n int) {
	old := t.entries
	t.entries = make([]uint64, n)
	for _, e := range old {
		if e != 0 {
			t.entries[t.find(e>>entrySlotBits)] = e
		}
	}
}

// pagesIn appends to dst the mapped pages from first on, count of them, as many as
// dst has room for.
func (t *table) pagesIn(dst []uint64, first, count uint64) []uint64 {
	for _, e := range t.entries {
		if page := e >> entrySlotBits; e != 0 && page >= first && page-first < count && len(dst) < cap(dst) {
			dst = append(dst, page)
		}
	}
	return dst
}

// bytes returns what the index takes of the heap.
func (x *index) bytes() uint64 {
	total := uint64(indexTables) * 64
	for i := range x {
		t := &x[i]
		t.mu.Lock()
		total += 8 * uint64(len(t.entries))
		t.mu.Unlock()
	}
	return total
}
