// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"maps"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// TestIndexAgainstMap drives one table, so that entries collide.
func TestIndexAgainstMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var table table
		model := map[uint64]uint32{}
		keys := rapid.Uint64Range(0, 150)
		if rapid.Bool().Draw(t, "wide") {
			keys = rapid.Uint64Range(0, maxPages-1)
		}
		known := func() uint64 {
			if len(model) > 0 && rapid.Bool().Draw(t, "known") {
				return rapid.SampledFrom(slices.Sorted(maps.Keys(model))).Draw(t, "key")
			}
			return keys.Draw(t, "page")
		}
		t.Repeat(map[string]func(*rapid.T){
			"set": func(*rapid.T) {
				page := known()
				model[page] = rapid.Uint32Range(0, maxExtents*extentSlots-2).Draw(t, "slot")
				table.set(page, model[page])
			},
			"remove": func(*rapid.T) {
				if page := known(); containsKey(model, page) {
					table.remove(page)
					delete(model, page)
				}
			},
			"": func(t *rapid.T) {
				if table.n != len(model) {
					t.Fatalf("%d pages, want %d", table.n, len(model))
				}
				for page, want := range model {
					if got, ok := table.lookup(page); !ok || got != want {
						t.Fatalf("page %d is at slot %d (found: %v), want %d", page, got, ok, want)
					}
				}
				if page := keys.Draw(t, "any"); !containsKey(model, page) {
					if slot, ok := table.lookup(page); ok {
						t.Fatalf("page %d is at slot %d, want it missing", page, slot)
					}
				}
				found := slices.Sorted(slices.Values(table.pagesIn(make([]uint64, 0, 1000), 20, 100)))
				var want []uint64
				for page := range model {
					if page >= 20 && page < 120 {
						want = append(want, page)
					}
				}
				slices.Sort(want)
				if diff := cmp.Diff(want, found); diff != "" {
					t.Fatal(diff)
				}
			},
		})
	})
}

func containsKey(m map[uint64]uint32, k uint64) bool { _, ok := m[k]; return ok }

// TestIndexIsCompact holds the index to what is charged for it.
func TestIndexIsCompact(t *testing.T) {
	var x index
	for page := range uint64(300_000) {
		x.table(page).set(page, uint32(page))
		if n := page + 1; n >= 20_000 && n%9_973 == 0 {
			if per := float64(x.bytes()) / float64(n); per > indexBytes {
				t.Fatalf("%.1f bytes of index a page at %d pages, want at most %d", per, n, indexBytes)
			}
		}
	}
	for page := range uint64(300_000) {
		x.table(page).remove(page)
	}
	if got := x.bytes(); got != indexTables*64 {
		t.Errorf("an empty index takes %d bytes, want %d", got, indexTables*64)
	}
}
