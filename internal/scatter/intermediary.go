// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// reserved is an intermediary that lends memory.
type reserved struct {
	peer Peer
	conn *wire.Conn
	got  wire.Reserved
	err  error
}

// connect dials the destination and all intermediaries at once. The destination has
// to answer; intermediaries that do not are left out.
func (e *Engine) connect() error {
	lenders := make([]reserved, len(e.cfg.Intermediaries))
	var wg sync.WaitGroup
	for i, p := range e.cfg.Intermediaries {
		wg.Go(func() { lenders[i] = e.reserve(p) })
	}
	conn, resume, err := e.dialDestination(e.ctx)
	wg.Wait()
	// Also when the destination does not answer: the roll-back asks all holders to
	// forget the VM.
	for _, r := range lenders {
		e.join(r)
	}
	if err == nil && resume.Known {
		conn.Close()
		err = fmt.Errorf("the destination %s has seen the migration %s before: begin one with a new id",
			e.cfg.Destination.Name, e.cfg.Migration)
	}
	if err != nil {
		return err
	}
	e.wg.Go(func() { e.serveDestination(conn, resume.Applied) })
	return nil
}

// reserve asks an intermediary for memory.
func (e *Engine) reserve(p Peer) (r reserved) {
	ctx, cancel := context.WithTimeout(e.ctx, e.cfg.ConnectTimeout)
	defer cancel()
	r.peer = p
	r.conn, r.err = wire.Dial(ctx, e.cfg.Wire, p.Address, p.Identity, wire.SourceToIntermediary, e.cfg.Migration)
	if r.err != nil {
		return r
	}
	if r.got, r.err = e.askReserve(ctx, r.conn, p); r.err != nil {
		r.conn.Close()
		r.conn = nil
	}
	return r
}

func (e *Engine) askReserve(ctx context.Context, c *wire.Conn, p Peer) (wire.Reserved, error) {
	ask := &wire.Reserve{
		Bytes:  p.Bytes / pageBytes * wire.MaxSealed,
		Reader: e.cfg.Destination.Identity,
		Grace:  e.cfg.Grace.Truncate(time.Second),
	}
	if err := c.Control().Send(1, ask); err != nil {
		return wire.Reserved{}, err
	}
	var f wire.Frame
	if err := receiveWithin(ctx, c, &f); err != nil {
		return wire.Reserved{}, err
	}
	switch f.Type {
	case wire.TypeReserved:
		return wire.ParseReserved(f.Body)
	case wire.TypeError:
		return wire.Reserved{}, parseError(f.Body)
	}
	return wire.Reserved{}, unexpected(&f)
}

// join makes a lender a holder, or notes why it is left out.
func (e *Engine) join(r reserved) {
	e.mu.Lock()
	defer e.mu.Unlock()
	value, ok := pages.HolderOf(len(e.holders) - 1)
	if r.err == nil && !ok {
		r.err = errors.New("the table of intermediaries is full")
	}
	if r.err != nil {
		e.log.Info("An intermediary is left out", "intermediary", r.peer.Name, "reason", r.err.Error())
		e.leftOut = append(e.leftOut, Leg{Name: r.peer.Name, Reason: r.err.Error()})
		return
	}
	h := newHolder(r.peer, value, e.cfg.IntermediaryTarget, &e.mu)
	h.session = r.got.Session
	h.attach(r.conn, r.got.Bytes, 0)
	e.holders = append(e.holders, h)
	e.wg.Go(func() { e.serveIntermediary(h, r.conn) })
}

// serveIntermediary runs an intermediary's connections. When one is lost, what it did
// not acknowledge is placed elsewhere. Pages that it did acknowledge stay there: before
// the hand-over that ends the migration, because the guest is safer where it is; after
// it they are there when the intermediary is back.
func (e *Engine) serveIntermediary(h *holder, c *wire.Conn) {
	for c != nil {
		trusted, err := e.runIntermediary(h, c)
		if e.ctx.Err() != nil || !trusted ||
			!e.survives(fmt.Errorf("intermediary %s was lost with pages of a guest that still runs here: %w", h.peer.Name, err)) {
			return
		}
		c = e.reattach(h)
	}
}

// runIntermediary serves one connection until it ends, and tells whether the
// intermediary has acknowledged any page.
func (e *Engine) runIntermediary(h *holder, c *wire.Conn) (trusted bool, err error) {
	l := &link{e: e, h: h, c: c}
	err = l.run(func() error {
		return l.receive(c.Control(), func(f *wire.Frame) error { return e.fromIntermediary(h, f) })
	})
	e.mu.Lock()
	defer e.mu.Unlock()
	lost := h.detach(err)
	if e.ctx.Err() == nil {
		e.log.Info("An intermediary was lost", "intermediary", h.peer.Name, "reason", err.Error(), "replaced", len(lost))
	}
	e.replace(lost)
	e.changed.Broadcast()
	return h.stored, err
}

// reattach connects to an intermediary again until it succeeds or the engine stops. It
// returns nil when the pages are gone, which this node can do nothing about.
func (e *Engine) reattach(h *holder) *wire.Conn {
	for pause := redialFirst; ; pause = min(2*pause, redialMost) {
		r := e.reserve(h.peer)
		switch {
		case r.err == nil && r.got.Session != h.session:
			r.conn.Close()
			e.log.Error(errors.New("its session is another one"), "An intermediary has lost the pages that it had acknowledged",
				"intermediary", h.peer.Name)
			return nil
		case r.err == nil:
			e.mu.Lock()
			defer e.mu.Unlock()
			h.attach(r.conn, r.got.Bytes, h.used)
			e.drain(time.Now())
			e.room.Broadcast()
			return r.conn
		}
		if e.pause(pause) != nil {
			return nil
		}
	}
}

// fromIntermediary takes a frame of an intermediary's control lane.
func (e *Engine) fromIntermediary(h *holder, f *wire.Frame) error {
	switch f.Type {
	case wire.TypeReserved:
		r, err := wire.ParseReserved(f.Body)
		if err != nil {
			return err
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		h.granted = r.Bytes
		e.drain(time.Now())
		return nil
	case wire.TypeDissolved:
		e.mu.Lock()
		defer e.mu.Unlock()
		h.dissolved = true
		e.changed.Broadcast()
		return nil
	case wire.TypeError:
		return parseError(f.Body)
	}
	return unexpected(f)
}
