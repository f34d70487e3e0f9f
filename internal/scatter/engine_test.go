// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"context"
	"flag"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr/testr"
	"go.uber.org/goleak"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

func TestMain(m *testing.M) {
	// A case is a whole migration. The command line may ask for more of them.
	if err := flag.Set("rapid.checks", "40"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// run is one migration of a test.
type run struct {
	t       tb
	bed     *testbed
	src     *testSource
	dst     *testDestination
	lenders []*testLender
	cfg     Config

	play func() error // the source

	engine *Engine
	result Result
	err    error // of the engine
	srcErr error
}

func newRun(t tb, n int) *run { return newRunOn(newTestbed(t), n, 7) }

func newRunOn(bed *testbed, n int, seed uint64) *run {
	t := bed.t
	r := &run{t: t, bed: bed, src: newTestSource(t, n, seed), dst: bed.destination()}
	r.play = r.src.run
	r.cfg = Config{
		Migration: wire.NewMigrationID(), Wire: bed.options("source"),
		Log: testr.NewWithInterface(quiet{t}, testr.Options{Verbosity: 1}),
	}
	return r
}

// acceptFrom is an Acceptor that gives out what the channel brings.
func acceptFrom(conns <-chan net.Conn) Acceptor {
	return func(ctx context.Context) (net.Conn, error) {
		select {
		case c := <-conns:
			return c, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// quiet gives testr the Helper that *rapid.T lacks.
type quiet struct{ tb }

func (quiet) Helper() {}

func (r *run) lend(capacity ...int) {
	for _, n := range capacity {
		name := wire.Identity([]string{"anna", "bert", "carla", "dora"}[len(r.lenders)])
		r.lenders = append(r.lenders, r.bed.lender(name, n))
	}
}

// start builds the engine and the function that runs everything to the end.
func (r *run) start() func(context.Context) {
	conn := r.src.connect(r.t)
	r.cfg.Destination = r.dst.peer()
	for _, l := range r.lenders {
		r.cfg.Intermediaries = append(r.cfg.Intermediaries, l.peer())
	}
	conns := make(chan net.Conn, 1)
	conns <- conn
	r.cfg.Accept = acceptFrom(conns)
	if r.cfg.Switch == nil {
		r.cfg.Switch = func(context.Context) error { close(r.src.switched); return nil }
	}
	var err error
	if r.engine, err = New(r.cfg); err != nil {
		r.t.Fatal(err)
	}
	return func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() { r.srcErr = r.play() })
		stop := context.AfterFunc(ctx, func() { r.t.Log(fmt.Sprintf("out of time: %+v", r.engine.Progress())) })
		defer stop()
		r.result, r.err = r.engine.Run(ctx)
		conn.Close()
		wg.Wait()
	}
}

func (r *run) do() {
	r.start()(context.Background())
}

// succeeded checks what every successful migration must show.
func (r *run) succeeded() {
	if r.err != nil || r.srcErr != nil {
		r.dst.mu.Lock()
		defer r.dst.mu.Unlock()
		r.t.Fatalf("engine: %v; source: %v; destination: %v; %+v", r.err, r.srcErr, r.dst.errs, r.engine.Progress())
	}
	r.dst.verify(r.src.mem, r.src.unsent, r.lenders...)
	if p := r.engine.Progress(); p.Phase != Done || p.Pages.Safe != p.Pages.Total || p.Stalled != "" {
		r.t.Errorf("progress at the end: %+v", p)
	}
	if r.result.EvictionSeconds <= 0 || r.result.Switched.Before(r.result.Started) {
		r.t.Errorf("times of the result: %+v", r.result)
	}
	want := []wire.Phase{wire.PhasePrecopy, wire.PhaseSwitched, wire.PhaseDrained, wire.PhaseReleased}
	r.dst.mu.Lock()
	defer r.dst.mu.Unlock()
	if !slices.Equal(r.dst.phases, want) {
		r.t.Errorf("phases at the destination: %v, want %v", r.dst.phases, want)
	}
}

func TestImmediateWithoutIntermediaries(t *testing.T) {
	r := newRun(t, 3000)
	r.src.ping42 = true
	r.do()
	r.succeeded()
	for _, v := range []uint32{1, 2, 3, 4, 0x42} {
		if !r.src.ponged(v) {
			t.Errorf("PING %#x was not answered", v)
		}
	}
	if r.result.DirectBytes < 2000*pageBytes {
		t.Errorf("only %d direct bytes", r.result.DirectBytes)
	}
}

func TestImmediateWithIntermediaries(t *testing.T) {
	r := newRun(t, 6000)
	r.lend(10000, 10000, 10000)
	r.dst.credit = 500 * wire.MaxSealed
	r.dst.delay = func() { time.Sleep(2 * time.Millisecond) }
	r.do()
	r.succeeded()
	for _, l := range r.lenders {
		if len(l.held) == 0 || l.dissolved {
			t.Errorf("%s holds %d pages, dissolved %v", l.node, len(l.held), l.dissolved)
		}
	}
}

func TestHybridSendsOnePassBeforeTheSwitch(t *testing.T) {
	r := newRun(t, 4000)
	r.lend(10000, 10000)
	r.cfg.Strategy = Hybrid
	r.src.dirty = func(round int) []pages.Index {
		var list []pages.Index
		for range 300 {
			i := pages.Index(r.src.rng.IntN(len(r.src.mem)))
			r.src.mem[i] = r.src.rng.Uint32N(50) // some become zero
			list = append(list, i)
		}
		return list
	}
	r.do()
	r.succeeded()
	have := r.dst.layout.Pages() - r.dst.atSwitch.Absent
	if have < r.dst.layout.Pages()/2 {
		t.Errorf("only %d pages of %d known at the switch", have, r.dst.layout.Pages())
	}
	if r.result.Pages.Discarded == 0 {
		t.Error("no page was discarded: the test tests nothing")
	}
}
