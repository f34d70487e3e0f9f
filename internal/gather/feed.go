// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"scattergather.io/scattergather/internal/qemu"
)

// feed is one connection to the destination QEMU: the stream into it, and the return
// path that comes back. Closing it after the device state was delivered pauses the
// guest's migration, so that happens only when it is broken anyway or this process
// ends.
type feed struct {
	e    *Engine
	conn net.Conn
	rp   *qemu.RPDecoder

	// done is closed when the return path has ended; err then says why, nil meaning
	// that QEMU has everything.
	done chan struct{}
	err  error

	// expect holds the PINGs of which expected is closed when all were answered; both
	// are guarded by Engine.mu.
	expect   []uint32
	expected chan struct{}
	// resumed is closed when QEMU has agreed to go on after a broken stream.
	resumed chan struct{}
}

func (e *Engine) newFeed(conn net.Conn) *feed {
	return &feed{
		e: e, conn: conn, done: make(chan struct{}),
		rp: qemu.NewRPDecoder(conn, e.layout.Blocks()),
	}
}

// openingPing is the value of the PING behind the opening; stock QEMU uses it there.
const openingPing = 1

// firstPing is where the values of the PINGs behind batches of pages begin, so that
// none of them equals one of QEMU's own in the package. PONG is to come for each.
const firstPing = 0x53470000

// waitFor makes the feed wait for these PINGs; the caller holds e.mu.
func (f *feed) waitFor(pings []uint32) {
	f.expect = pings
	f.expected = make(chan struct{})
	if len(pings) == 0 {
		close(f.expected)
	}
}

// begin waits for the source to describe the VM, makes QEMU accept it, and gives QEMU
// its device state when that has come.
func (e *Engine) begin(ctx context.Context) (*feed, error) {
	if err := wait(ctx, e.described); err != nil {
		return nil, err
	}
	if e.cfg.Suits != nil {
		if err := e.cfg.Suits(ctx, e.opening.Machine, e.opening.RAM.Blocks); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrRefused, err)
		}
	}
	conn, err := e.cfg.Connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: connecting to it: %w", ErrRefused, err)
	}
	f := e.newFeed(conn)
	go f.receive()
	err = f.open(ctx)
	if err == nil {
		e.mu.Lock()
		e.ready = true
		e.wakeAll()
		e.mu.Unlock()
		err = f.waitPackage(ctx)
	}
	if err == nil {
		err = f.deliver(ctx)
	}
	if err != nil {
		conn.Close()
		<-f.done
		return nil, err
	}
	return f, nil
}

