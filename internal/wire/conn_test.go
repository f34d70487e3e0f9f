// SPDX-License-Identifier: Apache-2.0

package wire_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
	"scattergather.io/scattergather/internal/wire/wiretest"
)

// receive waits for a frame of a type.
func receive(t *testing.T, l *wire.Lane, want wire.Type) *wire.Frame {
	t.Helper()
	f := new(wire.Frame)
	if err := l.Receive(f); err != nil {
		t.Fatal(err)
	}
	if f.Type != want {
		t.Fatalf("%v received, want %v", f.Type, want)
	}
	return f
}

// wait fails the test unless the channel is closed soon.
func wait(t *testing.T, done <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Fatalf("%s: not within 5 s", what)
	}
}

func TestPairs(t *testing.T) {
	for _, role := range []wire.Role{wire.SourceToDestination, wire.SourceToIntermediary, wire.DestinationToIntermediary} {
		t.Run(role.String(), func(t *testing.T) {
			from, to := wiretest.Node(t, "node-a"), wiretest.Node(t, "node-b")
			from.Lanes, from.Software = 3, "agent 1\n"
			a, b := wiretest.PairOptions(t, role, from, to, "node-b")
			if a.Peer() != "node-b" || b.Peer() != "node-a" || a.Migration() != b.Migration() || b.Role() != role || a.Role() != role {
				t.Errorf("%v %v %v / %v %v %v", a.Peer(), a.Role(), a.Migration(), b.Peer(), b.Role(), b.Migration())
			}
			if a.Lanes() != 3 || b.Lanes() != 3 || b.Bulk(2).Number() != 2 || b.Bulk(2).Kind() != wire.LaneBulk {
				t.Errorf("%d and %d bulk lanes, want 3", a.Lanes(), b.Lanes())
			}
			if got := b.PeerSoftware(); got != `"agent 1\n"` {
				t.Errorf("software %s", got)
			}
			urgent := role != wire.SourceToIntermediary
			if (a.Urgent() != nil) != urgent || (b.Urgent() != nil) != urgent {
				t.Errorf("urgent lanes %v, %v", a.Urgent(), b.Urgent())
			}
			a.Close()
			var f wire.Frame
			if err := b.Control().Receive(&f); !errors.Is(err, io.EOF) {
				t.Errorf("after the peer closed: %v, want io.EOF", err)
			}
			wait(t, b.Done(), "closed by the peer")
			if err := b.Err(); !errors.Is(err, io.EOF) || !strings.Contains(err.Error(), "node-a") {
				t.Errorf("Err %v, want io.EOF with the peer's name", err)
			}
			if err := a.Err(); err != wire.ErrClosed {
				t.Errorf("Err %v, want ErrClosed", err)
			}
		})
	}
}

// place says where a type may be sent.
type place struct {
	role    wire.Role
	dialler bool
	kind    wire.LaneKind
}

// TestWhoMaySayWhat sends every message on every lane in both directions of all
// conversations; the allowed ones must arrive as they are.
func TestWhoMaySayWhat(t *testing.T) {
	const sd, si, di = wire.SourceToDestination, wire.SourceToIntermediary, wire.DestinationToIntermediary
	control := func(role wire.Role, dialler bool) []place { return []place{{role, dialler, wire.LaneControl}} }
	both := func(role wire.Role, dialler bool) []place {
		return []place{{role, dialler, wire.LaneUrgent}, {role, dialler, wire.LaneBulk}}
	}
	join := func(lists ...[]place) (all []place) {
		for _, l := range lists {
			all = append(all, l...)
		}
		return all
	}
	acks := join(both(sd, false), both(si, false))
	want := map[wire.Type][]place{
		wire.TypeResume: control(sd, false), wire.TypeSetup: control(sd, true), wire.TypeReady: control(sd, false),
		wire.TypeHolders: control(sd, true), wire.TypeRecords: control(sd, true), wire.TypePackage: control(sd, true),
		wire.TypeLoaded: control(sd, false), wire.TypeState: control(sd, true), wire.TypeCredit: control(sd, false),
		wire.TypeApplied: control(sd, false), wire.TypeCommit: control(sd, true), wire.TypeCommitted: control(sd, false),
		wire.TypeAbort: join(control(sd, true), control(sd, false)),
		wire.TypeAck:   acks, wire.TypeNack: acks, wire.TypeWant: {{sd, false, wire.LaneUrgent}}, wire.TypeRead: both(di, true),
		wire.TypeReserve: control(si, true), wire.TypeReserved: control(si, false),
		wire.TypeAttach: control(di, true), wire.TypeAttached: control(di, false),
		wire.TypeFree:     join(control(si, true), control(di, true)),
		wire.TypeDissolve: join(control(si, true), control(di, true)), wire.TypeDissolved: join(control(si, false), control(di, false)),
	}
	for _, role := range []wire.Role{sd, si, di} {
		a, b := wiretest.Pair(t, role, "node-a", "node-b")
		for _, dialler := range []bool{true, false} {
			from, to := a, b
			if !dialler {
				from, to = b, a
			}
			for _, lane := range []struct{ out, in *wire.Lane }{
				{from.Control(), to.Control()}, {from.Urgent(), to.Urgent()}, {from.Bulk(1), to.Bulk(1)},
			} {
				if lane.out == nil {
					continue
				}
				for _, m := range messages {
					ok := m.Type() == wire.TypeError
					for _, p := range want[m.Type()] {
						ok = ok || p == place{role, dialler, lane.out.Kind()}
					}
					checkSend(t, lane.out, lane.in, m, ok)
				}
			}
		}
	}
}

