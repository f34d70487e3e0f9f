// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"errors"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

const mib = 1 << 20

// TestGather sends a VM of two blocks by all ways there are, superseded versions
// included, while a guest touches pages at random.
func TestGather(t *testing.T) {
	b := newBed(t, 2, pages.Block{Name: "pc.ram", Length: 8 * mib, PageSize: pages.Size},
		pages.Block{Name: "rom", Length: 256 << 10, PageSize: pages.Size})
	b.start()
	b.dial()
	b.describe()
	b.expect(wire.TypeReady)
	// Before the switch, with versions that do not last.
	b.direct(b.conn.Bulk(0), 0, seq(0, 300)...)
	b.scatter(0, 0, seq(300, 500)...)
	b.zeros(0, seq(500, 600)...)
	b.records(wire.Records{
		{First: 0, Count: 100, Holder: pages.Absent, Version: 1},
		{First: 300, Count: 50, Holder: pages.Absent, Version: 1},
		{First: 500, Count: 50, Holder: pages.Absent, Version: 1},
	})
	for _, list := range [][]pages.Index{seq(0, 100), seq(300, 350), seq(500, 550)} {
		for _, i := range list {
			delete(b.want, i)
		}
	}
	b.handOver()
	b.expect(wire.TypeLoaded)
	guest := b.guest(4, 100, 1)
	b.direct(b.conn.Bulk(1), 1, seq(0, 50)...)
	b.scatter(1, 1, seq(50, 100)...)
	b.zeros(1, seq(300, 350)...)
	b.scatter(0, 1, seq(500, 550)...)
	r := rand.New(rand.NewPCG(2, 2))
	end := pages.Index(b.layout.Pages())
	for at := pages.Index(600); at < end-40; { // the last 40 are never sent
		next := min(at+1+pages.Index(r.IntN(100)), end-40)
		switch r.IntN(4) {
		case 0:
			b.direct(b.conn.Bulk(r.IntN(2)), 0, seq(at, next)...)
		case 1:
			b.zeros(0, seq(at, next)...)
		default:
			b.scatter(r.IntN(2), 0, seq(at, next)...)
		}
		at = next
	}
	b.commit()
	b.finish()
	guest.Wait()
	if b.res.Faults.Served == 0 || b.res.Pages.Placed < uint64(len(b.want)) {
		t.Errorf("result %+v", b.res)
	}
	if _, err := os.Stat(b.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the state was not removed: %v", err)
	}
}

// TestFaultsFirst makes the guest wait for pages at an intermediary that answers no
// prepaging, for pages of the source, and for pages that will never be sent.
func TestFaultsFirst(t *testing.T) {
	b := newBed(t, 1, pages.Block{Name: "ram", Length: 4 * mib, PageSize: pages.Size})
	b.open()
	h := b.holders[0]
	h.set(func() { h.holdBulk = true })
	b.scatter(0, 0, seq(0, 900)...)

	b.q.fault(1000)
	if i := <-b.wants; i != 1000 {
		t.Fatalf("the source was asked for page %d", i)
	}
	b.direct(b.conn.Urgent(), 0, 1000)
	b.q.await(1000)

	b.q.fault(899) // prepaging may have asked for it already, without success
	b.q.await(899)
	b.q.fault(1001)
	<-b.wants
	b.zeros(0, 1001)
	b.q.await(1001)
	b.q.fault(1002)
	<-b.wants
	b.scatter(0, 0, 1002)
	b.q.await(1002)
	h.set(func() { h.holdBulk = false })
	b.commit()
	b.q.fault(1023)
	b.finish()
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.urgent) != 2 || h.urgent[0] != 899 || h.urgent[1] != 1002 {
		t.Errorf("urgent reads of %v", h.urgent)
	}
	for r, n := range h.reads {
		if n != 1 && (n > 2 || r.Index != 899 && r.Index != 1002) {
			t.Errorf("page %d was read %d times", r.Index, n)
		}
	}
	if len(h.freed) == 0 {
		t.Error("no page was freed before the end")
	}
}

// TestInterruptedAndReopened ends the engine in the middle, twice: before and after
// the commit. A second one goes on from the state.
func TestInterruptedAndReopened(t *testing.T) {
	b := newBed(t, 2, pages.Block{Name: "ram", Length: 16 * mib, PageSize: pages.Size})
	b.q.slow = 50 * time.Microsecond
	b.open()
	guest := b.guest(2, 200, 3)
	b.direct(b.conn.Bulk(0), 0, seq(0, 1000)...)
	b.scatter(0, 0, seq(1000, 2000)...)
	b.q.awaitPlaced(300)
	b.interrupt()

	b.reopen()
	b.dial()
	b.scatter(1, 0, seq(2000, 3000)...)
	b.direct(b.conn.Bulk(1), 0, seq(3000, 3500)...)
	b.zeros(0, seq(3500, 4000)...)
	b.q.awaitPlaced(1200)
	b.commit()
	b.conn.Close()
	b.q.awaitPlaced(2500)
	b.interrupt()

	b.reopen()
	b.finish()
	guest.Wait()
	if b.res.Recoveries != 1 {
		t.Errorf("%d recoveries in the last process", b.res.Recoveries)
	}
}

