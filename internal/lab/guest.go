// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"scattergather.io/scattergather/internal/lab/guest"
)

// Side says on which QEMU a guest runs.
type Side int

// The two ends of a migration.
const (
	AtSource Side = iota
	AtDestination
)

// ErrWrongPages is what a guest's verification ends with when a page does not
// hold what it must.
var ErrWrongPages = errors.New("the guest found wrong pages")

// beat is one sign of life and when it reached the host.
type beat struct {
	at   time.Time
	side Side
	guest.Beat
}

// Guest watches a guest by the telemetry on its second serial port, across the
// migration: the bytes of the destination's port follow those of the source's.
type Guest struct {
	Name string

	mu       sync.Mutex
	decoder  guest.Decoder
	lines    [2]*net.UnixConn
	side     Side // the one heard last
	beats    []beat
	status   guest.Status
	wrong    []guest.Wrong
	token    uint32
	filled   chan guest.Filled
	verified chan guest.Verified
	faults   chan guest.Faults
	resumed  chan struct{}
	readers  sync.WaitGroup
}

// NewGuest makes a watcher; Attach gives it its ports.
func NewGuest(name string) *Guest {
	return &Guest{
		Name:   name,
		filled: make(chan guest.Filled, 1), verified: make(chan guest.Verified, 1), faults: make(chan guest.Faults, 1),
		resumed: make(chan struct{}),
	}
}

// Attach connects to the telemetry port of one of the guest's two QEMUs, a
// unix socket.
func (g *Guest) Attach(ctx context.Context, side Side, path string) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("guest %s: attaching to its telemetry: %w", g.Name, err)
	}
	line := conn.(*net.UnixConn)
	file, err := line.File()
	if err != nil {
		return errors.Join(err, line.Close())
	}
	g.mu.Lock()
	g.lines[side] = line
	g.mu.Unlock()
	g.readers.Go(func() {
		defer file.Close()
		g.listen(side, int(file.Fd()))
	})
	return nil
}

// listen reads with real-time priority and blocking calls, so that a busy
// machine does not look like a guest that stands still. File descriptors made
// by File are in blocking mode after Fd.
func (g *Guest) listen(side Side, fd int) {
	// Never unlocked: the priority must not outlive this goroutine.
	runtime.LockOSThread()
	// Without the right to it the measurement is a little noisier, no more.
	_ = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0)
	for buf := make([]byte, 4096); ; {
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n <= 0 || err != nil {
			return
		}
		g.hear(side, time.Now(), buf[:n])
	}
}

func (g *Guest) hear(side Side, at time.Time, data []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.decoder.Feed(data, func(t guest.Type, payload []byte) {
		if err := g.take(side, at, t, payload); err != nil {
			// A frame with a good checksum and a bad length: the guest is
			// of another version than the lab, or its memory is damaged.
			g.wrong = append(g.wrong, guest.Wrong{})
		}
	})
}

// take handles one frame; the lock is held.
func (g *Guest) take(side Side, at time.Time, t guest.Type, payload []byte) error {
	switch t {
	case guest.TypeBeat:
		b := beat{at: at, side: side}
		if side == AtDestination && g.side == AtSource {
			// A late beat of the source does not turn it back.
			g.side = side
			close(g.resumed)
		}
		err := guest.Decode(payload, &b.Beat)
		g.beats = append(g.beats, b)
		return err
	case guest.TypeStatus:
		return guest.Decode(payload, &g.status)
	case guest.TypeWrong:
		var w guest.Wrong
		err := guest.Decode(payload, &w)
		g.wrong = append(g.wrong, w)
		return err
	case guest.TypeFilled:
		return deliver(payload, g.filled)
	case guest.TypeVerified:
		return deliver(payload, g.verified)
	case guest.TypeFaults:
		return deliver(payload, g.faults)
	}
	return nil
}

// deliver hands a reply to who waits for it; a reply that nobody fetched gives
// way.
func deliver[T any](payload []byte, to chan T) error {
	var reply T
	if err := guest.Decode(payload, &reply); err != nil {
		return err
	}
	select {
	case <-to:
	default:
	}
	to <- reply
	return nil
}

func await[T any](ctx context.Context, g *Guest, what string, from chan T) (T, error) {
	select {
	case reply := <-from:
		return reply, nil
	case <-ctx.Done():
		var zero T
		return zero, fmt.Errorf("guest %s: waiting for it to %s: %w", g.Name, what, context.Cause(ctx))
	}
}

// WaitFilled waits until the guest has booted and filled its memory.
func (g *Guest) WaitFilled(ctx context.Context) (guest.Filled, error) {
	return await(ctx, g, "boot and fill its memory", g.filled)
}

// Resumed is closed when the guest is first heard from the destination.
func (g *Guest) Resumed() <-chan struct{} { return g.resumed }

// send gives the guest a command, where it runs now.
func (g *Guest) send(t guest.Type, payload any) error {
	g.mu.Lock()
	line := g.lines[g.side]
	g.mu.Unlock()
	if _, err := line.Write(guest.Append(nil, t, payload)); err != nil {
		return fmt.Errorf("guest %s: sending a command: %w", g.Name, err)
	}
	return nil
}

// Verify makes the guest verify every page from now on and waits for the
// result. The error wraps ErrWrongPages when a page was ever wrong.
func (g *Guest) Verify(ctx context.Context) (guest.Verified, error) {
	g.mu.Lock()
	g.token++
	token := g.token
	g.mu.Unlock()
	if err := g.send(guest.TypeVerify, guest.Verify{Token: token}); err != nil {
		return guest.Verified{}, err
	}
	for {
		reply, err := await(ctx, g, "verify every page", g.verified)
		if err != nil {
			return reply, err
		}
		if reply.Token == token {
			return reply, g.wrongError(reply.Wrong)
		}
	}
}

func (g *Guest) wrongError(count uint32) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if count == 0 && len(g.wrong) == 0 {
		return nil
	}
	var text strings.Builder
	for _, w := range g.wrong[:min(len(g.wrong), 5)] {
		text.WriteString("\n  " + w.String())
	}
	return fmt.Errorf("guest %s: %w: %d%s", g.Name, ErrWrongPages, max(count, uint32(len(g.wrong))), text.String())
}

// Faults asks the guest for its slow first touches from the switch until a
// moment of the host's clock.
func (g *Guest) Faults(ctx context.Context, until time.Time) (guest.Faults, error) {
	last, _, ok := g.switchBeats()
	if !ok {
		return guest.Faults{}, fmt.Errorf("guest %s never ran at the destination", g.Name)
	}
	window := guest.Report{Since: last.Nanos, Until: g.clockAt(until)}
	if err := g.send(guest.TypeReport, window); err != nil {
		return guest.Faults{}, err
	}
	return await(ctx, g, "report its faults", g.faults)
}

// Progress is what the guest did up to now.
func (g *Guest) Progress() (status guest.Status, served uint32, side Side) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if n := len(g.beats); n > 0 {
		served = g.beats[n-1].Served
	}
	return g.status, served, g.side
}

// Close ends the watching.
func (g *Guest) Close() {
	g.mu.Lock()
	lines := g.lines
	g.mu.Unlock()
	for _, line := range lines {
		if line != nil {
			// Shutdown wakes the reader, which has a descriptor of its own.
			_ = line.CloseRead()
			_ = line.Close()
		}
	}
	g.readers.Wait()
}