func checkSend(t *testing.T, out, in *wire.Lane, m wire.Message, ok bool) {
	t.Helper()
	err := out.Send(77, m)
	if (err == nil) != ok {
		t.Errorf("%v on the %v: %v, allowed %v", m.Type(), out, err, ok)
	}
	if err != nil {
		return
	}
	f := receive(t, in, m.Type())
	if f.Seq != 77 {
		t.Errorf("%v: number %d, want 77", m.Type(), f.Seq)
	}
	if got, known, err := parse(f.Type, f.Body); known {
		if d := cmp.Diff(m, got); err != nil || d != "" {
			t.Errorf("%v: %v %s", m.Type(), err, d)
		}
	}
}

func TestBatches(t *testing.T) {
	s := wire.NewSealer(wire.NewKey())
	for _, role := range []wire.Role{wire.SourceToDestination, wire.SourceToIntermediary, wire.DestinationToIntermediary} {
		a, b := wiretest.Pair(t, role, "node-a", "node-b")
		if role == wire.DestinationToIntermediary {
			a, b = b, a // pages come from the listener
		}
		if err := a.Bulk(0).SendBatch(wire.NewBatch()); err == nil {
			t.Error("an empty batch was sent")
		}
		batch := wire.NewBatch()
		batch.Reset(5)
		batch.Append(s, 1, 2, wire.EncodingRaw, bytes.Repeat([]byte("x"), pages.Size))
		batch.AppendMissing(3, 4)
		if a.Control().SendBatch(batch) == nil || b.Bulk(0).SendBatch(batch) == nil {
			t.Error("a batch was sent on the control lane, or the wrong way")
		}
		// Twice, on two lanes, as after the loss of a holder.
		for i := range 2 {
			if err := a.Bulk(i).SendBatch(batch); err != nil {
				t.Fatal(err)
			}
			f := receive(t, b.Bulk(i), wire.TypePages)
			p, err := f.Pages()
			if err != nil || f.Seq != 5 || p.Len() != 2 {
				t.Fatalf("%v, number %d, %d pages", err, f.Seq, p.Len())
			}
			p.Each(func(d wire.Desc, sealed []byte) error {
				if d.Missing {
					return nil
				}
				page, err := s.Open(nil, sealed, d.Index, d.Version, d.Encoding)
				if err != nil || len(page) != pages.Size || page[9] != 'x' {
					t.Errorf("page: %v", err)
				}
				return nil
			})
		}
	}
}

