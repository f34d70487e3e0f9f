// SPDX-License-Identifier: Apache-2.0

package wire_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
	"scattergather.io/scattergather/internal/wire/wiretest"
)

// meddler is a connection whose writes can be changed on their way: write gets each
// write and returns what goes out. nil lets it through.
type meddler struct {
	net.Conn
	mu    sync.Mutex
	write func(c *meddler, b []byte) []byte
}

func (m *meddler) meddle(write func(c *meddler, b []byte) []byte) {
	m.mu.Lock()
	m.write = write
	m.mu.Unlock()
}

func (m *meddler) Write(b []byte) (int, error) {
	m.mu.Lock()
	write := m.write
	m.mu.Unlock()
	if write != nil {
		if _, err := m.Conn.Write(write(m, bytes.Clone(b))); err != nil {
			return 0, err
		}
		return len(b), nil
	}
	return m.Conn.Write(b)
}

// meddled returns both ends of a connection with one bulk lane, and the dialler's TCP
// connections: control first, bulk last.
func meddled(t *testing.T, role wire.Role, idle time.Duration) (a, b *wire.Conn, tcp []*meddler) {
	t.Helper()
	from, to := wiretest.Node(t, "node-a"), wiretest.Node(t, "node-b")
	from.Lanes, from.IdleTimeout, to.IdleTimeout = 1, 30*time.Second, idle
	var mu sync.Mutex
	from.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
		raw, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		m := &meddler{Conn: raw}
		mu.Lock()
		defer mu.Unlock()
		tcp = append(tcp, m)
		return m, nil
	}
	a, b = wiretest.PairOptions(t, role, from, to, "node-b")
	return a, b, tcp
}

func onePage(s *wire.Sealer) *wire.Batch {
	b := wire.NewBatch()
	b.Reset(1)
	b.Append(s, 5, 6, wire.EncodingRaw, bytes.Repeat([]byte("p"), pages.Size))
	b.AppendMissing(7, 8)
	return b
}

// TestFlippedBits changes one bit of a Pages frame on its way, everywhere in the header,
// the descriptors and the tag, and here and there in the page.
func TestFlippedBits(t *testing.T) {
	t.Parallel()
	s := wire.NewSealer(wire.NewKey())
	frame := 16 + 4112 + 2*16 + 16
	for at := range frame {
		if at > 40 && at < 4100 && at%1000 != 0 || at >= 4 && at < 7 { // 4 to 6: see TestOversized
			continue
		}
		a, b, tcp := meddled(t, wire.SourceToIntermediary, 300*time.Millisecond)
		tcp[1].meddle(func(_ *meddler, frame []byte) []byte {
			frame[at] ^= 1 << (at % 8)
			return frame
		})
		if err := a.Bulk(0).SendBatch(onePage(s)); err != nil {
			t.Fatal(err)
		}
		var f wire.Frame
		err := b.Bulk(0).Receive(&f)
		// A longer length is waited for in vain.
		longer := at == 7 && errors.Is(err, wire.ErrTimeout)
		if !errors.Is(err, wire.ErrProtocol) && !longer {
			t.Errorf("byte %d: %v, want ErrProtocol", at, err)
		}
		wait(t, b.Done(), "closing after a violation")
		if !errors.Is(b.Err(), err) {
			t.Errorf("byte %d: the connection says %v, Receive said %v", at, b.Err(), err)
		}
		a.Close()
		b.Close()
	}
}

// TestFlippedPage does so where the receiver can open the page: what opens is right.
func TestFlippedPage(t *testing.T) {
	s := wire.NewSealer(wire.NewKey())
	a, b, tcp := meddled(t, wire.SourceToDestination, 30*time.Second)
	last := tcp[0]
	for _, m := range tcp {
		if m.LocalAddr().String() == b.Bulk(0).RemoteAddrForTest().String() {
			last = m
		}
	}
	last.meddle(func(_ *meddler, frame []byte) []byte {
		frame[16+1000] ^= 1
		return frame
	})
	if err := a.Bulk(0).SendBatch(onePage(s)); err != nil {
		t.Fatal(err)
	}
	f := receive(t, b.Bulk(0), wire.TypePages)
	p, err := f.Pages()
	if err != nil {
		t.Fatal(err)
	}
	p.Each(func(d wire.Desc, sealed []byte) error {
		if _, err := s.Open(nil, sealed, d.Index, d.Version, d.Encoding); !d.Missing && !errors.Is(err, wire.ErrSealed) {
			t.Errorf("a changed page opens: %v", err)
		}
		return nil
	})
}

