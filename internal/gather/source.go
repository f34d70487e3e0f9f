// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// session is one connection of the source while it lasts.
type session struct {
	e    *Engine
	conn *wire.Conn
	// wakeTell and wakeWant tell the goroutines that send.
	wakeTell, wakeWant, wakeAck signal
	records                     []pages.Record // scratch of the control lane

	// Guarded by Engine.mu:
	received, granted uint64 // sealed bytes
	applied           uint64 // last number told
	toldReady         bool
	toldLoaded        bool
	toldCommit        uint64 // number of the Commit that was answered last
	acks              fifo[ack]
}

// ack is the number of a frame that can be acknowledged.
type ack struct {
	lane *wire.Lane
	seq  uint64
}

// errAway is why nothing comes from a source that is not connected.
var errAway = errors.New("the source is not connected")

// serveSources serves the source's connections, one after the other, until ctx ends.
// A source that is lost before it handed the device state over must come back in time.
func (e *Engine) serveSources(ctx context.Context, fail context.CancelCauseFunc) {
	var grace <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-grace:
			fail(fmt.Errorf("the source has been away for %v and had not handed the VM over", e.cfg.SourceGrace))
			return
		case conn := <-e.attach:
			err := e.serveSource(ctx, conn)
			if ctx.Err() != nil {
				return
			}
			if fatal := e.fatal(err); fatal != nil {
				fail(fatal)
				return
			}
			grace = nil
			if e.lostSource(err) {
				grace = time.After(e.cfg.SourceGrace)
			}
			if errors.Is(err, errBad) || errors.Is(err, wire.ErrProtocol) {
				pause(ctx, time.Second) // it will come back and say the same
			}
		}
	}
}

// fatal returns the error of a connection that ends the gather: before the device
// state goes into QEMU, whatever the source says or does wrong does.
func (e *Engine) fatal(err error) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case errors.Is(err, ErrAborted):
		return err
	case e.stage == stageOpening && (errors.Is(err, wire.ErrProtocol) || errors.Is(err, errBad) || errors.Is(err, errLocal)):
		return err
	}
	return nil
}

// lostSource notes that the source is gone; it returns true if it has not handed the
// device state over.
func (e *Engine) lostSource(err error) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.book != nil && e.book.committed {
		return false
	}
	reason := errAway.Error()
	if err != nil {
		reason = fmt.Sprintf("%s: %v", reason, err)
	}
	e.stall(stallSource, reason)
	select {
	case <-e.packaged:
		return false
	default:
		return true
	}
}

// serveSource runs one connection until it ends or is replaced.
func (e *Engine) serveSource(ctx context.Context, conn *wire.Conn) error {
	defer conn.Close()
	s := &session{e: e, conn: conn, wakeTell: newSignal(), wakeWant: newSignal(), wakeAck: newSignal()}
	e.mu.Lock()
	var last uint64
	if e.state.cursor != nil {
		last = e.state.cursor.get()
	}
	s.applied = last
	e.mu.Unlock()
	if err := conn.Control().Send(0, &wire.Resume{Known: last > 0, Applied: last}); err != nil {
		return err
	}
	e.mu.Lock()
	e.session = s
	e.unstall(stallSource)
	if e.stats.started.IsZero() {
		e.stats.started = time.Now()
	}
	if e.book != nil {
		e.book.wantAgain()
	}
	e.mu.Unlock()
	s.wakeTell.raise()
	s.wakeWant.raise()
	err := s.run(ctx)
	e.mu.Lock()
	e.session, e.sourceLeft = nil, time.Now()
	e.mu.Unlock()
	return err
}

// run runs the connection's goroutines until one of them fails, and returns its error.
func (s *session) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	loop := func(f func(context.Context) error) {
		wg.Go(func() { cancel(f(ctx)) })
	}
	loop(s.control)
	loop(s.tell)
	loop(s.want)
	loop(s.acknowledge)
	loop(func(ctx context.Context) error { return s.receivePages(ctx, s.conn.Urgent()) })
	for k := range s.conn.Lanes() {
		loop(func(ctx context.Context) error { return s.receivePages(ctx, s.conn.Bulk(k)) })
	}
	<-ctx.Done()
	err := context.Cause(ctx)
	switch {
	case errors.Is(err, wire.ErrProtocol) || errors.Is(err, errBad):
		s.conn.Fail(&wire.Error{Code: wire.CodeProtocol, Text: err.Error()})
	case errors.Is(err, errLocal):
		s.conn.Fail(&wire.Error{Code: wire.CodeInternal, Text: err.Error()})
	default:
		s.conn.Close()
	}
	wg.Wait()
	return err
}

// control applies the control lane's frames in order.
func (s *session) control(ctx context.Context) error {
	var f wire.Frame
	for {
		if err := s.conn.Control().Receive(&f); err != nil {
			if errors.Is(err, io.EOF) {
				return errors.New("the source closed its connection")
			}
			return err
		}
		var err error
		switch f.Type {
		case wire.TypeError:
			err = fmt.Errorf("the source gave the connection up: %w", peerError(f.Body))
		case wire.TypeAbort:
			err = s.e.onAbort(&f)
		default:
			err = s.journalled(&f)
		}
		if err != nil {
			return err
		}
	}
}