// open writes all that QEMU must know before the device state, and waits for it to
// have accepted that.
func (f *feed) open(ctx context.Context) error {
	e := f.e
	ctx, cancel := context.WithTimeoutCause(ctx, e.cfg.OpenTimeout,
		fmt.Errorf("%w: no answer to the description of the VM within %v", ErrRefused, e.cfg.OpenTimeout))
	defer cancel()
	e.mu.Lock()
	// The second PING is answered when the blocks were accepted, too.
	f.waitFor([]uint32{openingPing, openingPing + 1})
	expected := f.expected
	e.mu.Unlock()
	msg := qemu.AppendPing(qemu.AppendOpening(nil, e.opening, openingPing), openingPing+1)
	if err := f.write(ctx, msg); err != nil {
		return f.refused(ctx, "reading the description of the VM", err)
	}
	select {
	case <-expected:
		return nil
	case <-f.done:
		return f.refused(ctx, "reading the description of the VM", f.err)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// refused is the error of a QEMU that closed the stream before its guest ran.
func (f *feed) refused(ctx context.Context, doing string, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	su := f.e.opening
	return fmt.Errorf("%w: it closed the stream while %s (machine %s, %d RAM blocks of %d bytes together): %w",
		ErrRefused, doing, su.Machine, len(su.RAM.Blocks), su.RAM.Total(), err)
}

// waitPackage waits for the device state while it watches QEMU.
func (f *feed) waitPackage(ctx context.Context) error {
	select {
	case <-f.e.packaged:
		return nil
	case <-f.done:
		return f.refused(ctx, "waiting for the device state", f.err)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// deliver writes the device state. From here on QEMU may run the guest, so that it is
// written down before.
func (f *feed) deliver(ctx context.Context) error {
	e := f.e
	inner, err := qemu.PackagePings(e.pkg)
	if err == nil && len(inner) == 0 {
		err = errors.New("it has no PING by which QEMU could say that it has loaded it")
	}
	if err != nil {
		return fmt.Errorf("%w: device state of %d bytes: %w", ErrRefused, len(e.pkg), err)
	}
	if err := e.enter(stageDelivering); err != nil {
		return err
	}
	e.mu.Lock()
	f.waitFor(inner)
	e.mu.Unlock()
	var msg []byte
	for _, b := range e.layout.Blocks() {
		// QEMU needs a DISCARD before LISTEN (see internal/qemu), and has thrown all of
		// its memory away at ADVISE: discarding whole blocks costs nothing more.
		if b.Length > 0 {
			msg = qemu.AppendDiscard(msg, b.Name, []qemu.Range{{Length: b.Length}})
		}
	}
	msg = qemu.AppendPackageHeader(msg, len(e.pkg))
	if err := f.write(ctx, msg); err != nil {
		return f.refused(ctx, "being given the device state", err)
	}
	if err := f.write(ctx, e.pkg); err != nil {
		return f.refused(ctx, "being given the device state", err)
	}
	e.mu.Lock()
	e.pkg = nil
	e.mu.Unlock()
	return nil
}

// enter begins a stage and keeps that.
func (e *Engine) enter(st stage) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stage, e.state.meta.Stage = st, st
	e.log.V(1).Info("Entered stage", "stage", st.String())
	return e.state.save()
}

// write writes all of msg; ctx ends it with a broken stream.
func (f *feed) write(ctx context.Context, msg []byte) error {
	stop := context.AfterFunc(ctx, func() { _ = f.conn.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	_, err := f.conn.Write(msg)
	return err
}

// errClosed is why a return path ended without QEMU having said that it has all.
var errClosed = errors.New("it closed the connection")

// receive takes what QEMU says until it has nothing more to say. It runs as long as
// the connection, which has no deadline for reading: a guest that misses no page says
// nothing for as long as it likes.
func (f *feed) receive() {
	defer close(f.done)
	var m qemu.RPMessage
	for {
		if err := f.rp.Next(&m); err != nil {
			if errors.Is(err, io.EOF) {
				err = errClosed
			}
			f.err = err
			return
		}
		if over, err := f.message(&m); over || err != nil {
			f.err = err
			return
		}
	}
}

// message acts on one message of the return path; over is true behind the last one.
func (f *feed) message(m *qemu.RPMessage) (over bool, err error) {
	e := f.e
	switch m.Type {
	case qemu.RPPong:
		return false, f.pong(m.Value)
	case qemu.RPReqPages, qemu.RPReqPagesID:
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.stage < stageDelivering {
			return false, fmt.Errorf("it asked for pages before it had the device state")
		}
		e.stats.requests++
		if n := e.book.fault(m.Block, m.Start, m.Length, time.Now()); n > 0 {
			e.near = min(e.near+n*nearPages, nearMost)
			e.wakeAll()
		}
		return false, nil
	case qemu.RPShut:
		e.mu.Lock()
		defer e.mu.Unlock()
		if m.Value != 0 {
			return true, fmt.Errorf("it ended its migration with status %d", m.Value)
		}
		if e.stage < stageEnding {
			return true, errors.New("it ended its migration before it had every page")
		}
		return true, nil
	case qemu.RPResumeAck:
		if f.resumed == nil || m.Value != 1 {
			return false, fmt.Errorf("it answered %d to a resume", m.Value)
		}
		close(f.resumed)
		f.resumed = nil
		return false, nil
	case qemu.RPSwitchoverAck:
		return false, nil
	}
	return false, fmt.Errorf("it sent an unexpected %v", m.Type)
}

// pong takes the answer to a PING.
func (f *feed) pong(value uint32) error {
	e := f.e
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(f.expect) > 0 && f.expect[0] == value {
		if f.expect = f.expect[1:]; len(f.expect) == 0 {
			close(f.expected)
		}
		return nil
	}
	e.landed(value)
	return nil
}

// pump writes pages until QEMU has all of them. When it fails, the stream is broken
// and closed.
func (e *Engine) pump(ctx context.Context, f *feed) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	e.setPumping(true)
	var wg sync.WaitGroup
	wg.Go(func() { e.awaitLoaded(ctx, f, cancel) })
	wg.Go(func() {
		if err := newWriter(e, f).run(ctx); err != nil {
			cancel(err)
		}
	})
	var err error
	select {
	case <-f.done:
		err = f.err
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	cancel(err)
	f.conn.Close()
	<-f.done
	wg.Wait()
	e.setPumping(false)
	e.mu.Lock()
	defer e.mu.Unlock()
	if err == nil {
		e.stats.gathered = time.Now()
		e.landAll()
		return nil
	}
	if f.err != nil && errors.Is(err, errBroken) {
		err = f.err
	}
	if e.stage < stageFeeding && len(f.expect) > 0 {
		// Its answer to the PING would have come before the end, had it loaded.
		return f.refused(context.Background(), "loading the device state", err)
	}
	return err
}

// setPumping notes whether QEMU's stream takes pages.
func (e *Engine) setPumping(on bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.pumping = on
}

// awaitLoaded notes when QEMU has loaded the device state.
func (e *Engine) awaitLoaded(ctx context.Context, f *feed, cancel context.CancelCauseFunc) {
	e.mu.Lock()
	expected := f.expected
	e.mu.Unlock()
	if expected == nil || wait(ctx, expected) != nil {
		return
	}
	if err := e.enter(stageFeeding); err != nil {
		cancel(err)
		return
	}
	e.mu.Lock()
	e.stats.loaded = time.Now()
	e.wakeAll()
	e.mu.Unlock()
}
