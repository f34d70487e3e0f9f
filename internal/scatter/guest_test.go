// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
)

// memory is what a test guest's RAM holds: for each page a generation, 0 for a page
// of zeros. It stands for the content, so that terabytes of it would fit.
type memory []uint32

// page writes the content of page i into p.
func (m memory) page(p []byte, i pages.Index) []byte { return content(p, i, m[i]) }

func content(p []byte, i pages.Index, gen uint32) []byte {
	clear(p)
	if gen == 0 {
		return p
	}
	for at := 0; at < len(p); at += 16 {
		binary.LittleEndian.PutUint64(p[at:], uint64(i)<<32|uint64(gen))
		binary.LittleEndian.PutUint64(p[at+8:], uint64(at)*0x9e3779b97f4a7c15)
	}
	return p
}

// testSource plays a source QEMU on one end of a unix socket.
type testSource struct {
	setup    qemu.Setup
	layout   *pages.Layout
	mem      memory
	rng      *rand.Rand
	postcopy bool // else pre-copy with a return path
	// dirty is called between the rounds of pre-copy, and at the switch; it changes
	// mem and returns the pages it changed.
	dirty func(round int) []pages.Index
	// unsent pages are never sent.
	unsent map[pages.Index]bool
	// rounds of pre-copy after which a source without post-copy stops.
	rounds int
	// cut breaks the stream: after that many records, when it is above 0.
	cut int
	// hold blocks after the package until it is closed.
	hold chan struct{}
	// ping42 puts QEMU 10.2's PING into the package.
	ping42 bool

	conn     net.Conn
	buf      []byte
	st       qemu.PageState
	switched chan struct{}
	records  int

	mu       sync.Mutex
	pongs    []uint32
	requests []qemu.RPMessage
	shut     chan uint32
}

var errCut = errors.New("the test source cut its stream")

// testBlocks are three blocks, one of them with host pages of 16 KiB, as many pages in
// all as asked for at least.
func testBlocks(n int) []pages.Block {
	main := max(n-20, 4)
	return []pages.Block{
		{Name: "pc.ram", Length: uint64(main) * pages.Size, PageSize: pages.Size},
		{Name: "pc.bios", Length: 4 * pages.Size, PageSize: pages.Size},
		{Name: "huge", Length: 16 * pages.Size, PageSize: 4 * pages.Size},
	}
}

func newTestSource(t tb, n int, seed uint64) *testSource {
	blocks := testBlocks(n)
	layout, err := pages.NewLayout(blocks)
	if err != nil {
		t.Fatal(err)
	}
	s := &testSource{
		layout: layout, mem: make(memory, layout.Pages()), rng: rand.New(rand.NewPCG(seed, 1)),
		postcopy: true, rounds: 2, switched: make(chan struct{}), shut: make(chan uint32, 1),
		dirty: func(int) []pages.Index { return nil },
	}
	config := binary.BigEndian.AppendUint32(nil, 0x5145564d)
	config = binary.BigEndian.AppendUint32(config, 3)
	config = append(config, 7, 0, 0, 0, 11)
	config = append(config, "pc-q35-10.0"...)
	s.setup = qemu.Setup{Config: config, RAM: qemu.RAMStart{Section: 2, Version: 4, Blocks: blocks}}
	for i := range s.mem {
		if s.rng.IntN(5) > 0 {
			s.mem[i] = 1 + s.rng.Uint32N(1000)
		}
	}
	return s
}

