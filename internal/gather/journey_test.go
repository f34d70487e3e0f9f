// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/pool"
	"scattergather.io/scattergather/internal/qemu"
	"scattergather.io/scattergather/internal/qemu/qemutest"
	"scattergather.io/scattergather/internal/scatter"
	"scattergather.io/scattergather/internal/wire"
	"scattergather.io/scattergather/internal/wire/wiretest"
)

// liveSource plays a source QEMU: pages in pre-copy until it is told to switch, some of
// them dirtied, then discards, the device state, and the rest in post-copy with what is
// asked for in front.
type liveSource struct {
	t      *testing.T
	conn   net.Conn
	layout *pages.Layout
	src    *qemutest.Source
	rng    *rand.Rand
	gen    []pages.Version // of the content; 0 is a page of zeros
	never  map[pages.Index]bool

	switchNow chan struct{}
	shut      chan uint32
	mu        sync.Mutex
	asked     []pages.Index
}

func newLiveSource(t *testing.T, conn net.Conn, l *pages.Layout) *liveSource {
	s := &liveSource{
		t: t, conn: conn, layout: l, src: qemutest.NewSource(qemutest.NewSetup(true, l.Blocks()...)),
		rng: rand.New(rand.NewPCG(9, 9)), gen: make([]pages.Version, l.Pages()), never: map[pages.Index]bool{},
		switchNow: make(chan struct{}), shut: make(chan uint32, 1),
	}
	for i := range s.gen {
		s.gen[i] = pages.Version(s.rng.IntN(4))
	}
	return s
}

func (s *liveSource) content(i pages.Index) []byte {
	if s.gen[i] == 0 {
		return nil
	}
	return content(i, s.gen[i])
}

// listen reads the return path.
func (s *liveSource) listen() {
	d := qemu.NewRPDecoder(s.conn, s.layout.Blocks())
	var m qemu.RPMessage
	for d.Next(&m) == nil {
		switch m.Type {
		case qemu.RPReqPages, qemu.RPReqPagesID:
			i, err := s.layout.Index(m.Block, m.Start)
			if err != nil {
				s.t.Error(err)
			}
			s.mu.Lock()
			s.asked = append(s.asked, i)
			s.mu.Unlock()
		case qemu.RPShut:
			s.shut <- m.Value
			return
		}
	}
	close(s.shut)
}

// part sends host pages as one section.
func (s *liveSource) part(list ...pages.Index) error {
	var out []qemutest.Page
	for _, i := range list {
		first, n := s.layout.Unit(i)
		for k := range n {
			block, offset := s.layout.Locate(first + pages.Index(k))
			out = append(out, qemutest.Page{Block: block, Offset: offset, Data: s.content(first + pages.Index(k))})
		}
	}
	s.src.Part(out...)
	_, err := s.conn.Write(s.src.Take())
	return err
}

// units returns the first pages of all host pages in order.
func (s *liveSource) units() (list []pages.Index) {
	for i := pages.Index(0); uint64(i) < s.layout.Pages(); {
		list = append(list, i)
		_, n := s.layout.Unit(i)
		i += pages.Index(n)
	}
	return list
}

func (s *liveSource) run() error {
	owed := map[pages.Index]bool{} // host pages to send in post-copy
	all := s.units()
	for _, i := range all {
		owed[i] = true
		if s.rng.IntN(50) == 0 && i > 0 {
			s.never[i] = true
		}
	}
	if _, err := s.conn.Write(s.src.Take()); err != nil {
		return err
	}
	for round, at := 0, 0; ; at++ {
		select {
		case <-s.switchNow:
			return s.postcopy(owed)
		default:
		}
		if at == len(all) {
			round, at = round+1, 0
		}
		if i := all[at]; !s.never[i] && (round == 0 || s.rng.IntN(4) == 0) {
			if err := s.part(i); err != nil {
				return err
			}
			delete(owed, i)
			s.dirty(i, owed)
		}
	}
}

