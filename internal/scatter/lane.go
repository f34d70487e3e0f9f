// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"scattergather.io/scattergather/internal/wire"
)

// link is one connection of a holder while its lanes run.
type link struct {
	e *Engine
	h *holder
	c *wire.Conn
	// closed and err are guarded by Engine.mu.
	closed bool
	err    error
}

// run runs the loops, and a sender and a receiver for each bulk lane, until the first
// of them ends or the engine stops. Then it closes the connection, waits for all of
// them, and returns the first one's reason.
func (l *link) run(loops ...func() error) error {
	for i := range l.c.Lanes() {
		lane, st := l.c.Bulk(i), &l.h.lanes[i]
		loops = append(loops,
			func() error { return l.send(lane, st, &l.h.queue, l.h.wake, &l.h.sent) },
			func() error { return l.receive(lane, func(f *wire.Frame) error { return l.answer(st, f) }) })
	}
	stop := context.AfterFunc(l.e.ctx, func() { l.end(context.Cause(l.e.ctx)) })
	defer stop()
	var wg sync.WaitGroup
	for _, loop := range loops {
		wg.Go(func() { l.end(loop()) })
	}
	wg.Wait()
	return l.err
}

// end closes the connection for the first reason given.
func (l *link) end(err error) {
	l.e.mu.Lock()
	if !l.closed {
		l.closed, l.err = true, err
	}
	l.h.wake.Broadcast()
	l.e.urgent.wake.Broadcast()
	l.e.mu.Unlock()
	l.c.Close()
}

// send writes what the queue brings until the connection ends. One write is one
// batch.
func (l *link) send(lane *wire.Lane, st *laneState, queue *line, wake *sync.Cond, sent *uint64) error {
	e := l.e
	for {
		e.mu.Lock()
		for queue.len() == 0 && !l.closed {
			wake.Wait()
		}
		if l.closed {
			e.mu.Unlock()
			return wire.ErrClosed
		}
		f := queue.take()
		st.seq++
		f.batch.Seq = st.seq
		st.flights = append(st.flights, f)
		st.sending = f
		*sent += uint64(f.batch.Bytes())
		e.mu.Unlock()

		err := lane.SendBatch(f.batch)

		e.mu.Lock()
		st.sending = nil
		switch f.verdict {
		case stored:
			e.pool.put(f)
			e.room.Broadcast()
		case refused:
			e.replace([]*flight{f})
		}
		e.mu.Unlock()
		if err != nil {
			return fmt.Errorf("sending pages to %s: %w", l.h.peer.Name, err)
		}
	}
}

// receive gives every frame of a lane to handle until either fails.
func (l *link) receive(lane *wire.Lane, handle func(*wire.Frame) error) error {
	var f wire.Frame
	for {
		if err := lane.Receive(&f); err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("the peer closed the connection")
			}
			return fmt.Errorf("%s lane to %s: %w", lane.Kind(), l.h.peer.Name, err)
		}
		if err := handle(&f); err != nil {
			return fmt.Errorf("%s lane to %s: %w", lane.Kind(), l.h.peer.Name, err)
		}
	}
}

// answer takes the answer to a batch of a bulk lane.
func (l *link) answer(st *laneState, f *wire.Frame) error {
	var code wire.Code
	switch f.Type {
	case wire.TypeAck:
	case wire.TypeNack:
		nack, err := wire.ParseNack(f.Body)
		if err != nil {
			return err
		}
		code = nack.Code
	default:
		return unexpected(f)
	}
	e, h := l.e, l.h
	e.mu.Lock()
	defer e.mu.Unlock()
	fl := st.find(f.Seq)
	if fl == nil {
		return fmt.Errorf("%w: answer to frame %d, which is not under way", wire.ErrProtocol, f.Seq)
	}
	now := time.Now()
	if f.Type == wire.TypeNack {
		h.window.Lost(fl.batch.Bytes())
		return l.refused(st, fl, code)
	}
	h.window.Acked(fl.batch.Bytes(), now.Sub(fl.placed), now)
	h.meter.Add(fl.batch.Bytes(), now)
	h.stored = true
	e.landed(fl, h.value)
	e.recycle(st, fl)
	e.drain(now)
	return nil
}

// refused puts a batch that a holder has no room for back, and remembers that it has
// none. Any other refusal ends the connection. The caller holds e.mu.
func (l *link) refused(st *laneState, f *flight, code wire.Code) error {
	e, h := l.e, l.h
	if code != wire.CodeFull {
		st.flights = append(st.flights, f)
		return fmt.Errorf("pages were refused: %v", code)
	}
	h.used = max(h.used, h.granted)
	if st.sending == f {
		f.verdict = refused
		return nil
	}
	e.replace([]*flight{f})
	return nil
}

// recycle ends a flight. One that is still being written is left to its sender. The
// caller holds e.mu.
func (e *Engine) recycle(st *laneState, f *flight) {
	if st.sending == f {
		f.verdict = stored
		return
	}
	e.pool.put(f)
}

func unexpected(f *wire.Frame) error {
	return fmt.Errorf("%w: frame of type %d is not for a source here", wire.ErrProtocol, f.Type)
}