func TestRepeatedFrame(t *testing.T) {
	a, b, tcp := meddled(t, wire.SourceToIntermediary, 30*time.Second)
	tcp[1].meddle(func(_ *meddler, frame []byte) []byte { return append(frame, frame...) })
	if err := a.Bulk(0).SendBatch(onePage(wire.NewSealer(wire.NewKey()))); err != nil {
		t.Fatal(err)
	}
	receive(t, b.Bulk(0), wire.TypePages)
	if err := b.Bulk(0).Receive(new(wire.Frame)); !errors.Is(err, wire.ErrProtocol) {
		t.Errorf("the same frame again: %v, want ErrProtocol", err)
	}
}

// TestCutFrame ends a lane within a frame, at every length up to some, which must not
// look like an orderly end.
func TestCutFrame(t *testing.T) {
	for _, n := range []int{1, 15, 16, 17, 4000} {
		a, b, tcp := meddled(t, wire.SourceToIntermediary, 30*time.Second)
		tcp[1].meddle(func(c *meddler, frame []byte) []byte {
			c.Conn.Write(frame[:n])
			c.Close()
			return nil
		})
		a.Bulk(0).SendBatch(onePage(wire.NewSealer(wire.NewKey())))
		if err := b.Bulk(0).Receive(new(wire.Frame)); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d bytes of a frame: %v, want ErrUnexpectedEOF", n, err)
		}
	}
}

func TestOversized(t *testing.T) {
	a, b, tcp := meddled(t, wire.SourceToIntermediary, 30*time.Second)
	tcp[1].meddle(func(_ *meddler, frame []byte) []byte {
		frame[4] = 0xff
		return frame
	})
	if err := a.Bulk(0).SendBatch(onePage(wire.NewSealer(wire.NewKey()))); err != nil {
		t.Fatal(err)
	}
	var err error
	allocated := testing.AllocsPerRun(1, func() { err = errors.Join(err, b.Bulk(0).Receive(new(wire.Frame))) })
	if !errors.Is(err, wire.ErrProtocol) || allocated > 100 {
		t.Errorf("a frame of 4 GiB: %v, %v allocations", err, allocated)
	}
}

// TestSilence has the peer vanish without a trace, in the middle of a header and between
// frames.
func TestSilence(t *testing.T) {
	for _, n := range []int{0, 7, 100} {
		a, b, tcp := meddled(t, wire.SourceToIntermediary, 200*time.Millisecond)
		tcp[1].meddle(func(_ *meddler, frame []byte) []byte { return frame[:min(n, len(frame))] })
		go a.Bulk(0).SendBatch(onePage(wire.NewSealer(wire.NewKey())))
		before := time.Now()
		err := b.Bulk(0).Receive(new(wire.Frame))
		if d := time.Since(before); !errors.Is(err, wire.ErrTimeout) || d < 150*time.Millisecond || d > 3*time.Second {
			t.Errorf("%d bytes, then silence: %v after %v, want ErrTimeout", n, err, d)
		}
	}
}

// TestPeerThatTakesNothing has a receiver that does not read.
func TestPeerThatTakesNothing(t *testing.T) {
	from, to := wiretest.Node(t, "node-a"), wiretest.Node(t, "node-b")
	from.IdleTimeout = 200 * time.Millisecond
	a, _ := wiretest.PairOptions(t, wire.SourceToIntermediary, from, to, "node-b")
	s, b := wire.NewSealer(wire.NewKey()), wire.NewBatch()
	for b.Append(s, 0, pages.Version(b.Len()), wire.EncodingRaw, make([]byte, pages.Size)) {
	}
	var err error
	for n := 0; err == nil && n < 1000; n++ {
		err = a.Bulk(0).SendBatch(b)
	}
	if !errors.Is(err, wire.ErrTimeout) {
		t.Errorf("SendBatch returned %v, want ErrTimeout", err)
	}
	wait(t, a.Done(), "closing after a timeout")
}

