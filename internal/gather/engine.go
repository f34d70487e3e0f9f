// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/go-logr/logr"

	"scattergather.io/scattergather/internal/flow"
	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
	"scattergather.io/scattergather/internal/wire"
)

// Engine gathers one VM. Make it by New or Reopen, hand it the source's connections by
// Attach, and call Run once.
type Engine struct {
	cfg Config
	log logr.Logger

	// attach takes the source's newest connection to Run.
	attach chan *wire.Conn
	// cancel is closed by Cancel.
	cancel chan struct{}
	// described is closed when the source has described the VM. What follows is set
	// before that and never changes.
	described chan struct{}
	layout    *pages.Layout
	sealer    *wire.Sealer
	opening   *qemu.Setup
	// packaged is closed when the whole device state has arrived.
	packaged chan struct{}

	// wakeWriter and wakeTend tell the goroutine of that name to look again.
	wakeWriter, wakeTend signal
	// bulkFrames and urgentFrames hold the answers of intermediaries.
	bulkFrames, urgentFrames *wire.Pool[wire.Frame]

	mu       sync.Mutex
	over     bool // Run has ended; last is all that can be said
	state    *state
	book     *book
	stage    stage
	reopened bool
	source   wire.Identity
	session  *session
	// sourceLeft is when the last session ended.
	sourceLeft time.Time
	pkg        []byte
	pkgTotal   uint64
	phase      wire.Phase // of the source

	setupSeq  uint64 // number of the Setup frame
	ready     bool   // QEMU accepted the VM
	commitSeq uint64 // number of the last Commit frame
	commitErr error  // why it was not granted
	// cancelled is set by Cancel: no device state is taken any more.
	cancelled bool

	// settled tells that pages are not busy any more.
	settled *sync.Cond
	// pumping is true while QEMU's stream takes pages.
	pumping      bool
	parcels      int // under way
	spareParcels []*parcel

	holders    []*holder
	shared     *flow.Window // of all holders together
	backlog    int          // Reads that are under way or wait for the writer
	near       int          // pages that faults let prepaging fetch: see nearPages
	dissolving bool
	spare      []*reply

	flights      fifo[*flight]
	spareFlights []*flight
	unplaced     int // pages in flights
	ping         uint32
	punches      runs

	stats   stats
	stalls  map[string]string
	subs    map[chan Progress]struct{}
	last    Progress // once over
	clients *clients
}

// signal wakes one goroutine; signals that come before it looks are one.
type signal chan struct{}

func newSignal() signal { return make(signal, 1) }

func (s signal) raise() {
	select {
	case s <- struct{}{}:
	default:
	}
}

// New returns the engine of a gather that begins. It makes the state directory, which
// must not exist.
func New(cfg Config) (*Engine, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	st, err := newState(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	return newEngine(cfg, st), nil
}

// Reopen returns the engine of a gather that an earlier process left behind. When its
// error wraps ErrNotResumable the state is of no more use and was removed.
func Reopen(cfg Config) (*Engine, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	st, l, err := openState(cfg.StateDir, cfg.Migration)
	if errors.Is(err, ErrNotResumable) {
		return nil, errors.Join(err, st.remove())
	}
	if err != nil {
		return nil, err
	}
	e := newEngine(cfg, st)
	if err := e.describe(l); err != nil {
		return nil, errors.Join(err, st.close())
	}
	e.reopened, e.ready = true, true
	e.source = st.meta.Source
	e.stage = st.meta.Stage
	if e.phase = wire.PhaseSwitched; st.meta.Released {
		e.phase = wire.PhaseReleased
	}
	e.sourceLeft = time.Now()
	e.book.committed = st.meta.Committed
	close(e.described)
	close(e.packaged)
	return e, nil
}

func newEngine(cfg Config, st *state) *Engine {
	cfg.setDefaults()
	e := &Engine{
		cfg: cfg, log: cfg.Log, state: st, source: cfg.Source,
		attach: make(chan *wire.Conn, 1), cancel: make(chan struct{}), described: make(chan struct{}), packaged: make(chan struct{}),
		wakeWriter: newSignal(), wakeTend: newSignal(),
		bulkFrames:   wire.NewFramePool(maxReads + pages.MaxHolders*wire.MaxLanes),
		urgentFrames: wire.NewFramePool(maxReads + pages.MaxHolders),
		shared:       flow.NewWindow(sharedWindow(cfg.PrepageTarget)),
		stalls:       make(map[string]string),
		subs:         make(map[chan Progress]struct{}),
		ping:         firstPing,
	}
	e.settled = sync.NewCond(&e.mu)
	e.stats = newStats()
	return e
}

// describe sets what follows from the VM's description, which is in the state.
func (e *Engine) describe(l *pages.Layout) error {
	su := e.state.meta.Setup
	e.layout = l
	e.sealer = wire.NewSealer(su.Key)
	e.opening = &qemu.Setup{
		Config: su.Config, Machine: su.Machine, Postcopy: true, Early: su.Early,
		RAM: qemu.RAMStart{Section: su.Section, Instance: su.Instance, Version: su.Version, Blocks: su.Blocks},
	}
	if e.cfg.StoreBytes == 0 {
		e.cfg.StoreBytes = l.Bytes()
	}
	e.book = newBook(l, e.state.where, e.cfg.Pivots)
	return e.addHolders(su.Holders)
}

// Attach hands the engine a connection of the source: the first one, or a new one
// after the last was lost, which it replaces. The engine owns it from now on, unless
// an error is returned.
func (e *Engine) Attach(conn *wire.Conn) error {
	if conn.Role() != wire.SourceToDestination || conn.Migration() != e.cfg.Migration {
		return fmt.Errorf("a connection from %s to the destination of migration %s is not for %s", conn.Role(), conn.Migration(), e.cfg.Migration)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.over {
		return fmt.Errorf("the gather of migration %s is over", e.cfg.Migration)
	}
	if e.source == "" {
		e.source = conn.Peer()
	}
	if e.source != conn.Peer() {
		return fmt.Errorf("migration %s comes from node %q and not from %q", e.cfg.Migration, e.source, conn.Peer())
	}
	select {
	case old := <-e.attach:
		old.Close()
	default:
	}
	if e.session != nil {
		e.session.conn.Close() // its loss was not noticed here yet
	}
	e.attach <- conn
	return nil
}

// Run gathers until the destination QEMU has every page, or until the gather failed
// before the guest ran there. When ctx ends after the device state went into QEMU, the
// state directory is kept for Reopen; else it is removed.
func (e *Engine) Run(ctx context.Context) (Result, error) {
	// The source's connection outlives ctx for as long as it takes to say why.
	inner, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	ctx, fail := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { e.serveSources(inner, fail) })
	wg.Go(func() { e.tend(inner) })
	wg.Go(func() {
		select {
		case <-e.cancel:
			fail(ErrCancelled)
		case <-ctx.Done():
		}
	})
	err := e.gather(ctx)
	if err != nil {
		err = e.cfg.Explain(err)
		e.refuse(err)
	}
	stop(err)
	fail(err)
	wg.Wait()
	return e.finish(err)
}

// Cancel ends a gather that has not got the device state. Afterwards it returns
// ErrSwitched: the guest may run here, and is nowhere else.
func (e *Engine) Cancel() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.handed() {
		return ErrSwitched
	}
	if !e.cancelled {
		e.cancelled = true
		close(e.cancel)
	}
	return nil
}