// TestFullBatches sends many full batches on all lanes at once while acks come back.
func TestFullBatches(t *testing.T) {
	a, b := wiretest.Pair(t, wire.SourceToIntermediary, "node-a", "node-b")
	s := wire.NewSealer(wire.NewKey())
	var wg sync.WaitGroup
	const rounds = 20
	for i := range a.Lanes() {
		wg.Go(func() {
			batch := wire.NewBatch()
			for n := range uint64(rounds) {
				batch.Reset(n)
				for batch.Append(s, pages.Index(batch.Len()), pages.Version(n), wire.EncodingRaw, make([]byte, pages.Size)) {
				}
				if err := a.Bulk(i).SendBatch(batch); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Go(func() {
			var f wire.Frame
			for range rounds {
				if err := b.Bulk(i).Receive(&f); err != nil {
					t.Error(err)
				}
				if p, err := f.Pages(); err != nil || p.Len() != wire.MaxBatch {
					t.Errorf("%v, %d pages", err, p.Len())
				}
				if err := b.Bulk(i).Send(f.Seq, wire.Ack{}); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Go(func() {
			var f wire.Frame
			for n := range uint64(rounds) {
				if err := a.Bulk(i).Receive(&f); err != nil || f.Type != wire.TypeAck || f.Seq != n {
					t.Errorf("%v, %v %d", err, f.Type, f.Seq)
				}
			}
		})
	}
	wg.Wait()
}

func TestConcurrentSenders(t *testing.T) {
	a, b := wiretest.Pair(t, wire.DestinationToIntermediary, "node-a", "node-b")
	const senders, each = 8, 50
	for n := range senders {
		go func() {
			for k := range each {
				if err := a.Urgent().Send(uint64(n), wire.Read{{Index: pages.Index(n), Version: pages.Version(k)}}); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	seen := make(map[uint64]int)
	for range senders * each {
		f := receive(t, b.Urgent(), wire.TypeRead)
		r, err := wire.ParseRead(nil, f.Body)
		if err != nil || uint64(r[0].Index) != f.Seq || int(r[0].Version) != seen[f.Seq] {
			t.Fatalf("%v: %v from sender %d, want its number %d", err, r, f.Seq, seen[f.Seq])
		}
		seen[f.Seq]++
	}
}

func TestPingsKeepIdleLanesAlive(t *testing.T) {
	t.Parallel()
	from, to := wiretest.Node(t, "node-a"), wiretest.Node(t, "node-b")
	from.IdleTimeout, to.IdleTimeout = 200*time.Millisecond, 10*time.Second
	a, b := wiretest.PairOptions(t, wire.SourceToDestination, from, to, "node-b")
	var wg sync.WaitGroup
	for _, l := range []*wire.Lane{a.Control(), a.Urgent(), a.Bulk(0), a.Bulk(1), b.Control(), b.Urgent(), b.Bulk(0), b.Bulk(1)} {
		wg.Go(func() {
			var f wire.Frame
			if err := l.Receive(&f); err != nil || f.Seq != 42 {
				t.Errorf("%v: %v, number %d", l, err, f.Seq)
			}
		})
	}
	time.Sleep(3 * from.IdleTimeout)
	for _, c := range []*wire.Conn{a, b} {
		for _, l := range []*wire.Lane{c.Control(), c.Urgent(), c.Bulk(0), c.Bulk(1)} {
			if err := l.Send(42, &wire.Error{}); err != nil {
				t.Error(err)
			}
		}
	}
	wg.Wait()
}

func TestCloseDuringReads(t *testing.T) {
	a, _ := wiretest.Pair(t, wire.SourceToDestination, "node-a", "node-b")
	errs := make(chan error)
	lanes := []*wire.Lane{a.Control(), a.Urgent(), a.Bulk(0), a.Bulk(1)}
	for _, l := range lanes {
		go func() { errs <- l.Receive(new(wire.Frame)) }()
	}
	time.Sleep(20 * time.Millisecond)
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() { a.Close() })
	}
	wg.Wait()
	for range lanes {
		if err := <-errs; err != wire.ErrClosed {
			t.Errorf("Receive returned %v, want ErrClosed", err)
		}
	}
	if err := a.Control().Send(0, wire.Ack{}); err == nil {
		t.Error("sent on a closed connection")
	}
	if err := a.Bulk(0).Send(0, &wire.Error{}); err != wire.ErrClosed {
		t.Errorf("Send returned %v, want ErrClosed", err)
	}
}

// TestLastWords has one side close while the other still sends: what it said before must
// arrive nevertheless.
func TestLastWords(t *testing.T) {
	a, b := wiretest.Pair(t, wire.SourceToDestination, "node-a", "node-b")
	s, batch := wire.NewSealer(wire.NewKey()), wire.NewBatch()
	for batch.Append(s, pages.Index(batch.Len()), 0, wire.EncodingRaw, make([]byte, pages.Size)) {
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for a.Bulk(0).SendBatch(batch) == nil {
		}
	}()
	go b.Fail(&wire.Error{Code: wire.CodeStopping, Text: "shutting down"})
	go b.Control().Receive(new(wire.Frame))
	f := receive(t, a.Control(), wire.TypeError)
	if e, err := wire.ParseError(f.Body); err != nil || e.Code != wire.CodeStopping {
		t.Errorf("last words: %v, %v", e, err)
	}
	a.Close()
	<-stopped
	wait(t, b.Done(), "Fail")
}

func TestFailWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	a, b := wiretest.Pair(t, wire.SourceToDestination, "node-a", "node-b")
	before := time.Now()
	a.Fail(&wire.Error{Code: wire.CodeInternal})
	if d := time.Since(before); d > 3*time.Second {
		t.Errorf("Fail took %v with a peer that does nothing", d)
	}
	if a.Err() != wire.ErrClosed {
		t.Errorf("Err %v", a.Err())
	}
	receive(t, b.Control(), wire.TypeError)
}

func TestAcceptEnds(t *testing.T) {
	l := wiretest.Listen(t, wiretest.Node(t, "node-b"))
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("enough")
	cancel(stop)
	if _, err := l.Accept(ctx); err != stop {
		t.Errorf("Accept returned %v, want the context's cause", err)
	}
	time.AfterFunc(20*time.Millisecond, func() { l.Close() })
	if _, err := l.Accept(t.Context()); err != wire.ErrClosed {
		t.Errorf("Accept returned %v, want ErrClosed", err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}
