// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"errors"
	"fmt"
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
// come in any order, and more than once.
//
// A page takes one byte, and two more where a page nearby was ever in a version above
// 0; see versions.
type Map struct {
	pages    uint64
	holders  []Holder
	versions versions
	counts   [256]uint64
	file     *mapFile // nil for a map in process memory
}

// NewMap returns a map in process memory with every page Absent in version 0.
func NewMap(l *Layout) *Map {
	m := &Map{pages: l.Pages(), holders: make([]Holder, l.Pages()), versions: newVersions(l.Pages())}
	m.counts[Absent] = l.Pages()
	return m
}

// Apply takes a record from the source and returns how many of its pages it told
// something new about. The error wraps ErrRange or ErrHolder when the record is not
// valid, in which case nothing changed, or ErrPlaced, in which case its other pages
// were applied. In a map that lives in a file it may also say that the file could not
// grow; then the record was applied up to some page, and may be applied again.
//
// Whether the migration has an intermediary of that number is for the caller to check.
func (m *Map) Apply(r Record) (applied uint64, err error) {
	if err := r.check(m.pages); err != nil {
		return 0, err
	}
	for i, end := r.First, r.First+Index(r.Count); i < end; {
		c := i / chunkPages
		stop := min(end, (c+1)*chunkPages)
		if m.versions.chunks[c] == nil {
			if r.Version == 0 {
				applied += m.fill(i, stop, r.Holder)
				i = stop
				continue
			}
			if err := m.addChunk(uint64(c)); err != nil {
				return applied, err
			}
		}
		n, e := m.replace(i, stop, r.Holder, r.Version)
		applied += n
		if err == nil {
			err = e
		}
		i = stop
	}
	return applied, err
}

// fill applies a record of version 0 to pages of a chunk that knows no other.
func (m *Map) fill(first, end Index, h Holder) (applied uint64) {
	if h == Absent {
		return 0
	}
	run := m.holders[first:end]
	for k, old := range run {
		if old == Absent {
			run[k] = h
			applied++
		}
	}
	m.counts[Absent] -= applied
	m.counts[h] += applied
	return applied
}

// replace applies a record to pages of a chunk with versions. The error is about the
// first page that was placed too early.
func (m *Map) replace(first, end Index, h Holder, v Version) (applied uint64, err error) {
	chunk := m.versions.chunks[first/chunkPages]
	for i := first; i < end; i++ {
		old, have := m.holders[i], chunk[i%chunkPages]
		switch {
		case v < have:
		case v == have:
			if old == Absent && h != Absent {
				m.settle(i, old, h)
				applied++
			}
		case old == Placed:
			if err == nil {
				err = fmt.Errorf("page %d in version %d, placed in %d: %w", i, v, have, ErrPlaced)
			}
		default:
			m.supersede(i, old, h, v)
			applied++
		}
	}
	return applied, err
}

// settle gives a page another holder in the same version.
func (m *Map) settle(i Index, old, h Holder) {
	m.holders[i] = h
	m.counts[old]--
	m.counts[h]++
}

// supersede gives a page a holder in a newer version. The process may die between any
// two of the stores, and the file is then what the next process believes: so the page
// is Absent while its version changes, and never has a holder in a version that the
// holder does not have.
func (m *Map) supersede(i Index, old, h Holder, v Version) {
	m.holders[i] = Absent
	m.versions.write(i, v)
	m.holders[i] = h
	m.counts[old]--
	m.counts[h]++
}

// Store notes that version v of page i arrived and lies in the destination agent's
// store. fresh is false when the page is outdated or known already, and must be
// dropped. The error wraps ErrRange or ErrPlaced, or says that the file under the map
// could not grow.
func (m *Map) Store(i Index, v Version) (fresh bool, err error) {
	if uint64(i) >= m.pages {
		return false, fmt.Errorf("page %d of %d: %w", i, m.pages, ErrRange)
	}
	if c := i / chunkPages; m.versions.chunks[c] == nil {
		if v == 0 {
			return m.fill(i, i+1, Local) == 1, nil
		}
		if err := m.addChunk(uint64(c)); err != nil {
			return false, err
		}
	}
	n, err := m.replace(i, i+1, Local, v)
	return n == 1, err
}

// addChunk makes room for the versions of a chunk.
func (m *Map) addChunk(c uint64) error {
	if m.file == nil {
		m.versions.add(c, make([]Version, chunkPages))
		return nil
	}
	memory, err := m.file.addChunk(c)
	if err != nil {
		return err
	}
	m.versions.add(c, memory)
	return nil
}

// At returns the holder of page i and the newest version known. A page that does not
// exist is Absent.
func (m *Map) At(i Index) (Holder, Version) {
	if uint64(i) >= m.pages {
		return Absent, 0
	}
	return m.holders[i], m.versions.at(i)
}

// Place notes that the destination QEMU has page i, which is final. A page that does
// not exist is ignored.
func (m *Map) Place(i Index) {
	if uint64(i) < m.pages {
		m.settle(i, m.holders[i], Placed)
	}
}

// Counts returns how many pages lie where, in constant time.
func (m *Map) Counts() Counts {
	c := Counts{
		Absent: m.counts[Absent], Zero: m.counts[Zero], Local: m.counts[Local],
		Placed: m.counts[Placed], ByHolder: m.counts,
	}
	c.Remote = m.pages - c.Absent - c.Zero - c.Local - c.Placed
	return c
}

// MemoryBytes returns the size of the map in bytes, in process memory or in its file.
func (m *Map) MemoryBytes() uint64 {
	n := uint64(len(m.holders)) + m.versions.bytes()
	if m.file != nil {
		n += m.file.holdersAt
	}
	return n
}
