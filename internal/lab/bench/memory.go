// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"

	"scattergather.io/scattergather/internal/pages"
)

// memoryRows tell what the page map at the destination and the ledger at the source
// cost for 1 GiB of guest: without a page sent twice, and with every page sent twice.
func memoryRows() []Row {
	const gib = 1 << 30
	layout, err := pages.NewLayout([]pages.Block{{Name: "ram", Length: gib, PageSize: pages.Size}})
	if err != nil {
		panic("bench: " + err.Error()) // a constant layout
	}
	m, g := pages.NewMap(layout), pages.NewLedger(layout)
	once := [2]uint64{m.MemoryBytes(), g.MemoryBytes()}
	for i := range pages.Index(layout.Pages()) {
		for range 2 {
			if _, err := g.Precopy(i); err != nil {
				panic("bench: " + err.Error())
			}
		}
		if _, err := m.Apply(pages.Record{First: i, Count: 1, Holder: pages.FirstHolder, Version: 1}); err != nil {
			panic("bench: " + err.Error())
		}
	}
	twice := [2]uint64{m.MemoryBytes(), g.MemoryBytes()}
	rows := make([]Row, 2)
	for i, what := range []string{"page map at the destination", "ledger at the source"} {
		rows[i] = Row{
			Group: GroupMemory, Title: "KiB of memory for each GiB of guest, " + what, Unit: " KiB",
			Values: []float64{float64(once[i]) / 1024},
			Details: []string{fmt.Sprintf("%.2f bytes a page; %.2f when every page was sent twice",
				float64(once[i])/float64(layout.Pages()), float64(twice[i])/float64(layout.Pages()))},
		}
	}
	return rows
}
