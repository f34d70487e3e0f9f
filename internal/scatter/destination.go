// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"context"
	"errors"
	"fmt"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

const (
	// redialFirst and redialMost bound the pause between attempts to reach the
	// destination again.
	redialFirst = 50 * time.Millisecond
	redialMost  = 2 * time.Second
)

// errDeclined is wrapped when the destination will not have the VM, as opposed to
// being out of reach: dialling again does not help.
var errDeclined = errors.New("the destination declined")

// dialDestination opens a connection and reads the Resume with which the destination
// begins.
func (e *Engine) dialDestination(ctx context.Context) (*wire.Conn, wire.Resume, error) {
	ctx, cancel := context.WithTimeout(ctx, e.cfg.ConnectTimeout)
	defer cancel()
	p := e.cfg.Destination
	c, err := wire.Dial(ctx, e.cfg.Wire, p.Address, p.Identity, wire.SourceToDestination, e.cfg.Migration)
	if err != nil {
		return nil, wire.Resume{}, fmt.Errorf("connecting to the destination %s at %s: %w", p.Name, p.Address, err)
	}
	var f wire.Frame
	r, err := wire.Resume{}, receiveWithin(ctx, c, &f)
	if err == nil {
		switch f.Type {
		case wire.TypeResume:
			r, err = wire.ParseResume(f.Body)
		case wire.TypeError:
			err = parseError(f.Body)
		default:
			err = unexpected(&f)
		}
	}
	if err != nil {
		c.Close()
		return nil, r, fmt.Errorf("greeting of the destination %s: %w", p.Name, err)
	}
	return c, r, nil
}

// receiveWithin reads one frame of the control lane; when ctx ends first it closes the
// connection.
func receiveWithin(ctx context.Context, c *wire.Conn, f *wire.Frame) error {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	err := c.Control().Receive(f)
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func parseError(body []byte) error {
	e, err := wire.ParseError(body)
	if err != nil {
		return err
	}
	return e
}

// serveDestination runs the destination's connections, one after the other: the first
// ends the migration when it is lost before the hand-over, any later one is replaced.
func (e *Engine) serveDestination(c *wire.Conn, applied uint64) {
	for {
		err := e.runDestination(c, applied)
		e.journal.Detach()
		e.mu.Lock()
		lost := e.holders[0].detach(err)
		e.urgent.detach()
		e.replace(lost)
		e.mu.Unlock()
		if e.ctx.Err() != nil || !e.survives(fmt.Errorf("the destination was lost before the VM was handed over: %w", err)) {
			return
		}
		e.stall(fmt.Sprintf("the destination was lost: %v", err))
		if c, applied, err = e.redial(); err != nil {
			return
		}
	}
}

// runDestination serves one connection until it ends. What the destination has not
// applied is sent again while its answers are read, or both could wait for each other.
func (e *Engine) runDestination(c *wire.Conn, applied uint64) error {
	e.mu.Lock()
	h := e.holders[0]
	h.attach(c, 0, 0)
	e.mu.Unlock()
	l := &link{e: e, h: h, c: c}
	var scratch []pages.Index
	urgent := c.Urgent()
	return l.run(
		func() error {
			if err := e.journal.Attach(c.Control(), applied); err != nil {
				return err
			}
			<-c.Done()
			return c.Err()
		},
		func() error { return l.receive(c.Control(), e.fromDestination) },
		func() error {
			return l.receive(urgent, func(f *wire.Frame) error { return l.answerUrgent(f, &scratch) })
		},
		func() error { return l.send(urgent, &e.urgent.lane, &e.urgent.queue, e.urgent.wake, &e.urgent.bytes) },
	)
}

// redial connects again until it succeeds or the engine stops.
func (e *Engine) redial() (*wire.Conn, uint64, error) {
	for pause := redialFirst; ; pause = min(2*pause, redialMost) {
		c, r, err := e.dialDestination(e.ctx)
		if err == nil && !r.Known && r.Applied == 0 {
			e.log.Info("The destination knows nothing of the migration; everything it did not confirm is sent again")
		}
		if err == nil {
			e.mu.Lock()
			e.result.Reconnects++
			e.mu.Unlock()
			e.stall("")
			return c, r.Applied, nil
		}
		e.stall(fmt.Sprintf("the destination is out of reach: %v", err))
		if err := e.pause(pause); err != nil {
			return nil, 0, err
		}
	}
}

// fromDestination takes a frame of the control lane.
func (e *Engine) fromDestination(f *wire.Frame) error {
	switch f.Type {
	case wire.TypeReady:
		return e.note(&e.ready)
	case wire.TypeLoaded:
		return e.onLoaded()
	case wire.TypeCredit:
		return e.onCredit(f.Body)
	case wire.TypeApplied:
		if err := e.journal.Applied(f.Seq); err != nil {
			return err
		}
		e.noteJournal(false)
		return nil
	case wire.TypeCommitted:
		return e.onCommitted(f.Body)
	case wire.TypeAbort:
		a, err := wire.ParseAbort(f.Body)
		if err != nil {
			return err
		}
		return e.declined(errors.New(a.Reason))
	case wire.TypeError:
		return e.declined(parseError(f.Body))
	}
	return unexpected(f)
}

func (e *Engine) note(flag *bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	*flag = true
	e.changed.Broadcast()
	return nil
}

// onLoaded answers the PINGs inside the package, which QEMU takes for the proof that
// the device state was loaded: not earlier, because a newer QEMU takes the guest back
// when the proof does not come.
func (e *Engine) onLoaded() error {
	e.mu.Lock()
	if !e.handed {
		e.mu.Unlock()
		return fmt.Errorf("%w: loaded before there was a package", wire.ErrProtocol)
	}
	pings := e.pings
	e.pings, e.loaded = nil, true
	e.changed.Broadcast()
	e.mu.Unlock()
	for _, v := range pings {
		if err := e.source.pong(v); err != nil {
			e.log.Error(err, "Answering a PING of the package")
		}
	}
	return nil
}

func (e *Engine) onCredit(body []byte) error {
	c, err := wire.ParseCredit(body)
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	h := e.holders[0]
	h.granted = max(h.granted, c.Bytes)
	e.drain(time.Now())
	e.room.Broadcast()
	return nil
}

func (e *Engine) onCommitted(body []byte) error {
	c, err := wire.ParseCommitted(body)
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.phase < Committing || c.Pages != e.ledger.Sent() {
		return fmt.Errorf("%w: committed to %d pages in phase %v", wire.ErrProtocol, c.Pages, e.phase)
	}
	e.committed = true
	e.changed.Broadcast()
	return nil
}

// declined takes a refusal. Before the hand-over it is final. After it the
// connection goes on: whatever the destination could not do, the source cannot undo.
// A commit that it refused is asked for again, because the reason may pass.
func (e *Engine) declined(reason error) error {
	err := fmt.Errorf("%w: %w", errDeclined, reason)
	e.mu.Lock()
	handed := e.handed
	if handed && e.phase == Committing {
		e.refusals++
		e.changed.Broadcast()
	}
	e.mu.Unlock()
	if !handed {
		return err
	}
	e.stall(err.Error())
	return nil
}
