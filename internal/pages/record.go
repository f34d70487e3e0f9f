// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"errors"
	"fmt"
)

// Version tells the versions of one page apart: 0 first, then strictly increasing.
// A page needs more than one version only when it is sent before the switch of the
// CPU and dirtied afterwards.
type Version uint16

// Holder says where the newest version of a page lies. Today the value names one
// place. Values past the last intermediary are kept free so that a holder can later
// name a set of places (replicas, a parity group) listed in the migration's table.
type Holder uint8

const (
	// Absent means that no copy of the newest version is known.
	Absent Holder = 0
	// Zero means that the page holds only zero bytes and lies nowhere.
	Zero Holder = 1
	// Local means that the page lies in the destination agent's store.
	Local Holder = 2
	// Placed means that the destination QEMU has the page. It is final.
	Placed Holder = 3
	// FirstHolder is the first intermediary of the migration's table; the k-th one
	// (from 0) is FirstHolder+k.
	FirstHolder Holder = 4
)

// MaxHolders is the largest number of intermediaries of one migration.
const MaxHolders = 250

// ErrHolder is wrapped by errors about a record whose holder has no meaning.
var ErrHolder = errors.New("holder without meaning in a record")

// HolderOf returns the holder value of the k-th intermediary; ok is false when the
// table of a migration has no room for it.
func HolderOf(k int) (h Holder, ok bool) {
	if k < 0 || k >= MaxHolders {
		return Absent, false
	}
	return FirstHolder + Holder(k), true
}

// Intermediary returns which intermediary of the migration's table a holder is; ok is
// false when it is none.
func (h Holder) Intermediary() (k int, ok bool) {
	if h < FirstHolder || int(h-FirstHolder) >= MaxHolders {
		return 0, false
	}
	return int(h - FirstHolder), true
}

// String returns a name for logs.
func (h Holder) String() string {
	switch h {
	case Absent:
		return "absent"
	case Zero:
		return "zero"
	case Local:
		return "local"
	case Placed:
		return "placed"
	}
	if k, ok := h.Intermediary(); ok {
		return fmt.Sprintf("intermediary %d", k)
	}
	return fmt.Sprintf("holder %d", uint8(h))
}

// Record says that Count pages from First, all in that version, lie with Holder. It
// is what the source tells the destination after the holder acknowledged the pages,
// or, with Absent, after the source QEMU discarded them.
type Record struct {
	First   Index
	Count   uint32
	Holder  Holder
	Version Version
}

// check refuses a record that no honest peer sends about n pages.
func (r Record) check(n uint64) error {
	if r.Count == 0 || uint64(r.First) >= n || uint64(r.Count) > n-uint64(r.First) {
		return fmt.Errorf("record of %d pages from page %d, the VM has %d: %w", r.Count, r.First, n, ErrRange)
	}
	if _, ok := r.Holder.Intermediary(); !ok && r.Holder != Absent && r.Holder != Zero {
		// Local and Placed are the destination's own knowledge, never a peer's.
		return fmt.Errorf("record of page %d: %s: %w", r.First, r.Holder, ErrHolder)
	}
	return nil
}
