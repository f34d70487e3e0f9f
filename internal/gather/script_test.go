// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// expect waits for a frame of the control lane.
func (b *bed) expect(want wire.Type) wire.Frame {
	b.t.Helper()
	for {
		select {
		case f := <-b.events:
			if f.Type == want {
				return f
			}
			if f.Type == wire.TypeReady || f.Type == wire.TypeLoaded {
				continue // repeated after a reconnect
			}
			if f.Type == wire.TypeError {
				b.t.Fatalf("waiting for %v: %v", want, peerError(f.Body))
			}
			b.t.Fatalf("%v in place of %v", f.Type, want)
		case <-time.After(10 * time.Second):
			b.t.Fatalf("no %v", want)
		}
	}
}

func (b *bed) send(m wire.Message) {
	b.t.Helper()
	if _, err := b.journal.Send(m); err != nil {
		b.t.Fatal(err)
	}
}

// describe sends Setup.
func (b *bed) describe() {
	b.t.Helper()
	su := &wire.Setup{
		Key: b.key, Strategy: "immediate", Machine: "pc", Config: fakeConfig,
		Section: fakeSection, Version: 4, Blocks: b.blocks,
	}
	for _, h := range b.holders {
		su.Holders = append(su.Holders, wire.Holder{
			Name: string(h.node), Addr: h.ln.Addr().String(), Identity: h.node, Session: h.session,
		})
	}
	b.send(su)
}

// handOver sends the device state in two chunks.
func (b *bed) handOver() {
	b.t.Helper()
	total, cut := uint64(len(fakePackage)), len(fakePackage)/2
	b.send(&wire.State{Phase: wire.PhaseSwitched})
	b.send(&wire.Package{Total: total, Data: fakePackage[:cut]})
	b.send(&wire.Package{Total: total, Offset: uint64(cut), Data: fakePackage[cut:]})
}

// open brings the migration to where the guest runs at the destination.
func (b *bed) open() {
	b.t.Helper()
	b.start()
	b.dial()
	b.describe()
	b.expect(wire.TypeReady)
	b.handOver()
	b.expect(wire.TypeLoaded)
}

// direct sends pages straight to the destination and waits for the acknowledgement.
func (b *bed) direct(lane *wire.Lane, v pages.Version, list ...pages.Index) {
	b.t.Helper()
	for len(list) > 0 {
		n := min(len(list), wire.MaxBatch)
		b.batch(lane, v, list[:n])
		select {
		case <-b.acks:
		case <-time.After(10 * time.Second):
			b.t.Fatal("no acknowledgement")
		}
		list = list[n:]
	}
}

func (b *bed) batch(lane *wire.Lane, v pages.Version, list []pages.Index) {
	b.t.Helper()
	b.mu.Lock()
	b.seq++
	seq := b.seq
	b.mu.Unlock()
	batch := wire.NewBatch()
	batch.Reset(seq)
	for _, i := range list {
		data := content(i, v)
		batch.Append(b.sealer, i, v, wire.EncodingRaw, data)
		b.want[i] = data
	}
	if err := lane.SendBatch(batch); err != nil {
		b.t.Fatal(err)
	}
}

// scatter puts pages at an intermediary and tells the destination.
func (b *bed) scatter(k int, v pages.Version, list ...pages.Index) {
	b.t.Helper()
	var recs wire.Records
	h, _ := pages.HolderOf(k)
	for _, i := range list {
		b.holders[k].put(b.sealer, i, v)
		b.want[i] = content(i, v)
		recs = append(recs, pages.Record{First: i, Count: 1, Holder: h, Version: v})
	}
	b.records(recs)
}

func (b *bed) zeros(v pages.Version, list ...pages.Index) {
	b.t.Helper()
	var recs wire.Records
	for _, i := range list {
		b.want[i] = nil
		recs = append(recs, pages.Record{First: i, Count: 1, Holder: pages.Zero, Version: v})
	}
	b.records(recs)
}

func (b *bed) records(recs wire.Records) {
	b.t.Helper()
	for len(recs) > 0 {
		n := min(len(recs), wire.MaxRecords)
		b.send(recs[:n])
		recs = recs[n:]
	}
}

// commit commits all pages that were sent.
func (b *bed) commit() {
	b.t.Helper()
	b.send(&wire.Commit{Pages: uint64(len(b.want))})
	f := b.expect(wire.TypeCommitted)
	if c, err := wire.ParseCommitted(f.Body); err != nil || c.Pages != uint64(len(b.want)) {
		b.t.Fatalf("committed %d, %v", c.Pages, err)
	}
	b.send(&wire.State{Phase: wire.PhaseReleased})
}

// finish waits for the engine and checks every page.
func (b *bed) finish() {
	b.t.Helper()
	select {
	case <-b.done:
	case <-time.After(20 * time.Second):
		b.t.Fatalf("not finished: %+v", b.engine.Progress())
	}
	if b.err != nil {
		b.t.Fatal(b.err)
	}
	b.q.mu.Lock()
	defer b.q.mu.Unlock()
	if b.q.err != nil {
		b.t.Fatal("QEMU:", b.q.err)
	}
	if !b.q.complete {
		b.t.Fatal("QEMU was not given everything")
	}
	for i := pages.Index(0); uint64(i) < b.layout.Pages(); i++ {
		want := b.want[i]
		if want == nil {
			want = make([]byte, pages.Size)
		}
		if !bytes.Equal(b.q.mem[i*pages.Size:(i+1)*pages.Size], want) {
			b.t.Fatalf("page %d is wrong: %x..., want %x...", i, b.q.mem[i*pages.Size:][:24], want[:24])
		}
		if _, known := b.want[i]; known && !b.q.placed.Test(i) {
			b.t.Fatalf("page %d was never placed", i)
		}
	}
	for _, h := range b.holders {
		if !h.isDissolved() {
			b.t.Errorf("intermediary %s was not dissolved", h.node)
		}
	}
}

// fail waits for the engine to end with an error.
func (b *bed) fail(want error) {
	b.t.Helper()
	select {
	case <-b.done:
	case <-time.After(20 * time.Second):
		b.t.Fatalf("not finished: %+v", b.engine.Progress())
	}
	if !errors.Is(b.err, want) {
		b.t.Fatalf("ended with %v, want %v", b.err, want)
	}
}

// guest runs threads that touch pages in random order and wait for each.
func (b *bed) guest(threads, touches int, seed uint64) *sync.WaitGroup {
	var wg sync.WaitGroup
	for k := range threads {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(k)))
			for range touches {
				i := pages.Index(r.Uint64N(b.layout.Pages()))
				if b.q.fault(i) {
					b.q.await(i)
				}
			}
		})
	}
	return &wg
}

// seq returns the pages from first to last-1.
func seq(first, end pages.Index) (list []pages.Index) {
	for i := first; i < end; i++ {
		list = append(list, i)
	}
	return list
}
