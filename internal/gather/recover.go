// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"context"
	"errors"
	"fmt"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
)

// rejoinTimeout bounds one attempt to go on with a QEMU whose stream broke, once it
// has accepted a connection.
const rejoinTimeout = time.Minute

// resume goes on where an earlier process ended.
func (e *Engine) resume(ctx context.Context) (*feed, error) {
	return e.recover(ctx, errors.New("the agent was restarted"))
}

// recover goes on with a QEMU whose stream broke. It tries until ctx ends, because the
// guest is nowhere else; only a QEMU that perhaps never got its device state is given
// up after Config.OpenTimeout. ErrCompleted means that QEMU needs nothing any more.
func (e *Engine) recover(ctx context.Context, cause error) (*feed, error) {
	e.mu.Lock()
	e.stats.recoveries++
	e.stall(stallStream, fmt.Sprintf("the stream into the destination QEMU broke: %v", cause))
	e.mu.Unlock()
	begun := time.Now()
	for next := redialFirst; ; next = min(2*next, redialMost) {
		f, err := e.rejoin(ctx)
		if err == nil {
			return f, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if errors.Is(err, ErrNotResumable) {
			return nil, err
		}
		e.mu.Lock()
		st := e.stage
		if errors.Is(err, ErrCompleted) && st == stageEnding {
			e.landAll()
			e.unstall(stallStream)
			e.mu.Unlock()
			return nil, err
		}
		e.stall(stallStream, fmt.Sprintf("the stream into the destination QEMU broke (%v) and was not restored: %v", cause, err))
		e.mu.Unlock()
		if st == stageDelivering && time.Since(begun) > e.cfg.OpenTimeout {
			return nil, fmt.Errorf("%w: the destination QEMU was being given its device state and cannot be reached since: %w", ErrNotResumable, err)
		}
		if !pause(ctx, next) {
			return nil, context.Cause(ctx)
		}
	}
}

// rejoin makes one attempt.
func (e *Engine) rejoin(ctx context.Context) (*feed, error) {
	conn, err := e.cfg.Recover(ctx)
	if err != nil {
		return nil, err
	}
	f := e.newFeed(conn)
	ctx, cancel := context.WithTimeoutCause(ctx, rejoinTimeout, errors.New("QEMU did not answer in time"))
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	if err = f.compare(); err == nil {
		// From here on receive reads, which may wait for as long as it likes.
		resumed := make(chan struct{})
		f.resumed = resumed
		go f.receive()
		err = f.proceed(ctx, resumed)
	} else {
		close(f.done)
	}
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		<-f.done
		return nil, err
	}
	return f, nil
}

// compare asks QEMU for the pages that it has and makes the book agree: QEMU is the
// truth.
func (f *feed) compare() error {
	e := f.e
	has := pages.NewBitmap(e.layout.Pages())
	for k, b := range e.layout.Blocks() {
		if err := f.ask(qemu.AppendRecvBitmap(nil, b.Name), qemu.RPRecvBitmap, func(m *qemu.RPMessage) error {
			if m.Block != k {
				return fmt.Errorf("QEMU was asked for the pages of block %q and told of %q", b.Name, e.layout.Blocks()[m.Block].Name)
			}
			first, n := e.layout.Extent(k)
			return has.LoadLittleEndian(first, n, m.Bitmap)
		}); err != nil {
			return err
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for e.flights.len() > 0 {
		fl := e.flights.pop()
		for _, p := range fl.parcels {
			e.book.pass(p) // what of it QEMU has is left out when it is written
		}
		e.spareFlight(fl)
	}
	e.unplaced = 0
	if err := e.book.rebuild(has); err != nil {
		return err
	}
	for i, ok := has.NextSet(0); ok; i, ok = has.NextSet(i + 1) {
		if e.book.placed(i) {
			e.punches.add(i)
		}
	}
	return nil
}

// ask writes a question and reads the return path up to its answer.
func (f *feed) ask(question []byte, want qemu.RPType, take func(*qemu.RPMessage) error) error {
	if _, err := f.conn.Write(question); err != nil {
		return fmt.Errorf("asking QEMU: %w", err)
	}
	var m qemu.RPMessage
	for {
		if err := f.rp.Next(&m); err != nil {
			return fmt.Errorf("waiting for QEMU's %v: %w", want, err)
		}
		if m.Type == want {
			return take(&m)
		}
	}
}

// proceed makes QEMU take pages again. It repeats the faults that wait.
func (f *feed) proceed(ctx context.Context, resumed <-chan struct{}) error {
	e := f.e
	e.mu.Lock()
	was := e.stage
	e.mu.Unlock()
	if err := e.enter(stageFeeding); err != nil {
		return err
	}
	if _, err := f.conn.Write(qemu.AppendCommand(nil, qemu.CommandPostcopyResume, nil)); err != nil {
		return fmt.Errorf("asking QEMU to resume: %w", err)
	}
	select {
	case <-resumed:
	case <-f.done:
		return fmt.Errorf("waiting for QEMU to resume: %w", f.err)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.unstall(stallStream)
	if was == stageDelivering {
		e.stats.loaded = time.Now()
	}
	e.wakeAll()
	return nil
}