// connect returns an Acceptor that gives out the engine's end.
func (s *testSource) connect(t tb) net.Conn {
	dir, err := os.MkdirTemp("", "scatter")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if s.conn, err = net.Dial("unix", path); err != nil {
		t.Fatal(err)
	}
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// accept is an Acceptor that nobody connects to.
func (s *testSource) accept(ctx context.Context) (net.Conn, error) {
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

func (s *testSource) flush() error {
	_, err := s.conn.Write(s.buf)
	s.buf = s.buf[:0]
	return err
}

// run is the whole migration as QEMU does it. It returns nil when it ended with SHUT 0.
func (s *testSource) run() error {
	defer s.conn.Close()
	go s.readReturnPath() // ends with the connection
	if err := s.migrate(); err != nil {
		return err
	}
	status, ok := <-s.shut
	if !ok || status != 0 {
		return fmt.Errorf("shut %v, status %d", ok, status)
	}
	return nil
}

func (s *testSource) migrate() error {
	s.buf = qemu.AppendSetup(s.buf, &s.setup)
	s.buf = qemu.AppendCommand(s.buf, qemu.CommandOpenReturnPath, nil)
	s.buf = qemu.AppendPing(s.buf, 1)
	if s.postcopy {
		s.buf = qemu.AppendAdvise(s.buf, s.setup.RAM.PageSizes(), pages.Size)
	}
	s.buf = qemu.AppendRAMStart(s.buf, &s.setup, s.postcopy)
	sent := pages.NewBitmap(s.layout.Pages())
	if converged, err := s.precopy(sent); err != nil {
		return err
	} else if converged {
		return s.finishPrecopy()
	}
	// Dirty: what was never sent, and what was dirtied since.
	for _, i := range s.dirty(-1) {
		first, n := s.layout.Unit(i)
		sent.ClearRange(first, n)
	}
	if err := s.stop(sent); err != nil {
		return err
	}
	if s.hold != nil {
		<-s.hold
	}
	return s.postcopyPages(sent)
}

// precopy sends rounds of pages until the switch. It converges when nothing is left to
// send, or without post-copy after rounds.
func (s *testSource) precopy(sent *pages.Bitmap) (converged bool, err error) {
	todo := pages.NewBitmap(s.layout.Pages())
	todo.SetRange(0, s.layout.Pages())
	for round := 0; ; round++ {
		s.buf = qemu.AppendPartStart(s.buf, s.setup.RAM.Section)
		for i, ok := todo.NextSet(0); ok; i, ok = todo.NextSet(i + 1) {
			select {
			case <-s.switched:
				s.buf = qemu.AppendPartEnd(s.buf, s.setup.RAM.Section)
				return false, s.flush()
			default:
			}
			if s.unsent[i] {
				continue
			}
			todo.Clear(i)
			sent.Set(i)
			if err := s.send(i); err != nil {
				return false, err
			}
		}
		s.buf = qemu.AppendPartEnd(s.buf, s.setup.RAM.Section)
		if err := s.flush(); err != nil {
			return false, err
		}
		if !s.postcopy && round >= s.rounds {
			return true, nil
		}
		for _, i := range s.dirty(round) {
			if !s.unsent[i] {
				todo.Set(i)
				sent.Clear(i)
			}
		}
		if todo.Count() > uint64(len(s.unsent)) {
			continue
		}
		select {
		case <-s.switched:
			return false, nil
		case <-time.After(20 * time.Millisecond):
			return true, nil
		}
	}
}

// send appends one page and writes now and then.
func (s *testSource) send(i pages.Index) error {
	s.records++
	if s.cut > 0 && s.records > s.cut {
		return errors.Join(s.flush(), errCut)
	}
	block, offset := s.layout.Locate(i)
	name := s.layout.Blocks()[block].Name
	if s.mem[i] == 0 {
		s.buf = qemu.AppendZero(s.buf, &s.st, name, block, offset)
	} else {
		var p [pages.Size]byte
		s.buf = qemu.AppendPage(s.buf, &s.st, name, block, offset, s.mem.page(p[:], i))
	}
	if len(s.buf) > 32<<10 {
		return s.flush()
	}
	return nil
}

const testDeviceState = "the state of some devices"

// stop is the switch: discards, PING, package, PING.
func (s *testSource) stop(sent *pages.Bitmap) error {
	for b, block := range s.layout.Blocks() {
		var ranges []qemu.Range
		first, n := s.layout.Extent(b)
		for i := first; i < first+pages.Index(n); i++ {
			if !sent.Test(i) {
				_, offset := s.layout.Locate(i)
				ranges = append(ranges, qemu.Range{Start: offset, Length: pages.Size})
			}
		}
		s.buf = qemu.AppendDiscard(s.buf, block.Name, ranges)
	}
	s.buf = qemu.AppendPing(s.buf, 2)
	pkg := qemu.AppendCommand(nil, qemu.CommandPostcopyListen, nil)
	pkg = append(pkg, testDeviceState...)
	pkg = qemu.AppendPing(pkg, 3)
	if s.ping42 {
		pkg = qemu.AppendPing(pkg, 0x42)
	}
	pkg = qemu.AppendCommand(pkg, qemu.CommandPostcopyRun, nil)
	s.buf = qemu.AppendPackage(s.buf, pkg)
	s.buf = qemu.AppendPing(s.buf, 4)
	return s.flush()
}

// postcopyPages sends what is left once: what is asked for first, else upwards.
func (s *testSource) postcopyPages(sent *pages.Bitmap) error {
	s.buf = qemu.AppendPartStart(s.buf, s.setup.RAM.Section)
	for {
		i, ok := s.requested(sent)
		if !ok {
			if i, ok = sent.NextClear(0); !ok {
				break
			}
		}
		first, n := s.layout.Unit(i)
		for i := first; i < first+pages.Index(n); i++ {
			if sent.Test(i) {
				continue
			}
			sent.Set(i)
			if s.unsent[i] {
				continue
			}
			if err := s.send(i); err != nil {
				return err
			}
		}
	}
	s.buf = qemu.AppendPartEnd(s.buf, s.setup.RAM.Section)
	s.buf = qemu.AppendRAMEnd(s.buf, s.setup.RAM.Section)
	s.buf = qemu.AppendEOF(s.buf)
	return s.flush()
}

func (s *testSource) requested(sent *pages.Bitmap) (pages.Index, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.requests {
		for at := r.Start; at < r.Start+r.Length; at += pages.Size {
			if i, err := s.layout.Index(r.Block, at); err == nil && !sent.Test(i) {
				return i, true
			}
		}
	}
	return 0, false
}

// finishPrecopy is an ending in pre-copy: END, device state, EOF, description.
func (s *testSource) finishPrecopy() error {
	s.buf = qemu.AppendRAMEnd(s.buf, s.setup.RAM.Section)
	s.buf = append(s.buf, 4) // a FULL section
	s.buf = append(s.buf, testDeviceState...)
	s.buf = qemu.AppendEOF(s.buf)
	s.buf = append(s.buf, 6)
	description := `{"devices":[]}`
	s.buf = binary.BigEndian.AppendUint32(s.buf, uint32(len(description)))
	s.buf = append(s.buf, description...)
	return s.flush()
}

func (s *testSource) readReturnPath() {
	d := qemu.NewRPDecoder(s.conn, s.layout.Blocks())
	defer close(s.shut)
	for {
		var m qemu.RPMessage
		if err := d.Next(&m); err != nil {
			if !errors.Is(err, io.EOF) {
				s.conn.Close()
			}
			return
		}
		s.mu.Lock()
		switch m.Type {
		case qemu.RPPong:
			s.pongs = append(s.pongs, m.Value)
		case qemu.RPReqPages, qemu.RPReqPagesID:
			s.requests = append(s.requests, m)
		case qemu.RPShut:
			s.shut <- m.Value
		}
		s.mu.Unlock()
	}
}

func (s *testSource) ponged(v uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Contains(s.pongs, v)
}