// journalled applies a frame that the source would send again. Every such frame has
// the number after the last one's.
func (s *session) journalled(f *wire.Frame) error {
	e := s.e
	e.mu.Lock()
	var last uint64
	if e.state.cursor != nil {
		last = e.state.cursor.get()
	}
	e.mu.Unlock()
	if f.Seq <= last {
		return nil // known: the acknowledgement was lost with a connection
	}
	if f.Seq != last+1 {
		return fmt.Errorf("%w: control frame %d follows %d", wire.ErrProtocol, f.Seq, last)
	}
	if err := s.apply(f); err != nil {
		return err
	}
	e.mu.Lock()
	e.state.cursor.set(f.Seq)
	e.mu.Unlock()
	s.wakeTell.raise()
	return nil
}

func (s *session) apply(f *wire.Frame) error {
	e := s.e
	if f.Type != wire.TypeSetup && !e.isDescribed() {
		return fmt.Errorf("%w: frame of type %d before the VM was described", wire.ErrProtocol, f.Type)
	}
	switch f.Type {
	case wire.TypeSetup:
		return e.onSetup(f)
	case wire.TypeHolders:
		return e.onHolders(f)
	case wire.TypeRecords:
		return s.onRecords(f)
	case wire.TypePackage:
		return e.onPackage(f)
	case wire.TypeState:
		return e.onState(f)
	case wire.TypeCommit:
		return e.onCommit(f)
	}
	return fmt.Errorf("%w: frame of type %d on the control lane of a destination", wire.ErrProtocol, f.Type)
}

func (e *Engine) isDescribed() bool {
	select {
	case <-e.described:
		return true
	default:
		return false
	}
}

// tell sends what the source is waiting to hear, as often as there is news.
func (s *session) tell(ctx context.Context) error {
	lane := s.conn.Control()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.wakeTell:
		}
		for {
			seq, m := s.news()
			if m == nil {
				break
			}
			if err := lane.Send(seq, m); err != nil {
				return err
			}
		}
	}
}

// news returns the next thing to tell the source, nil if there is nothing.
func (s *session) news() (uint64, wire.Message) {
	e := s.e
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.state.cursor == nil {
		return 0, nil
	}
	if last := e.state.cursor.get(); last > s.applied {
		s.applied = last
		return last, wire.Applied{}
	}
	if e.ready && !s.toldReady {
		s.toldReady = true
		return e.setupSeq, wire.Ready{}
	}
	if e.ready {
		if bytes, ok := s.grant(); ok {
			return 0, &wire.Credit{Bytes: bytes}
		}
	}
	if e.stage >= stageFeeding && !s.toldLoaded {
		s.toldLoaded = true
		return 0, wire.Loaded{}
	}
	if e.commitSeq > s.toldCommit {
		s.toldCommit = e.commitSeq
		if e.commitErr != nil {
			return e.commitSeq, &wire.Error{Code: wire.CodeIncomplete, Text: e.commitErr.Error()}
		}
		return e.commitSeq, &wire.Committed{Pages: e.state.meta.Claimed}
	}
	return 0, nil
}

// grantStep is how much room must have appeared before the source is told.
const grantStep = 1 << 20

// grant returns the credit to give now, summed up since the connection began. The
// caller holds e.mu.
func (s *session) grant() (uint64, bool) {
	e := s.e
	stored := (e.book.where.Counts().Local + e.book.busy.Count()) * wire.MaxSealed
	room := e.cfg.StoreBytes / pages.Size * wire.MaxSealed
	total := s.received + room - min(room, stored)
	if total <= s.granted || s.granted > 0 && total-s.granted < min(grantStep, room/4) {
		return 0, false
	}
	s.granted = total
	return total, true
}

// acknowledge acknowledges the frames that went past the store.
func (s *session) acknowledge(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.wakeAck:
		}
		for {
			s.e.mu.Lock()
			if s.acks.len() == 0 {
				s.e.mu.Unlock()
				break
			}
			a := s.acks.pop()
			s.e.mu.Unlock()
			if err := a.lane.Send(a.seq, wire.Ack{}); err != nil {
				return err
			}
		}
	}
}

// want asks the source for pages that the guest waits for and nobody here knows.
func (s *session) want(ctx context.Context) error {
	var list []pages.Index
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.wakeWant:
		}
		for {
			s.e.mu.Lock()
			list = list[:0]
			if b := s.e.book; b != nil {
				n := min(len(b.wants), wire.MaxWant)
				list = append(list, b.wants[:n]...)
				b.wants = b.wants[:copy(b.wants, b.wants[n:])]
			}
			s.e.mu.Unlock()
			if len(list) == 0 {
				break
			}
			if err := s.conn.Urgent().Send(0, wire.Want(list)); err != nil {
				return err
			}
		}
	}
}