// dirty writes to some page that was sent before, as a guest does.
func (s *liveSource) dirty(upTo pages.Index, owed map[pages.Index]bool) {
	if s.rng.IntN(5) > 0 {
		return
	}
	i, n := s.layout.Unit(pages.Index(s.rng.Uint64N(uint64(upTo) + 1)))
	if s.never[i] {
		return
	}
	s.gen[i+pages.Index(s.rng.Uint64N(n))] = pages.Version(10 + s.rng.IntN(1000))
	owed[i] = true
}

func (s *liveSource) postcopy(owed map[pages.Index]bool) error {
	for i := range owed {
		block, offset := s.layout.Locate(i)
		s.src.Discard(block, qemu.Range{Start: offset, Length: s.layout.Blocks()[block].PageSize})
	}
	s.src.Switch(fakeDevices, 3)
	if _, err := s.conn.Write(s.src.Take()); err != nil {
		return err
	}
	for _, next := range s.units() {
		s.mu.Lock()
		asked := s.asked
		s.asked = nil
		s.mu.Unlock()
		for _, i := range append(asked, next) {
			i, _ = s.layout.Unit(i)
			if !owed[i] || s.never[i] {
				continue
			}
			delete(owed, i)
			if err := s.part(i); err != nil {
				return err
			}
		}
	}
	s.src.EndPostcopy()
	if _, err := s.conn.Write(s.src.Take()); err != nil {
		return err
	}
	if v, ok := <-s.shut; !ok || v != 0 {
		return fmt.Errorf("the source was ended with %d, %v", v, ok)
	}
	return nil
}

