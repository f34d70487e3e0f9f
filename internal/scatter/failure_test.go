// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// rolledBack checks what every failure before the hand-over must leave: an error that
// names the cause, a guest that runs on, and peers that have forgotten the VM.
func (r *run) rolledBack(cause string) {
	if !errors.Is(r.err, ErrRolledBack) || !strings.Contains(r.err.Error(), cause) {
		r.t.Fatalf("error %v, want a roll-back because of %q", r.err, cause)
	}
	select {
	case status, ok := <-r.src.shut:
		if ok && status == 0 {
			r.t.Error("the source QEMU was told that all went well")
		}
	case <-time.After(5 * time.Second):
		r.t.Error("the stream of the source QEMU is still open")
	}
	r.dst.mu.Lock()
	defer r.dst.mu.Unlock()
	if r.dst.committed || r.dst.pkgWhole {
		r.t.Error("the destination has the device state")
	}
	for _, l := range r.lenders {
		l.mu.Lock()
		if l.grant > 0 && !l.dissolved && !l.left {
			r.t.Errorf("%s was not asked to forget", l.node)
		}
		l.mu.Unlock()
	}
	if p := r.engine.Progress(); p.Phase != Failed {
		r.t.Errorf("phase %v", p.Phase)
	}
}

func TestDestinationThatRefusesTheVM(t *testing.T) {
	r := newRun(t, 500)
	r.lend(1000)
	r.dst.refuse = errors.New("machine type pc-q35-10.0 is not supported")
	r.do()
	r.rolledBack("machine type pc-q35-10.0 is not supported")
}

func TestDestinationThatIsNeverReady(t *testing.T) {
	r := newRun(t, 500)
	r.lend(1000)
	r.dst.readyAfter = 2 * time.Second
	r.cfg.ReadyTimeout = 100 * time.Millisecond
	r.do()
	r.rolledBack("not ready within 100ms")
	if r.dst.told() == "" {
		t.Error("the destination was not told")
	}
}

func TestDestinationThatCannotBeReached(t *testing.T) {
	r := newRun(t, 500)
	r.lend(1000)
	r.dst.addr = "127.0.0.1:1"
	r.do()
	if !errors.Is(r.err, ErrRolledBack) || !strings.Contains(r.err.Error(), "connecting to the destination") {
		t.Fatal(r.err)
	}
}

func TestDestinationOfAnotherName(t *testing.T) {
	r := newRun(t, 500)
	run := r.start()
	r.engine.cfg.Destination.Identity = "somebody"
	run(context.Background())
	if !errors.Is(r.err, ErrRolledBack) || !errors.Is(r.err, wire.ErrPeer) {
		t.Fatal(r.err)
	}
}

func TestSourceThatBreaksBeforeTheSwitch(t *testing.T) {
	for _, cut := range []int{1, 700, 2500} {
		r := newRun(t, 3000)
		r.lend(10000)
		r.cfg.Strategy = Hybrid
		r.dst.credit = 300 * wire.MaxSealed
		r.src.cut = cut
		r.do()
		r.rolledBack("the source closed it early")
		if r.dst.told() == "" || !r.lenders[0].dissolved {
			t.Errorf("cut at %d: destination told %q, intermediary dissolved %v", cut, r.dst.told(), r.lenders[0].dissolved)
		}
	}
}

func TestHypervisorThatDoesNotSwitch(t *testing.T) {
	r := newRun(t, 500)
	r.src.dirty = dirtier(r.src, 10)
	r.cfg.Switch = func(context.Context) error { return errors.New("postcopy is off") }
	r.do()
	r.rolledBack("postcopy is off")
}

func TestCancelBeforeTheSwitch(t *testing.T) {
	r := newRun(t, 3000)
	r.lend(10000)
	r.cfg.Strategy = Hybrid
	ctx, cancel := context.WithCancel(context.Background())
	r.dst.onStored = func(bool, pages.Index) { cancel() }
	r.dst.delay = func() { time.Sleep(5 * time.Millisecond) }
	r.start()(ctx)
	r.rolledBack("cancelled")
}

func TestIntermediaryLostBeforeTheSwitch(t *testing.T) {
	r := newRun(t, 3000)
	r.lend(10000, 10000)
	r.cfg.Strategy = Hybrid
	r.dst.credit = 0
	r.lenders[1].onFrame = func(n int, c *wire.Conn) {
		if n < 3 {
			return
		}
		for stored := false; !stored; time.Sleep(time.Millisecond) {
			r.engine.mu.Lock()
			stored = r.engine.holders[2].stored
			r.engine.mu.Unlock()
		}
		c.Close()
	}
	r.do()
	r.rolledBack("intermediary bert was lost")
}

func TestIntermediaryLostBeforeItHeldAnything(t *testing.T) {
	r := newRun(t, 3000)
	r.lend(10000, 10000)
	r.cfg.Strategy = Hybrid
	r.dst.credit = 0
	r.lenders[1].onFrame = func(n int, c *wire.Conn) { c.Close() }
	r.do()
	r.succeeded()
	if r.result.Pages.Replaced == 0 {
		t.Error("nothing was placed again: the test tests nothing")
	}
}