// gather goes through the stages.
func (e *Engine) gather(ctx context.Context) error {
	c := e.startHolders(ctx)
	defer c.stop()
	start := e.begin
	if e.reopened {
		start = e.resume
	}
	f, err := start(ctx)
	for !errors.Is(err, ErrCompleted) {
		if errors.Is(err, ErrNotResumable) {
			c.dissolve() // nobody will ever ask for these pages
		}
		if err != nil {
			return err
		}
		if err = e.pump(ctx, f); err == nil {
			break
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if errors.Is(err, ErrRefused) {
			return err
		}
		f, err = e.recover(ctx, err)
	}
	c.dissolve()
	e.farewell(ctx)
	return nil
}

// farewell gives the source time to hear that it is not needed any more: were the
// connection closed at once, that word could be lost with it, and nobody would be left
// to repeat it.
func (e *Engine) farewell(ctx context.Context) {
	deadline := time.Now().Add(farewellTime)
	for {
		e.mu.Lock()
		gone := e.session == nil && time.Since(e.sourceLeft) > farewellAway
		over := e.phase >= wire.PhaseReleased || gone
		e.mu.Unlock()
		if over || time.Now().After(deadline) || !pause(ctx, farewellEvery) {
			return
		}
	}
}

const (
	// farewellTime is how long a source that is connected may take to confirm, and
	// farewellAway how long one may be away that could come back to ask.
	farewellTime  = 30 * time.Second
	farewellAway  = 3 * time.Second
	farewellEvery = 5 * time.Millisecond
)

// interrupted tells whether an engine that ends with err leaves a guest behind that
// can be gathered for by another process.
func (e *Engine) interrupted(err error) bool {
	return err != nil && e.stage >= stageDelivering && !errors.Is(err, ErrRefused) && !errors.Is(err, ErrNotResumable)
}

// finish releases everything.
func (e *Engine) finish(err error) (Result, error) {
	e.mu.Lock()
	res := e.result()
	e.last = e.progress()
	if e.last.Phase = Done; err != nil {
		e.last.Phase = Failed
	}
	e.over = true
	select {
	case conn := <-e.attach:
		conn.Close()
	default:
	}
	e.mu.Unlock()
	e.publish(true)
	if e.interrupted(err) {
		return res, errors.Join(fmt.Errorf("%w: %w", ErrInterrupted, err), e.state.close())
	}
	return res, errors.Join(err, e.state.remove())
}

// refuse tells the source why the gather ends before it has taken the VM over.
func (e *Engine) refuse(err error) {
	e.mu.Lock()
	s := e.session
	kept := e.interrupted(err)
	e.mu.Unlock()
	if s == nil || kept || errors.Is(err, ErrAborted) {
		return
	}
	code := wire.CodeInternal
	switch {
	case errors.Is(err, ErrRefused):
		code = wire.CodeIncompatible
	case errors.Is(err, wire.ErrProtocol):
		code = wire.CodeProtocol
	case errors.Is(err, context.Canceled) || errors.Is(err, ErrCancelled):
		code = wire.CodeStopping
	}
	s.conn.Fail(&wire.Error{Code: code, Text: err.Error()})
}
