// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"scattergather.io/scattergather/internal/flow"
	"scattergather.io/scattergather/internal/wire"
)

const (
	// redialFirst and redialMost bound the pause between attempts to reach an
	// intermediary.
	redialFirst = 50 * time.Millisecond
	redialMost  = 2 * time.Second
)

// holder is an intermediary of the migration's table. All but the first fields are
// guarded by Engine.mu.
type holder struct {
	e    *Engine
	k    int
	info wire.Holder
	wake signal

	link      *link // nil while not attached
	window    *flow.Window
	dissolved bool
	everUp    bool
	stats     legStats
}

// link is one connection to an intermediary while it lasts.
type link struct {
	h    *holder
	conn *wire.Conn
	// attached is closed when the intermediary gives out pages.
	attached chan struct{}
	// Guarded by Engine.mu, seq only once attached:
	seq         uint64
	reads       map[uint64]*reply // unanswered
	urgentReads int               // of these
	lane        int               // bulk lane of the last Read
	freedAt     time.Time
	free        []wire.Run // being sent
	asked       bool       // to dissolve
}

func sharedWindow(target time.Duration) flow.WindowConfig {
	return flow.WindowConfig{Target: target, MinBytes: minWindow, MaxBytes: maxWindow}
}

// addHolders extends the table; the caller holds e.mu or is alone.
func (e *Engine) addHolders(list []wire.Holder) error {
	for _, info := range list {
		if len(e.holders) >= wire.MaxHolders {
			return fmt.Errorf("%w: more than %d intermediaries", errBad, wire.MaxHolders)
		}
		e.book.addShelf()
		e.holders = append(e.holders, &holder{
			e: e, k: len(e.holders), info: info, wake: newSignal(),
			window: flow.NewWindow(sharedWindow(e.cfg.PrepageTarget)),
		})
	}
	e.wakeTend.raise()
	return nil
}

// wakeHolders wakes the senders of all intermediaries that have something to do; the
// caller holds e.mu.
func (e *Engine) wakeHolders() {
	for k, h := range e.holders {
		if s := e.book.shelves[k]; h.link != nil && (s.urgent.len() > 0 || s.ready.Count() > 0) {
			h.wake.raise()
		}
	}
}

// clients are the goroutines that serve the intermediaries.
type clients struct {
	e       *Engine
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	started int // holders that have a goroutine
}

// startHolders connects to the intermediaries as soon as they are known, so that no
// handshake is left to do when the guest waits for its first page.
func (e *Engine) startHolders(ctx context.Context) *clients {
	c := &clients{e: e}
	c.ctx, c.cancel = context.WithCancel(ctx)
	e.mu.Lock()
	e.clients = c
	e.mu.Unlock()
	c.start()
	return c
}

// start serves the intermediaries that are new in the table.
func (c *clients) start() {
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	for ; c.started < len(c.e.holders) && c.ctx.Err() == nil; c.started++ {
		h := c.e.holders[c.started]
		c.wg.Go(func() { h.run(c.ctx) })
	}
}

func (c *clients) stop() {
	c.e.mu.Lock()
	c.e.clients = nil
	c.cancel()
	c.e.mu.Unlock()
	c.wg.Wait()
}

// dissolve asks all intermediaries to zero and free what they hold, and waits for a
// bounded time. What fails is logged only: the VM is complete.
func (c *clients) dissolve() {
	e := c.e
	e.mu.Lock()
	e.dissolving = true
	for _, h := range e.holders {
		h.wake.raise()
	}
	e.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.wg.Wait()
	}()
	select {
	case <-done:
	case <-time.After(e.cfg.DissolveTimeout):
	case <-c.ctx.Done():
	}
	c.cancel()
	<-done
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, h := range e.holders {
		if !h.dissolved {
			e.log.Info("An intermediary did not confirm that it has forgotten the VM; it does so after its grace period", "intermediary", h.info.Name)
		}
	}
}

// run keeps an intermediary attached until it is dissolved or ctx ends.
func (h *holder) run(ctx context.Context) {
	next := redialFirst
	for {
		err := h.connect(ctx)
		if ctx.Err() != nil || h.over(err) {
			return
		}
		h.e.mu.Lock()
		h.e.stall(h.stallKey(), fmt.Sprintf("intermediary %s: %v", h.info.Name, err))
		if h.everUp {
			h.everUp, next = false, redialFirst
		}
		h.e.mu.Unlock()
		if !pause(ctx, next) {
			return
		}
		next = min(2*next, redialMost)
	}
}

