// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"runtime"
	"testing"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// TestNoAllocationPerPage moves many pages by both ways and counts all allocations of
// the process, those of the test's own source, intermediaries and QEMU included. One
// allocation a page anywhere would show.
func TestNoAllocationPerPage(t *testing.T) {
	const n = 40000
	ways := map[string]func(b *bed){
		"direct": func(b *bed) {
			page, batch := content(1, 0), wire.NewBatch()
			for i := uint64(0); i < n; {
				batch.Reset(i + 1)
				for ; i < n && !batch.Full(); i++ {
					batch.Append(b.sealer, pages.Index(i), 0, wire.EncodingRaw, page)
				}
				if err := b.conn.Bulk(0).SendBatch(batch); err != nil {
					t.Fatal(err)
				}
				<-b.acks
			}
		},
		"intermediary": func(b *bed) {
			b.holders[0].same = b.sealer
			b.records(wire.Records{{First: 0, Count: n, Holder: pages.FirstHolder}})
		},
	}
	for name, way := range ways {
		b := benchBed(t, 1, n)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		way(b)
		b.end(n)
		runtime.ReadMemStats(&after)
		if got := float64(after.Mallocs-before.Mallocs) / n; got > 0.5 {
			t.Errorf("%s: %.2f allocations a page", name, got)
		}
		b.close()
	}
}