// startPools runs real intermediaries.
func startPools(t *testing.T, n int) (peers []scatter.Peer) {
	for k := range n {
		node := wire.Identity(fmt.Sprintf("pool%d", k))
		dir, err := os.MkdirTemp("/dev/shm", "journey") //nolint:usetesting // a pool insists on tmpfs
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		p, err := pool.Open(pool.Config{Dir: filepath.Join(dir, "pool"), BudgetBytes: 256 << 20, Headroom: func() uint64 { return 1 << 30 }, Log: logr.Discard()})
		if err != nil {
			t.Fatal(err)
		}
		ln := wiretest.Listen(t, wiretest.Node(t, node))
		peers = append(peers, scatter.Peer{Name: string(node), Identity: node, Address: ln.Addr().String(), Bytes: 64 << 20})
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				c, err := ln.Accept(ctx)
				if err != nil {
					return
				}
				wg.Go(func() { _ = p.Serve(ctx, c) })
			}
		})
		t.Cleanup(func() {
			cancel()
			ln.Close()
			wg.Wait()
			if s := p.Stats(); len(s.Sessions) != 0 {
				t.Errorf("%s still has %d sessions", node, len(s.Sessions))
			}
			if err := p.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	return peers
}

// TestJourney moves a VM from a source QEMU through the source engine, real
// intermediaries and this engine into a destination QEMU.
func TestJourney(t *testing.T) {
	for name, c := range map[string]struct {
		strategy scatter.Strategy
		holders  int
		kill     bool
		store    uint64
	}{
		"immediate":                 {scatter.Immediate, 2, false, 0},
		"hybrid":                    {scatter.Hybrid, 3, false, 0},
		"no intermediary":           {scatter.Immediate, 0, false, 0},
		"small store":               {scatter.Hybrid, 2, false, 512 << 10},
		"interrupted in the middle": {scatter.Immediate, 2, true, 0},
	} {
		t.Run(name, func(t *testing.T) {
			j := &journey{t: t}
			j.prepare(c.strategy, startPools(t, c.holders), c.store)
			j.run(c.kill)
			j.check()
		})
	}
}

type journey struct {
	t       *testing.T
	bed     *bed
	src     *liveSource
	scatter *scatter.Engine
	mu      sync.Mutex
}

func (j *journey) prepare(strategy scatter.Strategy, peers []scatter.Peer, store uint64) {
	j.bed = newBed(j.t, 0,
		pages.Block{Name: "pc.ram", Length: 6 * mib, PageSize: pages.Size},
		pages.Block{Name: "large", Length: 4 * mib, PageSize: 2 * mib},
		pages.Block{Name: "pc.bios", Length: 256 << 10, PageSize: pages.Size})
	j.bed.cfg.StoreBytes = store
	path := filepath.Join(j.t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		j.t.Fatal(err)
	}
	defer ln.Close()
	ours, err := net.Dial("unix", path)
	if err != nil {
		j.t.Fatal(err)
	}
	theirs, err := ln.Accept()
	if err != nil {
		j.t.Fatal(err)
	}
	j.src = newLiveSource(j.t, ours, j.bed.layout)
	j.scatter, err = scatter.New(scatter.Config{
		Migration: j.bed.id, Strategy: strategy, Intermediaries: peers, Wire: j.bed.source, Log: j.bed.cfg.Log,
		Destination: scatter.Peer{Name: "destination", Identity: "destination", Address: j.bed.ln.Addr().String()},
		Accept:      acceptOnce(theirs),
		Switch: func(context.Context) error {
			close(j.src.switchNow)
			return nil
		},
	})
	if err != nil {
		j.t.Fatal(err)
	}
}

func (j *journey) run(kill bool) {
	t, b := j.t, j.bed
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	b.start()
	var wg sync.WaitGroup
	accepting, stop := context.WithCancel(ctx)
	wg.Go(func() { j.attach(accepting) })
	wg.Go(j.src.listen)
	wg.Go(func() {
		if err := j.src.run(); err != nil {
			t.Error("source QEMU:", err)
		}
		j.src.conn.Close()
	})
	wg.Go(func() {
		if res, err := j.scatter.Run(ctx); err != nil {
			t.Error("scatter:", err)
		} else if res.Pages.Safe != res.Pages.Total {
			t.Errorf("scattered %+v", res.Pages)
		}
	})
	b.q.awaitLoaded()
	guest := b.guest(3, 60, 8)
	if kill {
		j.interrupt()
	}
	select {
	case <-b.done:
	case <-ctx.Done():
		t.Errorf("not finished: %+v", b.engine.Progress())
		b.cancel()
	}
	stop()
	wg.Wait()
	guest.Wait()
}

// attach hands connections to whatever engine there is.
func (j *journey) attach(ctx context.Context) {
	for {
		c, err := j.bed.ln.Accept(ctx)
		if err != nil {
			return
		}
		j.mu.Lock()
		err = j.bed.engine.Attach(c)
		j.mu.Unlock()
		if err != nil {
			c.Close()
		}
	}
}

// interrupt ends the engine in the middle and goes on with another.
func (j *journey) interrupt() {
	b := j.bed
	b.q.awaitPlaced(500)
	b.cancel()
	<-b.done
	if b.err == nil {
		j.t.Fatal("the engine finished before it was interrupted")
	}
	for broken := false; !broken; time.Sleep(time.Millisecond) {
		b.q.mu.Lock()
		broken = b.q.broken
		b.q.mu.Unlock()
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	b.reopen()
}

func (j *journey) check() {
	b := j.bed
	if b.err != nil {
		j.t.Fatal(b.err)
	}
	if b.q.err != nil {
		j.t.Fatal("destination QEMU:", b.q.err)
	}
	for i := pages.Index(0); uint64(i) < b.layout.Pages(); i++ {
		first, _ := b.layout.Unit(i)
		want := make([]byte, pages.Size)
		if !j.src.never[first] && j.src.gen[i] != 0 {
			want = content(i, j.src.gen[i])
		}
		if !bytes.Equal(b.q.mem[i*pages.Size:(i+1)*pages.Size], want) {
			j.t.Fatalf("page %d is wrong: %x..., want %x...", i, b.q.mem[i*pages.Size:][:24], want[:24])
		}
	}
}

// acceptOnce gives out one connection of the source QEMU; another one never comes.
func acceptOnce(c net.Conn) scatter.Acceptor {
	conns := make(chan net.Conn, 1)
	conns <- c
	return func(ctx context.Context) (net.Conn, error) {
		select {
		case c := <-conns:
			return c, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