func (h *holder) stallKey() string { return stallHolder + h.info.Name }

// over tells whether the intermediary has nothing of the VM and that is well.
func (h *holder) over(err error) bool {
	h.e.mu.Lock()
	defer h.e.mu.Unlock()
	var said *wire.Error
	if h.e.dissolving && errors.As(err, &said) && (said.Code == wire.CodeGone || said.Code == wire.CodeUnknown) {
		h.dissolved = true
	}
	return h.dissolved
}

// connect dials and serves the connection until it ends.
func (h *holder) connect(ctx context.Context) error {
	conn, err := wire.Dial(ctx, h.e.cfg.Wire, h.info.Addr, h.info.Identity, wire.DestinationToIntermediary, h.e.cfg.Migration)
	if err != nil {
		return fmt.Errorf("connecting to %s: %w", h.info.Addr, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	l := &link{h: h, conn: conn, reads: make(map[uint64]*reply), attached: make(chan struct{})}
	err = l.run(ctx)
	h.down(l)
	return err
}

// attach waits for the device state and then for the pages. Not before that: until then
// it is for the source to dissolve what the intermediary holds, and an intermediary to
// which a destination has attached takes that from nobody else.
func (l *link) attach(ctx context.Context) error {
	if err := wait(ctx, l.h.e.packaged); err != nil {
		return err
	}
	l.seq++
	if err := l.conn.Control().Send(l.seq, &wire.Attach{Session: l.h.info.Session}); err != nil {
		return fmt.Errorf("attaching: %w", err)
	}
	return wait(ctx, l.attached)
}

// onAttached notes that the intermediary has the pages and gives them out.
func (l *link) onAttached(f *wire.Frame) error {
	if _, err := wire.ParseAttached(f.Body); err != nil {
		return fmt.Errorf("attaching: %w", err)
	}
	if l.h.up(l) {
		close(l.attached)
		return nil
	}
	return fmt.Errorf("%w: attached twice", wire.ErrProtocol)
}

func peerError(body []byte) error {
	e, err := wire.ParseError(body)
	if err != nil {
		return err
	}
	return e
}

// up lets Reads be sent; it returns false if they may be already.
func (h *holder) up(l *link) bool {
	e := h.e
	e.mu.Lock()
	defer e.mu.Unlock()
	if h.link == l {
		return false
	}
	h.link, h.everUp = l, true
	e.unstall(h.stallKey())
	return true
}

// down gives the pages that were asked for back to the book.
func (h *holder) down(l *link) {
	e := h.e
	e.mu.Lock()
	defer e.mu.Unlock()
	h.link = nil
	for seq, r := range l.reads {
		delete(l.reads, seq)
		if !r.urgent {
			h.window.Lost(r.bytes)
			e.shared.Lost(r.bytes)
		}
		e.book.returned(r.refs)
		e.release(r)
	}
}

// run runs the connection's goroutines until one of them fails, and returns its error.
func (l *link) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	loop := func(f func(context.Context) error) {
		wg.Go(func() { cancel(f(ctx)) })
	}
	loop(l.control)
	loop(l.send)
	loop(func(ctx context.Context) error { return l.receive(ctx, l.conn.Urgent(), l.h.e.urgentFrames) })
	for k := range l.conn.Lanes() {
		loop(func(ctx context.Context) error { return l.receive(ctx, l.conn.Bulk(k), l.h.e.bulkFrames) })
	}
	<-ctx.Done()
	l.conn.Close()
	wg.Wait()
	return context.Cause(ctx)
}

// errDissolved ends the connection of an intermediary that has forgotten the VM.
var errDissolved = errors.New("dissolved")

func (l *link) control(ctx context.Context) error {
	var f wire.Frame
	for {
		if err := l.conn.Control().Receive(&f); err != nil {
			if errors.Is(err, io.EOF) {
				return errors.New("it closed the connection")
			}
			return err
		}
		switch f.Type {
		case wire.TypeAttached:
			if err := l.onAttached(&f); err != nil {
				return err
			}
		case wire.TypeDissolved:
			l.h.e.mu.Lock()
			l.h.dissolved = true
			l.h.e.mu.Unlock()
			return errDissolved
		case wire.TypeError:
			return peerError(f.Body)
		default:
			return fmt.Errorf("%w: frame of type %d on the control lane of an intermediary", wire.ErrProtocol, f.Type)
		}
	}
}