// TestMissingLanes opens two of four lanes: both sides give up, and nothing stays.
func TestMissingLanes(t *testing.T) {
	from, to := wiretest.Node(t, "node-a"), wiretest.Node(t, "node-b")
	from.Lanes = 2
	to.HandshakeTimeout, to.MaxConns = 300*time.Millisecond, 1
	log := make(logged, 16)
	log.into(&to)
	l := wiretest.Listen(t, to)
	hanging := from
	var mu sync.Mutex
	opened := 0
	hanging.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
		mu.Lock()
		opened++
		n := opened
		mu.Unlock()
		if n > 2 {
			<-ctx.Done()
			return nil, context.Cause(ctx)
		}
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
	hanging.HandshakeTimeout = time.Second
	dial := func(o wire.Options) (*wire.Conn, error) {
		return wire.Dial(t.Context(), o, l.Addr().String(), "node-b", wire.SourceToDestination, wire.NewMigrationID())
	}
	done := make(chan error)
	go func() {
		_, err := dial(hanging)
		done <- err
	}()
	log.expect(t, "lanes did not all come", "node-a")
	if err := <-done; err == nil {
		t.Error("Dial succeeded with half of its lanes")
	}
	// The only place is free again, and Accept never saw the half.
	c, err := dial(from)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got, err := l.Accept(t.Context())
	if err != nil || got.Migration() != c.Migration() {
		t.Fatalf("%v, %v", got, err)
	}
	defer got.Close()
	if _, err = dial(from); err == nil {
		t.Fatal("a second connection where one is allowed")
	}
	var e *wire.Error
	if !errors.As(err, &e) || e.Code != wire.CodeBusy {
		t.Errorf("a second connection where one is allowed: %v, want CodeBusy", err)
	}
}

// TestSlowLoris fills the places for connections that say next to nothing, from one
// address. Another address must get in, and the places must become free.
func TestSlowLoris(t *testing.T) {
	t.Parallel()
	to := wiretest.Node(t, "node-b")
	to.HandshakeTimeout = 2 * time.Second
	l := wiretest.Listen(t, to)
	var slow []net.Conn
	defer func() {
		for _, c := range slow {
			c.Close()
		}
	}()
	for i := range 300 {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		slow = append(slow, c)
		// A TLS record, a lane's preamble, or nothing at all.
		c.Write([]byte{"\x16S"[i%2]}[:min(i%3, 1)])
	}
	refused := 0
	for _, c := range slow {
		c.SetReadDeadline(time.Now().Add(time.Millisecond))
		if _, err := c.Read(make([]byte, 1)); !isTimeout(err) {
			refused++
		}
	}
	if refused == 0 {
		t.Error("300 connections from one address were all admitted")
	}
	other := wiretest.Node(t, "node-a")
	other.Dialer = (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}).DialContext
	c, err := wire.Dial(t.Context(), other, l.Addr().String(), "node-b", wire.SourceToDestination, wire.NewMigrationID())
	if err != nil {
		t.Fatalf("another address is kept out: %v", err)
	}
	c.Close()
	for i, c := range slow {
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(make([]byte, 1)); isTimeout(err) {
			t.Fatalf("slow connection %d still has its place", i)
		}
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

func ExampleMigrationID() {
	id, err := wire.ParseMigrationID("F81D4FAE-7DEC-11D0-A765-00A0C91E6BF6")
	fmt.Println(id, err)
	for _, s := range []string{"", "f81d4fae7dec11d0a76500a0c91e6bf6", "f81d4fae-7dec-11d0-a765-00a0c91e6bfg"} {
		_, err := wire.ParseMigrationID(s)
		fmt.Println(err != nil)
	}
	// Output:
	// f81d4fae-7dec-11d0-a765-00a0c91e6bf6 <nil>
	// true
	// true
	// true
}
