// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
	"scattergather.io/scattergather/internal/wire"
)

// dirtier changes n random pages, some of them to zeros.
func dirtier(s *testSource, n int) func(int) []pages.Index {
	return func(int) []pages.Index {
		var list []pages.Index
		for range n {
			i := pages.Index(s.rng.IntN(len(s.mem)))
			s.mem[i] = s.rng.Uint32N(50)
			list = append(list, i)
		}
		return list
	}
}

// A source without post-copy ends in pre-copy; its device state is wrapped.
func TestSourceWithoutPostcopy(t *testing.T) {
	r := newRun(t, 1500)
	r.lend(10000)
	r.src.postcopy, r.src.rounds = false, 4
	r.src.dirty = dirtier(r.src, 200)
	r.dst.credit = 1000 * wire.MaxSealed
	r.cfg.Switch = func(context.Context) error { return errors.New("must not be called") }
	r.cfg.PageSizes = map[string]uint64{"huge": 4 * pages.Size}
	r.do()
	r.succeeded()
	tail := append([]byte{4}, testDeviceState...)
	if want := qemu.WrapTail(tail, wrapPing); !bytes.Equal(r.dst.pkg, want) {
		t.Errorf("package %q, want %q", r.dst.pkg, want)
	}
	if got := r.dst.setup.Blocks[2].PageSize; got != 4*pages.Size {
		t.Errorf("the block of huge pages has pages of %d bytes", got)
	}
}

// Pages that QEMU never sends (balloon, unplugged memory) are zero.
func TestPagesThatAreNeverSentAreZero(t *testing.T) {
	for _, strategy := range []Strategy{Immediate, Hybrid} {
		r := newRun(t, 1000)
		r.cfg.Strategy = strategy
		r.src.unsent = map[pages.Index]bool{}
		for i := pages.Index(100); i < 300; i++ {
			r.src.unsent[i] = true
		}
		r.src.unsent[0] = true
		r.do()
		r.succeeded()
		if r.result.Pages.Unsent != 201 {
			t.Errorf("%v: %d pages unsent, want 201", strategy, r.result.Pages.Unsent)
		}
	}
}

// A wanted page arrives although no holder has room for anything else.
func TestWantedPageOvertakesEverything(t *testing.T) {
	r := newRun(t, 3000)
	r.dst.credit = 64 * wire.MaxSealed // and no more than that is ever stored in bulk
	stuck := make(chan struct{})
	var once sync.Once
	release := make(chan struct{})
	let := sync.OnceFunc(func() { close(release) })
	t.Cleanup(let)
	r.dst.delay = func() { once.Do(func() { close(stuck) }); <-release }
	wanted := []pages.Index{2900, 1500, 2}
	r.src.mem[2900], r.src.mem[1500], r.src.mem[2] = 5, 6, 7
	arrived := make(chan pages.Index, 100)
	r.dst.onStored = func(urgent bool, i pages.Index) {
		if urgent {
			arrived <- i
		}
	}
	run := r.start()
	done := make(chan struct{})
	go func() { defer close(done); run(context.Background()) }()
	<-stuck
	for !r.handed() {
		time.Sleep(time.Millisecond)
	}
	for _, i := range wanted {
		if err := r.dst.want(i); err != nil {
			t.Fatal(err)
		}
		for got := pages.Index(0); got != i; {
			select {
			case got = <-arrived:
			case <-time.After(5 * time.Second):
				t.Fatalf("page %d did not arrive: %+v", i, r.engine.Progress())
			}
		}
	}
	let()
	<-done
	r.succeeded()
	if p := r.result.Pages; p.Wanted != 3 || p.Fetched == 0 || r.result.UrgentBytes == 0 {
		t.Errorf("%+v, %d urgent bytes", p, r.result.UrgentBytes)
	}
}

