// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// still is an engine without network: what is assigned to a holder is acknowledged by
// the test.
func still(t testing.TB, n int, intermediaries int) *Engine {
	t.Helper()
	e, err := New(Config{
		Migration:   wire.NewMigrationID(),
		Destination: Peer{Name: "d", Identity: "d", Address: "d:1"},
		Accept:      newTestSource(t, 24, 1).accept,
		Switch:      func(context.Context) error { return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	e.ctx, e.cancel = context.WithCancelCause(context.Background())
	if e.layout, err = pages.NewLayout(testBlocks(n)); err != nil {
		t.Fatal(err)
	}
	e.ledger = pages.NewLedger(e.layout)
	e.safe, e.wanted = pages.NewBitmap(e.layout.Pages()), pages.NewBitmap(e.layout.Pages())
	e.phase = Scattering
	e.handed = true
	for k := range intermediaries {
		value, _ := pages.HolderOf(k)
		e.holders = append(e.holders, newHolder(Peer{Name: "i"}, value, time.Millisecond, &e.mu))
	}
	for _, h := range e.holders {
		h.conn, h.granted, h.lanes = new(wire.Conn), 1<<50, make([]laneState, 1)
	}
	return e
}

// deliver plays lanes and holders: everything that was assigned is acknowledged, and
// the records are sent.
func (e *Engine) deliver() {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	for _, h := range e.holders {
		for h.queue.len() > 0 {
			f := h.queue.take()
			h.window.Acked(f.batch.Bytes(), time.Millisecond, now)
			e.landed(f, h.value)
			e.recycle(&h.lanes[0], f)
		}
	}
	for {
		if _, ok := e.out.next(); !ok {
			return
		}
	}
}

func randomPage() []byte {
	p := make([]byte, pages.Size)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return p
}

// The way of a page through the engine allocates nothing: zero check, version, seal,
// placement, acknowledgement, record.
func TestPagesDoNotAllocate(t *testing.T) {
	const n = 1 << 16
	for name, intermediaries := range map[string]int{"direct": 0, "scattered": 3} {
		e := still(t, n, intermediaries)
		e.out.open = true
		if intermediaries > 0 {
			e.holders[0].conn = nil
		}
		d := &feeder{e: e}
		data, zero := randomPage(), make([]byte, pages.Size)
		next := pages.Index(0)
		batch := func() {
			for range 256 {
				page := data
				if next%7 == 0 {
					page = zero
				}
				if err := d.page(next, page); err != nil {
					t.Fatal(err)
				}
				next++
				if d.open == nil {
					e.deliver()
				}
			}
		}
		for range 8 {
			batch() // buffers grow to their size
		}
		if got := testing.AllocsPerRun(100, batch); got != 0 {
			t.Errorf("%s: %v allocations per 256 pages", name, got)
		}
	}
}

// BenchmarkPage is one page's way through the engine on one processor, without network.
func BenchmarkPage(b *testing.B) {
	for name, page := range map[string][]byte{"data": randomPage(), "zero": make([]byte, pages.Size)} {
		b.Run(name, func(b *testing.B) {
			e := still(b, 1<<20, 2)
			e.out.open = true
			d := &feeder{e: e}
			b.SetBytes(pages.Size)
			b.ReportAllocs()
			for i := range b.N {
				if i%(1<<20) == 0 {
					e.ledger = pages.NewLedger(e.layout)
				}
				if err := d.page(pages.Index(i%(1<<20)), page); err != nil {
					b.Fatal(err)
				}
				if d.open == nil && (name == "data" || i%64 == 0) {
					e.deliver()
				}
			}
		})
	}
}
