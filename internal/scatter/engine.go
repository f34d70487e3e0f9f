// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/go-logr/logr"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu/multifd"
	"scattergather.io/scattergather/internal/wire"
)

// Engine scatters one VM. Its methods are safe for concurrent use; Run may be called
// once.
type Engine struct {
	cfg     Config
	log     logr.Logger
	key     wire.Key
	sealer  *wire.Sealer
	journal *wire.Journal
	barrier *multifd.Barrier

	// ctx ends when the engine stops, after a roll-back. Every goroutine is counted
	// in wg.
	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup

	// mu guards everything below it, and the holders and flights. It is never held
	// over I/O. changed announces new states, room that a reader of the source may go
	// on, outWake that the control lane has something to send.
	mu                     sync.Mutex
	changed, room, outWake *sync.Cond

	phase   Phase
	since   time.Time
	stalled string
	failure error // ends the engine
	surplus error // a connection of QEMU that nobody reads has pages
	// refusals counts how often the destination refused to commit.
	refusals int
	// ready, loaded, committed: what the destination said. handed: the device state
	// was given to the control lane. drained: QEMU has sent its last page.
	ready, loaded, committed, handed, drained, switched, converges bool

	source   *source
	channels []*source // of multifd
	layout   *pages.Layout
	ledger   *pages.Ledger
	safe     *pages.Bitmap // newest version acknowledged, and told where needed
	wanted   *pages.Bitmap // wanted at the destination and still at QEMU
	// sought are wanted pages that are looked for among the flights; empty else.
	sought  map[pages.Index]struct{}
	holders []*holder // 0 is the destination
	leftOut []Leg
	looks   []candidate
	pool    flights
	backlog line
	waiting int // pages in backlog
	urgent  urgentLane
	out     outbox
	counts  PageCounts
	result  Result
	pings   []uint32 // of the package, answered when it is loaded

	subMu     sync.Mutex
	subs      map[chan Progress]struct{}
	subClosed bool
}

// errDone is the cause with which a finished engine stops its goroutines.
var errDone = errors.New("the migration is complete")

// settleTimeout is how long a failure between the switch and the package waits for
// the package: see Engine.survives.
const settleTimeout = 2 * time.Second

// recommitFirst and recommitMost bound the pause before a refused commit is asked again.
const (
	recommitFirst = 100 * time.Millisecond
	recommitMost  = 5 * time.Second
)

// farewellTimeout bounds the wait for the destination to confirm that it heard of the
// release, which nothing depends on.
const farewellTimeout = time.Second

// New checks the configuration.
func New(cfg Config) (*Engine, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	cfg.setDefaults()
	e := &Engine{
		cfg: cfg, log: cfg.Log, key: wire.NewKey(), journal: wire.NewJournal(),
		barrier: multifd.NewBarrier(cfg.MultifdChannels),
		since:   time.Now(), subs: map[chan Progress]struct{}{}, sought: map[pages.Index]struct{}{},
	}
	e.sealer = wire.NewSealer(e.key)
	e.changed, e.room, e.outWake = sync.NewCond(&e.mu), sync.NewCond(&e.mu), sync.NewCond(&e.mu)
	e.urgent.wake = sync.NewCond(&e.mu)
	e.result = Result{Strategy: cfg.Strategy, IntermediaryBytes: map[string]uint64{}}
	e.holders = []*holder{newHolder(cfg.Destination, pages.Local, cfg.DirectTarget, &e.mu)}
	return e, nil
}

// Run scatters the VM until nothing of it is needed from this node. An error that
// wraps ErrRolledBack means that the guest runs on here and that nothing is left
// behind elsewhere. After the device state was handed over, Run does not fail: it
// stalls and tries again until ctx ends, and then returns an error that wraps
// ErrStalled.
func (e *Engine) Run(ctx context.Context) (Result, error) {
	e.ctx, e.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(e.ctx, e.wakeAll)
	defer stop()
	e.wg.Go(func() { e.watch(ctx) })
	e.wg.Go(e.report)
	err := e.run()
	if err != nil {
		err = e.finishFailed(err)
	} else {
		e.setPhase(Done)
	}
	e.cancel(errDone)
	e.wakeAll()
	e.wg.Wait()
	e.publish(true)
	return e.summary(), err
}

// watch turns the end of the caller's context into a failure, or, after the hand-over,
// into the end of a stalled engine.
func (e *Engine) watch(caller context.Context) {
	select {
	case <-caller.Done():
		cause := fmt.Errorf("cancelled: %w", context.Cause(caller))
		if e.survives(cause) {
			e.fail(cause)
		}
	case <-e.ctx.Done():
	}
}

// run is the migration from the first connection to the release.
func (e *Engine) run() error {
	if err := e.connect(); err != nil {
		return err
	}
	e.wg.Go(e.sendControl)
	e.wg.Go(e.readSource)
	if err := e.wait(e.ctx, e.settled); err != nil {
		return err
	}
	if err := e.commit(); err != nil {
		return err
	}
	return e.release()
}

// settled tells whether everything that a commit claims is true; the caller holds
// e.mu.
func (e *Engine) settled() bool {
	return e.drained && e.loaded && e.safe.Count() == e.ledger.Sent()
}

