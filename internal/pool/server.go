// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"scattergather.io/scattergather/internal/wire"
)

// Serve answers a source or a destination on a connection that it dialled, until that
// is closed, and closes it. What the peer holds is then disconnected, so that its grace
// period may begin. The error is nil when the peer closed the connection, and ctx's
// cause when ctx was done.
//
// Every lane has a goroutine of its own, and none of them waits for another one: a
// stalled guest's pages on the urgent lane are answered while bulk lanes are full.
func (p *Pool) Serve(ctx context.Context, c *wire.Conn) error {
	var control, data func(*wire.Lane) error
	switch c.Role() {
	case wire.SourceToIntermediary:
		s := &sourceServer{p: p, c: c}
		defer s.hangUp()
		control, data = s.control, s.bulk
	case wire.DestinationToIntermediary:
		d := &destinationServer{p: p, c: c}
		defer d.hangUp()
		control, data = d.control, d.reads
	default:
		err := fmt.Errorf("%w: an intermediary has no part in a connection from %v", ErrInvalid, c.Role())
		c.Fail(wireError(err))
		return err
	}

	var (
		lanes sync.WaitGroup
		fault atomic.Pointer[error]
	)
	run := func(l *wire.Lane, loop func(*wire.Lane) error) {
		lanes.Go(func() {
			// Other errors are those of the connection, which closes by itself.
			if err := loop(l); errors.Is(err, wire.ErrProtocol) {
				fault.CompareAndSwap(nil, &err)
				c.Fail(wireError(err))
			}
		})
	}
	run(c.Control(), control)
	if l := c.Urgent(); l != nil {
		run(l, data)
	}
	for i := range c.Lanes() {
		run(c.Bulk(i), data)
	}
	stop := context.AfterFunc(ctx, func() {
		c.Fail(&wire.Error{Code: wire.CodeStopping, Text: "the intermediary's agent is stopping; its pages stay"})
	})
	lanes.Wait()
	if !stop() {
		return context.Cause(ctx)
	}
	err := c.Err()
	if first := fault.Load(); first != nil {
		err = *first
	}
	if !errors.Is(err, io.EOF) {
		return fmt.Errorf("serving %q, %v: %w", c.Peer(), c.Role(), err)
	}
	return nil
}

// receive calls handle for every frame of a lane until one of the two fails. Reports of
// the peer's errors are logged: nothing that an intermediary does depends on them.
func (p *Pool) receive(c *wire.Conn, l *wire.Lane, handle func(*wire.Frame) error) error {
	var f wire.Frame
	for {
		if err := l.Receive(&f); err != nil {
			return err
		}
		if f.Type == wire.TypeError {
			e, err := wire.ParseError(f.Body)
			if err != nil {
				return err
			}
			p.cfg.Log.Info("a peer reports an error", "peer", c.Peer(), "migration", c.Migration().String(),
				"code", e.Code.String(), "text", e.Error())
			continue
		}
		if err := handle(&f); err != nil {
			return err
		}
	}
}

// sourceServer serves one connection of a source.
type sourceServer struct {
	p      *Pool
	c      *wire.Conn
	writer atomic.Pointer[Writer] // nil before Reserve; set by the control lane only
}

func (s *sourceServer) hangUp() {
	if w := s.writer.Load(); w != nil {
		w.Close()
	}
}

func (s *sourceServer) control(l *wire.Lane) error {
	var runs []wire.Run
	return s.p.receive(s.c, l, func(f *wire.Frame) (err error) {
		w := s.writer.Load()
		switch {
		case f.Type == wire.TypeReserve:
			return s.reserve(l, f)
		case w == nil:
			return l.Send(f.Seq, wireError(errNoSession))
		case f.Type == wire.TypeFree:
			runs, err = freeRuns(l, f, &w.hold, runs)
			return err
		case f.Type == wire.TypeDissolve:
			return answerDissolve(l, f, w.Dissolve())
		}
		return unexpected(f)
	})
}

func (s *sourceServer) reserve(l *wire.Lane, f *wire.Frame) error {
	want, err := wire.ParseReserve(f.Body)
	if err != nil {
		return err
	}
	w, err := s.p.Reserve(s.c.Migration(), s.c.Peer(), want)
	if err != nil {
		return l.Send(f.Seq, wireError(err))
	}
	if old := s.writer.Swap(w); old != nil {
		old.Close() // after the new one is connected, so that no time runs
	}
	return l.Send(f.Seq, &wire.Reserved{Session: w.Session(), Bytes: w.Granted()})
}

// bulk stores what arrives on a lane. A frame is acknowledged when its pages are in the
// arena, and refused as a whole if one of them is not.
func (s *sourceServer) bulk(l *wire.Lane) error {
	ps := make([]Page, 0, wire.MaxBatch)
	take := func(d wire.Desc, sealed []byte) error {
		if d.Missing {
			return fmt.Errorf("%w: page %d to store is marked missing", wire.ErrProtocol, d.Index)
		}
		ps = append(ps, Page{Index: d.Index, Version: d.Version, Encoding: d.Encoding, Sealed: sealed})
		return nil
	}
	return s.p.receive(s.c, l, func(f *wire.Frame) error {
		frame, err := f.Pages()
		if err != nil {
			return err
		}
		ps = ps[:0]
		if err := frame.Each(take); err != nil {
			return err
		}
		w := s.writer.Load()
		if w == nil {
			return l.Send(f.Seq, &wire.Nack{Code: wire.CodeUnknown})
		}
		if err := w.Put(ps); err != nil {
			s.p.cfg.Log.V(1).Info("pages are refused", "peer", s.c.Peer(), "migration", s.c.Migration().String(), "reason", err.Error())
			return l.Send(f.Seq, &wire.Nack{Code: codeOf(err)})
		}
		return l.Send(f.Seq, wire.Ack{})
	})
}