// A wanted page that is under way already is sent again, at once.
func TestWantedPageUnderWayIsRepeated(t *testing.T) {
	r := newRun(t, 2000)
	r.lend(10000)
	r.dst.credit = 0
	release := make(chan struct{})
	let := sync.OnceFunc(func() { close(release) })
	t.Cleanup(let)
	r.lenders[0].delay = func() { <-release }
	arrived := make(chan pages.Index, 100)
	r.dst.onStored = func(urgent bool, i pages.Index) { arrived <- i }
	run := r.start()
	done := make(chan struct{})
	go func() { defer close(done); run(context.Background()) }()
	var page pages.Index
	for found := false; !found; time.Sleep(time.Millisecond) {
		r.engine.mu.Lock()
		if r.engine.handed {
			for _, st := range r.engine.holders[1].lanes {
				if len(st.flights) > 0 {
					page, found = st.flights[0].refs[0].index, true
				}
			}
		}
		r.engine.mu.Unlock()
	}
	if err := r.dst.want(page); err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-arrived:
		if got != page {
			t.Errorf("page %d arrived, wanted %d", got, page)
		}
	case <-time.After(5 * time.Second):
		t.Error("the wanted page did not arrive")
	}
	let()
	<-done
	r.succeeded()
	if r.result.Pages.Repeated == 0 {
		t.Error("nothing was repeated")
	}
}

func TestWantOfAPageThatDoesNotExistEndsTheConnection(t *testing.T) {
	r := newRun(t, 1000)
	r.src.hold = make(chan struct{})
	run := r.start()
	done := make(chan struct{})
	go func() { defer close(done); run(context.Background()) }()
	for !r.handed() {
		time.Sleep(time.Millisecond)
	}
	if err := r.dst.want(1 << 40); err != nil {
		t.Fatal(err)
	}
	for r.engine.Progress().Stalled == "" && r.reconnects() == 0 {
		time.Sleep(time.Millisecond)
	}
	close(r.src.hold)
	<-done
	r.succeeded()
}

func (r *run) reconnects() int {
	r.engine.mu.Lock()
	defer r.engine.mu.Unlock()
	return r.engine.result.Reconnects
}

// Whatever the guest writes and wherever there is room, the destination ends up with
// every page in its newest version, exactly as the guest left it.
func TestEveryPageArrivesInItsNewestVersion(t *testing.T) {
	bed := newTestbed(t)
	rapid.Check(t, func(t *rapid.T) {
		r := newRunOn(bed.with(t), rapid.IntRange(24, 800).Draw(t, "pages"), rapid.Uint64().Draw(t, "seed"))
		r.cfg.Log = r.cfg.Log.V(1)
		r.cfg.Strategy = Strategy(rapid.IntRange(0, 1).Draw(t, "strategy"))
		r.cfg.FlightBytes = rapid.SampledFrom([]int{1, 8 << 20}).Draw(t, "flight")
		for range rapid.IntRange(0, 3).Draw(t, "lenders") {
			r.lend(rapid.IntRange(1, 600).Draw(t, "capacity"))
			last := r.lenders[len(r.lenders)-1]
			last.grant = rapid.SampledFrom([]uint64{last.grant, 1 << 40}).Draw(t, "grant")
		}
		r.dst.credit = rapid.SampledFrom([]uint64{64 * wire.MaxSealed, 200 * wire.MaxSealed, 1 << 40}).Draw(t, "credit")
		r.src.dirty = dirtier(r.src, rapid.IntRange(0, 200).Draw(t, "dirty"))
		r.src.rounds = rapid.IntRange(0, 3).Draw(t, "rounds")
		r.src.postcopy = rapid.IntRange(0, 4).Draw(t, "postcopy") > 0
		r.src.ping42 = rapid.Bool().Draw(t, "ping42")
		if rapid.Bool().Draw(t, "unsent") {
			r.src.unsent = map[pages.Index]bool{3: true, 4: true}
			r.src.mem[3], r.src.mem[4] = 0, 0
		}
		wants(r, rapid.Uint64().Draw(t, "wants"), rapid.IntRange(0, 30).Draw(t, "lost"))
		r.do()
		r.succeeded()
	})
}

// wants makes the destination ask for random pages once it has the package, and lose
// its connection once after that many frames, when that is above 0.
func wants(r *run, seed uint64, lostAfter int) {
	rng := rand.New(rand.NewPCG(seed, 2))
	frames := 0
	r.dst.onFrame = func(l *wire.Lane, f *wire.Frame) error {
		r.dst.mu.Lock()
		whole := r.dst.pkgWhole
		if whole {
			frames++
		}
		lost := whole && frames == lostAfter
		i := pages.Index(rng.IntN(len(r.src.mem)))
		r.dst.mu.Unlock()
		if lost {
			return errors.New("lost on purpose")
		}
		if whole {
			_ = r.dst.want(i, (i+7)%pages.Index(len(r.src.mem)))
		}
		return nil
	}
}
