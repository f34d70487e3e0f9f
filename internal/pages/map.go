// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"errors"
	"fmt"
	"os"
)

// ErrPlaced is wrapped when a newer version turns up of a page that the destination
// QEMU already has. It means that the guest may see an outdated page.
var ErrPlaced = errors.New("newer version of a page that was already placed")

// Counts says how many pages lie where.
type Counts struct {
	Absent, Zero, Local, Placed uint64
	// Remote is the number of pages at all intermediaries together.
	Remote   uint64
	ByHolder [256]uint64
}

// Map is the destination's page map: for each page the newest version it heard of and
// the holder of that version. A statement about a page is taken iff its version is
// newer than the one in the map, or equal while the page is Absent; so statements may
// come in any order.
type Map struct {
	layout   *Layout
	holders  []Holder
	versions versions
	counts   [256]uint64
}

// NewMap returns a map in process memory with every page Absent in version 0.
func NewMap(l *Layout) *Map {
	m := &Map{layout: l, holders: make([]Holder, l.Pages()), versions: newVersions(l.Pages())}
	m.counts[Absent] = l.Pages()
	return m
}

// OpenMap returns a map that lives in f, which is given its content when it is empty
// and must hold a map of the same layout otherwise. What the map was told outlives the
// process, however that ends. Closing the map leaves f open.
func OpenMap(l *Layout, f *os.File) (*Map, error) {
	return nil, fmt.Errorf("opening page map %s: %w", f.Name(), errors.ErrUnsupported)
}

// Close releases the memory of a map that lives in a file. The map must not be used
// afterwards.
func (m *Map) Close() error { return nil }

// Apply takes a record from the source and returns how many of its pages it told
// something new about. The error wraps ErrRange or ErrHolder when the record is not
// valid, in which case nothing changed, or ErrPlaced, in which case its other pages
// were applied.
func (m *Map) Apply(r Record) (applied uint64, err error) {
	if err := r.check(m.layout.Pages()); err != nil {
		return 0, err
	}
	for i := r.First; i < r.First+Index(r.Count); i++ {
		took, e := m.tell(i, r.Holder, r.Version)
		if took {
			applied++
		}
		if e != nil && err == nil {
			err = e
		}
	}
	return applied, err
}

func (m *Map) tell(i Index, h Holder, v Version) (bool, error) {
	old, have := m.holders[i], m.versions.at(i)
	if v < have || v == have && (old != Absent || h == Absent) {
		return false, nil
	}
	if old == Placed {
		return false, fmt.Errorf("page %d in version %d, placed in %d: %w", i, v, have, ErrPlaced)
	}
	m.counts[old]--
	m.counts[h]++
	m.holders[i] = h
	if v != have {
		m.versions.put(i, v)
	}
	return true, nil
}

// Store notes that version v of page i arrived and lies in the destination agent's
// store. fresh is false when the page is outdated or known already, and must be
// dropped. The error wraps ErrRange or ErrPlaced.
func (m *Map) Store(i Index, v Version) (fresh bool, err error) {
	if uint64(i) >= m.layout.Pages() {
		return false, fmt.Errorf("page %d of %d: %w", i, m.layout.Pages(), ErrRange)
	}
	return m.tell(i, Local, v)
}

// At returns the holder of page i and the newest version known. A page that does not
// exist is Absent.
func (m *Map) At(i Index) (Holder, Version) {
	if uint64(i) >= m.layout.Pages() {
		return Absent, 0
	}
	return m.holders[i], m.versions.at(i)
}

// Place notes that the destination QEMU has page i, which is final. A page that does
// not exist is ignored.
func (m *Map) Place(i Index) {
	if uint64(i) >= m.layout.Pages() {
		return
	}
	m.counts[m.holders[i]]--
	m.counts[Placed]++
	m.holders[i] = Placed
}

// Counts returns how many pages lie where, in constant time.
func (m *Map) Counts() Counts {
	c := Counts{
		Absent: m.counts[Absent], Zero: m.counts[Zero], Local: m.counts[Local],
		Placed: m.counts[Placed], ByHolder: m.counts,
	}
	c.Remote = m.layout.Pages() - c.Absent - c.Zero - c.Local - c.Placed
	return c
}

// MemoryBytes returns the size of the map in bytes.
func (m *Map) MemoryBytes() uint64 { return uint64(len(m.holders)) + m.versions.bytes() }