// commit asks the destination to take the VM over, and asks again when it refuses. A
// question that a lost connection swallowed is in the journal, and the answer comes
// again on every connection once it is given.
func (e *Engine) commit() error {
	for pause := recommitFirst; ; pause = min(2*pause, recommitMost) {
		e.mu.Lock()
		e.enter(Committing)
		asked := e.refusals
		e.post(&wire.Commit{Pages: e.ledger.Sent()})
		e.mu.Unlock()
		if err := e.wait(e.ctx, func() bool { return e.committed || e.refusals > asked }); err != nil {
			return err
		}
		e.mu.Lock()
		committed := e.committed
		e.mu.Unlock()
		if committed {
			e.stall("")
			return nil
		}
		if err := e.pause(pause); err != nil {
			return err
		}
	}
}

// release tells QEMU to go and waits until it did. The destination hears of it for
// its own status; the intermediaries notice that the source left, and keep the pages
// for the destination.
func (e *Engine) release() error {
	e.setPhase(Releasing)
	if err := e.source.shut(); err != nil {
		e.log.Error(err, "The source QEMU did not take its release as expected; nothing of the VM is needed from it any more")
	}
	e.mu.Lock()
	e.result.Released = time.Now()
	e.post(&wire.State{Phase: wire.PhaseReleased})
	e.mu.Unlock()
	ctx, cancel := context.WithTimeout(e.ctx, farewellTimeout)
	defer cancel()
	if err := e.wait(ctx, func() bool { return e.out.empty() && e.unapplied() == 0 }); err != nil {
		e.log.V(1).Info("The destination did not confirm the end", "reason", err.Error())
	}
	return nil
}

// finishFailed ends a migration that did not commit.
func (e *Engine) finishFailed(cause error) error {
	e.mu.Lock()
	handed := e.handed
	e.mu.Unlock()
	if handed {
		return fmt.Errorf("%w: %w", ErrStalled, cause)
	}
	e.rollBack(cause)
	e.setPhase(Failed)
	return fmt.Errorf("%w: %w", ErrRolledBack, cause)
}

// fail ends the engine with the first failure.
func (e *Engine) fail(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.failure == nil {
		e.failure = err
	}
	e.broadcast()
}

// survives decides what a failure of something outside this process means. Before the
// switch is asked for, the migration fails. After the device state was handed over it
// does not: the caller has to go on as well as it can. Between the two nobody knows
// whether QEMU has given the guest up already, because its package may lie in the
// socket; closing then would freeze the guest. So the failure waits for the package,
// and is final only if none comes.
func (e *Engine) survives(err error) bool {
	e.mu.Lock()
	if !e.switched && !e.handed {
		e.mu.Unlock()
		e.fail(err)
		return false
	}
	e.mu.Unlock()
	ctx, cancel := context.WithTimeoutCause(e.ctx, settleTimeout, err)
	defer cancel()
	if failed := e.wait(ctx, func() bool { return e.handed }); failed != nil {
		e.fail(err)
		return false
	}
	return true
}

// stopped returns why nobody should go on; the caller holds e.mu.
func (e *Engine) stopped() error {
	if e.failure != nil {
		return e.failure
	}
	return context.Cause(e.ctx)
}

// wait returns nil when the condition holds, which is tested under e.mu whenever
// changed is broadcast, or why it never will.
func (e *Engine) wait(ctx context.Context, holds func() bool) error {
	stop := context.AfterFunc(ctx, e.wakeAll)
	defer stop()
	e.mu.Lock()
	defer e.mu.Unlock()
	for !holds() {
		if err := e.stopped(); err != nil {
			return err
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		e.changed.Wait()
	}
	return nil
}

// pause waits that long, or returns why the engine stops.
func (e *Engine) pause(d time.Duration) error {
	ctx, cancel := context.WithTimeout(e.ctx, d)
	defer cancel()
	err := e.wait(ctx, func() bool { return false })
	if errors.Is(err, context.DeadlineExceeded) && e.ctx.Err() == nil {
		return nil
	}
	return err
}

func (e *Engine) wakeAll() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.broadcast()
}

// broadcast wakes everybody who waits for anything; the caller holds e.mu.
func (e *Engine) broadcast() {
	e.changed.Broadcast()
	e.room.Broadcast()
	e.outWake.Broadcast()
	e.urgent.wake.Broadcast()
	for _, h := range e.holders {
		h.wake.Broadcast()
	}
}

// enter begins a phase; phases only go forward. The caller holds e.mu.
func (e *Engine) enter(p Phase) {
	if p > e.phase {
		e.phase, e.since = p, time.Now()
		e.log.V(1).Info("Entered phase", "phase", p.String())
	}
	e.changed.Broadcast()
}

func (e *Engine) setPhase(p Phase) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.enter(p)
}

// stall says why nothing moves; an empty reason says that it moves again.
func (e *Engine) stall(reason string) {
	e.mu.Lock()
	was := e.stalled
	e.stalled = reason
	e.mu.Unlock()
	if reason != "" && reason != was {
		e.log.Info("Stalled; the stream of the source QEMU stays open", "reason", reason)
	}
}

// summary completes the result.
func (e *Engine) summary() Result {
	e.mu.Lock()
	defer e.mu.Unlock()
	r := e.result
	r.Pages = e.counts
	if e.safe != nil {
		r.Pages.Total, r.Pages.Safe = e.layout.Pages(), e.safe.Count()
	}
	r.DirectBytes, r.UrgentBytes = e.holders[0].sent, e.urgent.bytes
	for _, h := range e.holders[1:] {
		r.IntermediaryBytes[h.peer.Name] = h.sent
	}
	if !r.Released.IsZero() {
		r.EvictionSeconds = r.Released.Sub(r.Started).Seconds()
	}
	return r
}