func TestIntermediaryThatLendsNothingIsLeftOut(t *testing.T) {
	r := newRun(t, 1000)
	r.lend(1000, 0, 1000)
	r.dst.credit = 0
	r.do()
	r.succeeded()
	p := r.engine.Progress()
	if len(p.Intermediaries) != 3 || p.Intermediaries[2].Name != "bert" || p.Intermediaries[2].Connected ||
		!strings.Contains(p.Intermediaries[2].Reason, "no memory to lend") {
		t.Errorf("%+v", p.Intermediaries)
	}
}

func TestIntermediaryThatIsFullAfterAll(t *testing.T) {
	r := newRun(t, 3000)
	r.lend(200, 10000)
	r.lenders[0].grant = 1 << 40
	r.dst.credit = 0
	r.do()
	r.succeeded()
	if r.result.Pages.Replaced == 0 {
		t.Error("no batch was refused: the test tests nothing")
	}
}

// After the switch, what a lost intermediary did not acknowledge goes elsewhere; what it
// did acknowledge still lies there.
func TestIntermediaryLostAfterTheSwitch(t *testing.T) {
	r := newRun(t, 4000)
	r.lend(10000, 10000)
	r.dst.credit = 0
	r.src.hold = make(chan struct{})
	r.lenders[0].onFrame = func(n int, c *wire.Conn) {
		if n == 12 {
			c.Close()
		}
	}
	r.dst.onFrame = func(l *wire.Lane, f *wire.Frame) error {
		if f.Type == wire.TypePackage {
			close(r.src.hold)
		}
		return nil
	}
	r.do()
	r.succeeded()
	if r.result.Pages.Replaced == 0 {
		t.Error("nothing was placed again: the test tests nothing")
	}
}

// An intermediary that comes back after the switch is used again.
func TestIntermediaryThatComesBackAfterTheSwitch(t *testing.T) {
	r := newRun(t, 1500)
	r.lend(10000)
	r.dst.credit = 0
	r.lenders[0].onFrame = func(n int, c *wire.Conn) {
		if n%40 == 39 && r.handed() {
			c.Close()
		}
	}
	r.do()
	r.succeeded()
	if r.result.Pages.Replaced == 0 {
		t.Error("nothing was placed again: the test tests nothing")
	}
}

// After the hand-over the stream of the source is never closed: the engine stalls until
// it is told to stop.
func TestSourceThatBreaksAfterTheSwitch(t *testing.T) {
	r := newRun(t, 3000)
	r.src.hold = make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	run := r.start()
	done := make(chan struct{})
	go func() { defer close(done); run(ctx) }()
	for !r.handed() {
		time.Sleep(time.Millisecond)
	}
	r.src.cut = r.src.records + 100
	close(r.src.hold)
	for r.engine.Progress().Stalled == "" {
		time.Sleep(time.Millisecond)
	}
	if p := r.engine.Progress(); p.Phase != Scattering || !strings.Contains(p.Stalled, "stream broke") {
		t.Errorf("%+v", p)
	}
	cancel()
	<-done
	if !errors.Is(r.err, ErrStalled) || r.dst.told() != "" {
		t.Errorf("error %v; aborted %q", r.err, r.dst.told())
	}
}

func (r *run) handed() bool {
	r.engine.mu.Lock()
	defer r.engine.mu.Unlock()
	return r.engine.handed
}

// A destination that is gone for a while after the switch gets what it missed.
func TestDestinationLostAfterTheSwitch(t *testing.T) {
	for _, lost := range []struct {
		what wire.Type
		nth  int
	}{{wire.TypePages, 3}, {wire.TypePages, 20}, {wire.TypeRecords, 4}, {wire.TypeCommit, 1}} {
		r := newRun(t, 5000)
		r.lend(10000)
		r.dst.credit = 900 * wire.MaxSealed
		r.src.hold = make(chan struct{})
		n := 0
		r.dst.onFrame = func(l *wire.Lane, f *wire.Frame) error {
			r.dst.mu.Lock()
			defer r.dst.mu.Unlock()
			if f.Type == wire.TypePackage {
				close(r.src.hold)
			}
			if r.dst.pkgWhole && f.Type == lost.what {
				if n++; n == lost.nth {
					return errors.New("lost on purpose")
				}
			}
			return nil
		}
		r.do()
		if n < lost.nth {
			t.Errorf("only %d frames of type %d", n, lost.what)
		}
		r.succeeded()
		if r.result.Reconnects != 1 {
			t.Errorf("%d reconnects", r.result.Reconnects)
		}
	}
}

// A connection that nobody expects, such as that of postcopy-preempt, has pages that
// would be missed.
func TestSourceThatOpensAConnectionTooMany(t *testing.T) {
	r := newRun(t, 300)
	run := r.start()
	accept, conns := r.engine.cfg.Accept, make(chan net.Conn, 2)
	first, err := accept(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	keep := r.src.conn
	conns <- first
	conns <- r.src.connect(t)
	defer r.src.conn.Close()
	r.src.conn = keep
	r.src.dirty = dirtier(r.src, 10)
	r.engine.cfg.Accept = acceptFrom(conns)
	r.engine.cfg.Switch = func(context.Context) error { return nil } // it never comes to it
	run(context.Background())
	r.rolledBack("postcopy-preempt")
}

// A destination that cannot commit yet is asked again.
func TestDestinationThatRefusesTheFirstCommit(t *testing.T) {
	r := newRun(t, 500)
	r.dst.refuseCommits = 2
	r.do()
	r.succeeded()
}