// destinationServer serves one connection of a destination.
type destinationServer struct {
	p      *Pool
	c      *wire.Conn
	reader atomic.Pointer[Reader] // nil before Attach; set by the control lane only
}

func (d *destinationServer) hangUp() {
	if r := d.reader.Load(); r != nil {
		r.Close()
	}
}

func (d *destinationServer) control(l *wire.Lane) error {
	var runs []wire.Run
	return d.p.receive(d.c, l, func(f *wire.Frame) (err error) {
		r := d.reader.Load()
		switch {
		case f.Type == wire.TypeAttach:
			return d.attach(l, f)
		case r == nil:
			return l.Send(f.Seq, wireError(errNoSession))
		case f.Type == wire.TypeFree:
			runs, err = freeRuns(l, f, &r.hold, runs)
			return err
		case f.Type == wire.TypeDissolve:
			return answerDissolve(l, f, r.Dissolve())
		}
		return unexpected(f)
	})
}

func (d *destinationServer) attach(l *wire.Lane, f *wire.Frame) error {
	m, err := wire.ParseAttach(f.Body)
	if err != nil {
		return err
	}
	r, err := d.p.Attach(d.c.Migration(), d.c.Peer(), m.Session)
	if err != nil {
		return l.Send(f.Seq, wireError(err))
	}
	if old := d.reader.Swap(r); old != nil {
		old.Close()
	}
	n, bytes := r.Held()
	return l.Send(f.Seq, &wire.Attached{Pages: n, Bytes: bytes})
}

// reads answers the Read frames of a lane, one Pages frame each.
func (d *destinationServer) reads(l *wire.Lane) error {
	var (
		refs  []wire.PageRef
		ps    = make([]Page, 0, wire.MaxBatch)
		buf   = make([]byte, wire.MaxBatch*wire.MaxSealed)
		batch = wire.NewBatch()
	)
	return d.p.receive(d.c, l, func(f *wire.Frame) (err error) {
		if f.Type != wire.TypeRead {
			return unexpected(f)
		}
		if refs, err = wire.ParseRead(refs[:0], f.Body); err != nil {
			return err
		}
		ps = ps[:0]
		for _, ref := range refs {
			ps = append(ps, Page{Index: ref.Index, Version: ref.Version})
		}
		r := d.reader.Load()
		if r == nil {
			return l.Send(f.Seq, wireError(errNoSession))
		}
		if err := r.Get(ps, buf); err != nil {
			return l.Send(f.Seq, wireError(err))
		}
		batch.Reset(f.Seq)
		for i := range ps {
			p := &ps[i]
			if p.Sealed == nil {
				batch.AppendMissing(p.Index, p.Version)
			} else {
				batch.AppendSealed(wire.Desc{Index: p.Index, Version: p.Version, Encoding: p.Encoding}, p.Sealed)
			}
		}
		return l.SendBatch(batch)
	})
}

var errNoSession = fmt.Errorf("%w on this connection yet: Reserve or Attach comes first", ErrUnknown)

func unexpected(f *wire.Frame) error {
	return fmt.Errorf("%w: %v has no place here", wire.ErrProtocol, f.Type)
}

// freeRuns frees what a Free frame names. Success is not answered.
func freeRuns(l *wire.Lane, f *wire.Frame, h *hold, runs []wire.Run) ([]wire.Run, error) {
	runs, err := wire.ParseFree(runs[:0], f.Body)
	if err != nil {
		return runs, err
	}
	for _, run := range runs {
		if _, err := h.Free(run.First, uint64(run.Count)); err != nil {
			return runs, l.Send(f.Seq, wireError(err))
		}
	}
	return runs, nil
}

func answerDissolve(l *wire.Lane, f *wire.Frame, err error) error {
	if err != nil {
		return l.Send(f.Seq, wireError(err))
	}
	return l.Send(f.Seq, wire.Dissolved{})
}

func wireError(err error) *wire.Error { return &wire.Error{Code: codeOf(err), Text: err.Error()} }

// codeOf says in the protocol's terms what an error means for the peer.
func codeOf(err error) wire.Code {
	for _, c := range []struct {
		is   error
		code wire.Code
	}{
		{ErrFull, wire.CodeFull}, {ErrBudget, wire.CodeFull}, {ErrUnknown, wire.CodeUnknown},
		{ErrForbidden, wire.CodeForbidden}, {ErrGone, wire.CodeGone}, {ErrClosed, wire.CodeStopping},
		{ErrInvalid, wire.CodeProtocol}, {wire.ErrProtocol, wire.CodeProtocol},
	} {
		if errors.Is(err, c.is) {
			return c.code
		}
	}
	return wire.CodeInternal
}
