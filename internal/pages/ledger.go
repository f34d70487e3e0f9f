// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"errors"
	"fmt"
	"math"
)

// ErrVersions is wrapped when a page was sent so often before the switch that its
// versions are used up. The way out is to switch now.
var ErrVersions = errors.New("the versions of a page are used up")

// lastPrecopy is the last version that a page gets before the switch. The one after it
// is left to a discard, which must not fail.
const lastPrecopy Version = math.MaxUint16 - 1

// Ledger is the source's record of the versions it gave out. A version of a page is
// given to data once at most, so that it can serve as a nonce.
type Ledger struct {
	// newest has the pages whose newest version exists as data or as zero page. A
	// page outside it was never sent (version 0) or was discarded since (version
	// above 0, which no data has used yet).
	newest   *Bitmap
	versions versions
}

// NewLedger returns the ledger of a VM of which nothing was sent.
func NewLedger(l *Layout) *Ledger {
	return &Ledger{newest: NewBitmap(l.Pages()), versions: newVersions(l.Pages())}
}

// Precopy gives a version to a page that the source QEMU sends before the switch. The
// error wraps ErrVersions when none is left, or ErrRange.
func (g *Ledger) Precopy(i Index) (Version, error) {
	if uint64(i) >= g.newest.Len() {
		return 0, fmt.Errorf("page %d of %d: %w", i, g.newest.Len(), ErrRange)
	}
	v := g.versions.at(i)
	again := g.newest.Test(i)
	// Compared before it is raised, which could wrap round to a version given before.
	if v > lastPrecopy || again && v == lastPrecopy {
		return 0, fmt.Errorf("page %d: %w", i, ErrVersions)
	}
	if again {
		v++
		g.versions.put(i, v)
	} else {
		g.newest.Set(i)
	}
	return v, nil
}

// Discard notes that the source QEMU discarded n pages from first, since they were
// dirtied after they were sent. Those that were sent get a new version that no data
// has yet, and emit is told so in records with the holder Absent, joined into runs.
// Pages never sent, or discarded before, stay as they are. The error wraps ErrRange,
// and then nothing happened, or ErrVersions when a page sent after the switch in the
// very last version is discarded, which QEMU never does; pages before it are done.
func (g *Ledger) Discard(first Index, n uint64, emit func(Record)) error {
	if uint64(first) > g.newest.Len() || n > g.newest.Len()-uint64(first) {
		return fmt.Errorf("discard of %d pages from page %d of %d: %w", n, first, g.newest.Len(), ErrRange)
	}
	var run Record
	end := first + Index(n)
	for i, ok := g.newest.NextSet(first); ok && i < end; i, ok = g.newest.NextSet(i + 1) {
		v := g.versions.at(i) + 1
		if v == 0 {
			run.flush(emit)
			return fmt.Errorf("discard of page %d: %w", i, ErrVersions)
		}
		g.versions.put(i, v)
		g.newest.Clear(i)
		if i == run.First+Index(run.Count) && v == run.Version && run.Count < math.MaxUint32 {
			run.Count++
			continue
		}
		run.flush(emit)
		run = Record{First: i, Count: 1, Holder: Absent, Version: v}
	}
	run.flush(emit)
	return nil
}

func (r *Record) flush(emit func(Record)) {
	if r.Count > 0 {
		emit(*r)
	}
}

// Postcopy gives a version to a page that the source QEMU sends after the switch.
// fresh is false when the newest version was sent already, be it after the switch or
// before it without a discard since: the guest no longer runs here, so the content is
// the same, and the page must be dropped. It is false for a page that does not exist.
func (g *Ledger) Postcopy(i Index) (v Version, fresh bool) {
	if uint64(i) >= g.newest.Len() {
		return 0, false
	}
	v = g.versions.at(i)
	if g.newest.Test(i) {
		return v, false
	}
	g.newest.Set(i)
	return v, true
}

// Current tells whether v is still the newest version of page i and exists as data.
func (g *Ledger) Current(i Index, v Version) bool {
	return g.newest.Test(i) && g.versions.at(i) == v
}

// Sent returns the number of pages whose newest version exists as data or as zero
// page: what a commit claims.
func (g *Ledger) Sent() uint64 { return g.newest.Count() }

// NextUnsent returns the first page >= from whose newest version was not sent.
func (g *Ledger) NextUnsent(from Index) (Index, bool) { return g.newest.NextClear(from) }

// MemoryBytes returns the size of the ledger in bytes.
func (g *Ledger) MemoryBytes() uint64 { return g.newest.MemoryBytes() + g.versions.bytes() }
