// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
	"scattergather.io/scattergather/internal/wire/wiretest"
)

const intermediary wire.Identity = "node-i"

// server is an intermediary that listens.
type server struct {
	*Pool
	t      testing.TB
	addr   string
	served chan error // what Serve returned
}

func serve(ctx context.Context, t testing.TB, p *Pool) *server {
	t.Helper()
	s := &server{Pool: p, t: t, served: make(chan error, 100)}
	l := wiretest.Listen(t, wiretest.Node(t, intermediary))
	s.addr = l.Addr().String()
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept(context.Background())
			if err != nil {
				return
			}
			all.Go(func() { s.served <- p.Serve(ctx, c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		all.Wait()
	})
	return s
}

func (s *server) dial(node wire.Identity, role wire.Role, id wire.MigrationID) *peer {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
	defer cancel()
	c, err := wire.Dial(ctx, wiretest.Node(s.t, node), s.addr, intermediary, role, id)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return &peer{Conn: c, t: s.t}
}

// peer is the other side of a server: a source or a destination.
type peer struct {
	*wire.Conn
	t   testing.TB
	seq uint64
	f   wire.Frame
}

func (p *peer) send(l *wire.Lane, m wire.Message) {
	p.t.Helper()
	p.seq++
	if err := l.Send(p.seq, m); err != nil {
		p.t.Fatal(err)
	}
}

// answer waits for the answer to the last frame.
func (p *peer) answer(l *wire.Lane, want wire.Type) *wire.Frame {
	p.t.Helper()
	if err := l.Receive(&p.f); err != nil {
		p.t.Fatal(err)
	}
	if p.f.Type != want || p.f.Seq != p.seq {
		p.t.Fatalf("%v that answers frame %d, want %v and %d: %q", p.f.Type, p.f.Seq, want, p.seq, p.f.Body)
	}
	return &p.f
}

func (p *peer) refused(l *wire.Lane, m wire.Message, code wire.Code) {
	p.t.Helper()
	p.send(l, m)
	e, err := wire.ParseError(p.answer(l, wire.TypeError).Body)
	if err != nil || e.Code != code {
		p.t.Fatalf("%v is answered with %v (error %v), want %v", m.Type(), e, err, code)
	}
}

func (p *peer) reserve(bytes uint64) wire.Reserved {
	p.t.Helper()
	p.send(p.Control(), &wire.Reserve{Bytes: bytes, Reader: destination})
	m, err := wire.ParseReserved(p.answer(p.Control(), wire.TypeReserved).Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return m
}

func (p *peer) attach(s wire.Session) wire.Attached {
	p.t.Helper()
	p.send(p.Control(), &wire.Attach{Session: s})
	m, err := wire.ParseAttached(p.answer(p.Control(), wire.TypeAttached).Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return m
}

func (p *peer) put(l *wire.Lane, want wire.Type, ps ...Page) {
	p.t.Helper()
	b := wire.NewBatch()
	p.seq++
	b.Reset(p.seq)
	for _, page := range ps {
		if !b.AppendSealed(wire.Desc{Index: page.Index, Version: page.Version, Encoding: page.Encoding}, page.Sealed) {
			p.t.Fatalf("page %d does not fit", page.Index)
		}
	}
	if err := l.SendBatch(b); err != nil {
		p.t.Fatal(err)
	}
	p.answer(l, want)
}

func (p *peer) nacked(l *wire.Lane, code wire.Code, ps ...Page) {
	p.t.Helper()
	p.put(l, wire.TypeNack, ps...)
	if m, err := wire.ParseNack(p.f.Body); err != nil || m.Code != code {
		p.t.Fatalf("refused with %v (error %v), want %v", m.Code, err, code)
	}
}

// read wants n pages from first on in version v, and that just those of them are there
// for which held is true.
func (p *peer) read(l *wire.Lane, first pages.Index, n int, v pages.Version, held func(pages.Index) bool) {
	p.t.Helper()
	var m wire.Read
	for k := range n {
		m = append(m, wire.PageRef{Index: first + pages.Index(k), Version: v})
	}
	p.send(l, m)
	frame, err := p.answer(l, wire.TypePages).Pages()
	if err != nil || frame.Len() != n {
		p.t.Fatalf("%d pages, error %v; want %d", frame.Len(), err, n)
	}
	k := 0
	err = frame.Each(func(d wire.Desc, sealed []byte) error {
		i := m[k].Index
		k++
		switch {
		case d.Index != i || d.Version != v || d.Missing == held(i):
			p.t.Errorf("page %d is answered with %+v", i, d)
		case !d.Missing && (!slices.Equal(sealed, content(nil, i, v)) || d.Encoding != encodingOf(i)):
			p.t.Errorf("page %d holds other bytes than were put", i)
		}
		return nil
	})
	if err != nil {
		p.t.Fatal(err)
	}
}

func all(pages.Index) bool  { return true }
func none(pages.Index) bool { return false }

func TestScatterThenGather(t *testing.T) {
	dir := shm(t)
	s := serve(t.Context(), t, open(t, config(dir)))
	id := wire.NewMigrationID()
	src := s.dial(source, wire.SourceToIntermediary, id)
	granted := src.reserve(8 << 20)
	if granted.Bytes != 8<<20 {
		t.Errorf("granted %d bytes", granted.Bytes)
	}
	for k := range 20 {
		src.put(src.Bulk(k%2), wire.TypeAck, run(pages.Index(64*k), 64, 0)...)
	}
	src.put(src.Bulk(0), wire.TypeAck, run(0, 64, 1)...)
	src.put(src.Bulk(1), wire.TypeAck, run(0, 64, 0)...) // late
	src.send(src.Control(), wire.Free{{First: 64, Count: 6}})

	dst := s.dial(destination, wire.DestinationToIntermediary, id)
	soon(t, "freeing by the source", func() bool { return s.Stats().Pages == 20*64-6 })
	if m := dst.attach(granted.Session); m.Pages != 20*64-6 || m.Bytes != m.Pages*pages.Size {
		t.Errorf("attached to %+v", m)
	}
	if got := src.reserve(4 << 20); got.Session != granted.Session {
		t.Error("the session changed its name")
	}
	src.refused(src.Control(), wire.Dissolve{}, wire.CodeForbidden)
	src.Close() // gone by right
	dst.read(dst.Urgent(), 0, 1, 1, all)
	dst.read(dst.Bulk(0), 0, 64, 0, none)
	dst.read(dst.Bulk(1), 64, 64, 0, func(i pages.Index) bool { return i >= 70 })
	for k := 2; k < 20; k++ {
		dst.read(dst.Bulk(k%2), pages.Index(64*k), 64, 0, all)
	}
	dst.read(dst.Bulk(0), 1<<63, 3, 0, none)
	dst.send(dst.Control(), wire.Free{{First: 0, Count: 128}, {First: 1200, Count: 1<<32 - 1}})
	soon(t, "freeing by the destination", func() bool { return s.Stats().Pages == 1200-128 })
	dst.read(dst.Urgent(), 1199, 2, 0, func(i pages.Index) bool { return i < 1200 })
	dst.send(dst.Control(), wire.Dissolve{})
	dst.answer(dst.Control(), wire.TypeDissolved)
	if st := s.Stats(); st.Reserved != 0 || blocks(t, dir) != 0 {
		t.Errorf("%d bytes reserved, %d taken", st.Reserved, blocks(t, dir))
	}
	dst.refused(dst.Control(), wire.Dissolve{}, wire.CodeGone)
	dst.refused(dst.Urgent(), wire.Read{{Index: 1}}, wire.CodeGone)
	dst.refused(dst.Control(), wire.Free{{First: 1, Count: 1}}, wire.CodeGone)
	dst.Close()
	for range 2 {
		if err := <-s.served; err != nil {
			t.Error(err)
		}
	}
}

func TestServerRefuses(t *testing.T) {
	c := config(shm(t))
	c.BudgetBytes = sessionFixed + extentCost
	s := serve(t.Context(), t, open(t, c))
	id := wire.NewMigrationID()
	const si, di = wire.SourceToIntermediary, wire.DestinationToIntermediary
	src := s.dial(source, si, id)
	src.refused(src.Control(), wire.Dissolve{}, wire.CodeUnknown)
	src.refused(src.Control(), wire.Free{{First: 1, Count: 1}}, wire.CodeUnknown)
	src.nacked(src.Bulk(0), wire.CodeUnknown, run(0, 3, 0)...)
	src.refused(src.Control(), &wire.Reserve{Reader: destination}, wire.CodeProtocol) // 0 bytes
	session := src.reserve(1 << 40).Session
	src.nacked(src.Bulk(1), wire.CodeProtocol, Page{Index: maxPages, Sealed: content(nil, 0, 0)})
	for k := range extentSlots / 64 {
		src.put(src.Bulk(0), wire.TypeAck, run(pages.Index(64*k), 64, 0)...)
	}
	src.nacked(src.Bulk(0), wire.CodeFull, run(5000, 2, 0)...)

	other := s.dial(stranger, si, id)
	other.refused(other.Control(), &wire.Reserve{Bytes: 1, Reader: destination}, wire.CodeForbidden)
	other.refused(other.Control(), &wire.Reserve{Bytes: 1, Reader: stranger}, wire.CodeForbidden)
	other.nacked(other.Bulk(0), wire.CodeUnknown, run(0, 3, 5)...)
	other = s.dial(stranger, si, wire.NewMigrationID())
	other.refused(other.Control(), &wire.Reserve{Bytes: 1, Reader: destination}, wire.CodeFull)

	for _, node := range []wire.Identity{stranger, source} {
		thief := s.dial(node, di, id)
		thief.refused(thief.Control(), &wire.Attach{Session: session}, wire.CodeForbidden)
		thief.refused(thief.Bulk(0), wire.Read{{Index: 1}}, wire.CodeUnknown)
		thief.refused(thief.Control(), wire.Dissolve{}, wire.CodeUnknown)
	}
	dst := s.dial(destination, di, id)
	dst.refused(dst.Control(), &wire.Attach{Session: wire.Session{1}}, wire.CodeUnknown)
	dst.attach(session)
	dst.read(dst.Urgent(), 0, 64, 0, all)
	lost := s.dial(destination, di, wire.NewMigrationID())
	lost.refused(lost.Control(), &wire.Attach{Session: session}, wire.CodeUnknown)
}

func TestServerCutsOffViolations(t *testing.T) {
	s := serve(t.Context(), t, open(t, config(shm(t))))
	src := s.dial(source, wire.SourceToIntermediary, wire.NewMigrationID())
	src.reserve(1 << 20)
	b := wire.NewBatch()
	b.AppendMissing(5, 0)
	if err := src.Bulk(0).SendBatch(b); err != nil {
		t.Fatal(err)
	}
	src.seq = 0 // it answers no frame
	e, err := wire.ParseError(src.answer(src.Control(), wire.TypeError).Body)
	if err != nil || e.Code != wire.CodeProtocol {
		t.Errorf("%v, error %v; want a protocol violation", e, err)
	}
	src.Close()
	wantError(t, <-s.served, wire.ErrProtocol)

	a, wrong := wiretest.Pair(t, wire.SourceToDestination, source, destination)
	var f wire.Frame
	go a.Control().Receive(&f)
	wantError(t, s.Serve(t.Context(), wrong), ErrInvalid)
}

// TestConnectionIsLost loses connections in the middle; the session stays, under its
// name, with all that was acknowledged.
func TestConnectionIsLost(t *testing.T) {
	dir := shm(t)
	p := open(t, config(dir))
	s := serve(t.Context(), t, p)
	id := wire.NewMigrationID()
	src := s.dial(source, wire.SourceToIntermediary, id)
	session := src.reserve(8 << 20).Session
	src.put(src.Bulk(0), wire.TypeAck, run(0, 64, 0)...)
	src.Close()
	<-s.served
	one := p.Stats().Sessions[0]
	if one.Owners != 0 || one.Expires.IsZero() {
		t.Errorf("no grace period runs: %+v", one)
	}
	src = s.dial(source, wire.SourceToIntermediary, id)
	if got := src.reserve(8 << 20).Session; got != session {
		t.Error("the session changed its name")
	}
	if one := p.Stats().Sessions[0]; one.Owners != 1 || !one.Expires.IsZero() {
		t.Errorf("the grace period goes on: %+v", one)
	}
	src.put(src.Bulk(1), wire.TypeAck, run(64, 64, 0)...)

	// The whole agent is lost.
	src.Close()
	<-s.served
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	s = serve(t.Context(), t, open(t, config(dir)))
	dst := s.dial(destination, wire.DestinationToIntermediary, id)
	if m := dst.attach(session); m.Pages != 128 {
		t.Errorf("%d pages after a restart, want 128", m.Pages)
	}
	dst.read(dst.Bulk(0), 0, 64, 0, all)
	dst.read(dst.Bulk(0), 64, 64, 0, all)
}

func TestAgentStops(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	p := open(t, config(shm(t)))
	s := serve(ctx, t, p)
	src := s.dial(source, wire.SourceToIntermediary, wire.NewMigrationID())
	src.reserve(1 << 20)
	src.put(src.Bulk(0), wire.TypeAck, run(0, 5, 0)...)
	reason := errors.New("upgrade")
	cancel(reason)
	src.seq = 0
	e, err := wire.ParseError(src.answer(src.Control(), wire.TypeError).Body)
	if err != nil || e.Code != wire.CodeStopping {
		t.Errorf("%v, error %v; want that it stops", e, err)
	}
	src.Close()
	wantError(t, <-s.served, reason)
	if st := p.Stats(); st.Pages != 5 || st.Sessions[0].Owners != 0 {
		t.Errorf("after stopping: %+v", st.Sessions[0])
	}
}

// TestUrgentPassesBulk fills the bulk lanes with answers that nobody takes: the urgent
// lane answers all the same.
func TestUrgentPassesBulk(t *testing.T) {
	s := serve(t.Context(), t, open(t, config(shm(t))))
	id := wire.NewMigrationID()
	src := s.dial(source, wire.SourceToIntermediary, id)
	session := src.reserve(1 << 20).Session
	src.put(src.Bulk(0), wire.TypeAck, run(0, 64, 0)...)
	dst := s.dial(destination, wire.DestinationToIntermediary, id)
	dst.attach(session)
	var m wire.Read
	for i := range pages.Index(64) {
		m = append(m, wire.PageRef{Index: i})
	}
	for range 200 { // some 50 MiB of answers a lane
		for i := range dst.Lanes() {
			dst.send(dst.Bulk(i), m)
		}
	}
	for i := range pages.Index(64) {
		dst.read(dst.Urgent(), i, 1, 0, all)
	}
}