// interrupt ends the engine as the end of its process would.
func (b *bed) interrupt() {
	b.t.Helper()
	b.cancel()
	<-b.done
	if b.err == nil {
		b.t.Fatal("the engine finished before it was interrupted")
	}
	if _, err := os.Stat(b.dir); err != nil {
		b.t.Fatal("the state is gone:", err)
	}
	b.conn.Close()
	b.wg.Wait()
	for {
		b.q.mu.Lock()
		broken := b.q.broken
		b.q.mu.Unlock()
		if broken {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func (b *bed) reopen() {
	b.t.Helper()
	e, err := Reopen(b.cfg)
	if err != nil {
		b.t.Fatal(err)
	}
	b.run(e)
}

// TestBrokenStream breaks QEMU's connection within a page record.
func TestBrokenStream(t *testing.T) {
	b := newBed(t, 1, pages.Block{Name: "ram", Length: 8 * mib, PageSize: pages.Size},
		pages.Block{Name: "rom", Length: 1 * mib, PageSize: pages.Size})
	b.q.breakAfter = 700
	b.open()
	guest := b.guest(3, 100, 4)
	b.direct(b.conn.Bulk(0), 0, seq(0, 1000)...)
	b.scatter(0, 0, seq(1000, 2304)...)
	b.commit()
	b.finish()
	guest.Wait()
	if b.res.Recoveries != 1 {
		t.Errorf("%d recoveries", b.res.Recoveries)
	}
}

// TestLostIntermediary takes an intermediary away for a while.
func TestLostIntermediary(t *testing.T) {
	b := newBed(t, 2, pages.Block{Name: "ram", Length: 8 * mib, PageSize: pages.Size})
	b.q.slow = 20 * time.Microsecond
	b.open()
	b.scatter(0, 0, seq(0, 1000)...)
	b.scatter(1, 0, seq(1000, 2048)...)
	b.commit()
	b.q.awaitPlaced(100)
	h := b.holders[1]
	h.set(func() { h.away = true })
	h.drop()
	for b.engine.Progress().Stalled == "" {
		time.Sleep(time.Millisecond)
	}
	b.q.fault(2047)
	h.set(func() { h.away = false })
	b.q.await(2047)
	b.finish()
	if h.attached < 2 {
		t.Errorf("attached %d times", h.attached)
	}
}

// TestBadAnswers lets an intermediary miss a page and give a broken one for a while.
// Neither is ever written.
func TestBadAnswers(t *testing.T) {
	b := newBed(t, 1, pages.Block{Name: "ram", Length: 1 * mib, PageSize: pages.Size})
	b.open()
	h := b.holders[0]
	h.set(func() { h.missing, h.corrupt = 1, 1 })
	b.scatter(0, 0, seq(0, 256)...)
	b.commit()
	for b.engine.Progress().Stalled == "" {
		time.Sleep(time.Millisecond)
	}
	b.finish()
}

// TestHugePages sends a block of 2 MiB pages by all ways at once.
func TestHugePages(t *testing.T) {
	b := newBed(t, 2, pages.Block{Name: "ram", Length: 16 * mib, PageSize: 2 * mib},
		pages.Block{Name: "rom", Length: 64 << 10, PageSize: pages.Size})
	b.open()
	guest := b.guest(3, 20, 5)
	r := rand.New(rand.NewPCG(6, 6))
	for at := pages.Index(0); at < 4096+10; {
		if at == 1024 {
			at = 1536 // a host page that is never sent
		}
		next := min(at+1+pages.Index(r.IntN(90)), 4096+10)
		if at < 1024 {
			next = min(next, 1024)
		}
		switch r.IntN(4) {
		case 0:
			b.direct(b.conn.Bulk(0), 0, seq(at, next)...)
		case 1:
			b.zeros(0, seq(at, next)...)
		default:
			b.scatter(r.IntN(2), 0, seq(at, next)...)
		}
		at = next
	}
	b.zeros(0, seq(4096+10, 4096+16)...)
	b.commit()
	b.finish()
	guest.Wait()
}

// TestCredit checks that the source never gets more room than there is, and that it
// gets more when pages were placed.
func TestCredit(t *testing.T) {
	b := newBed(t, 0, pages.Block{Name: "ram", Length: 4 * mib, PageSize: pages.Size})
	b.cfg.StoreBytes = 1 * mib
	b.start()
	b.dial()
	b.describe()
	b.expect(wire.TypeReady)
	const room = 256 * wire.MaxSealed
	if got := b.awaitCredit(1); got != room {
		t.Errorf("first credit of %d, want %d", got, room)
	}
	b.direct(b.conn.Bulk(0), 0, seq(0, 256)...)
	time.Sleep(50 * time.Millisecond)
	if got := b.awaitCredit(1); got != room {
		t.Errorf("credit of %d while nothing is placed, want %d", got, room)
	}
	b.handOver()
	b.expect(wire.TypeLoaded)
	b.awaitCredit(2*room - 64*wire.MaxSealed)
	b.direct(b.conn.Bulk(0), 0, seq(256, 448)...)
	b.direct(b.conn.Urgent(), 0, seq(448, 512)...)
	b.commit()
	b.finish()
}

func (b *bed) awaitCredit(least uint64) uint64 {
	b.t.Helper()
	for range 5000 {
		b.mu.Lock()
		c := b.credit
		b.mu.Unlock()
		if c >= least {
			return c
		}
		time.Sleep(time.Millisecond)
	}
	b.t.Fatalf("no credit of %d", least)
	return 0
}
