// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/go-logr/logr/testr"
	"go.uber.org/goleak"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
	"scattergather.io/scattergather/internal/qemu/qemutest"
	"scattergather.io/scattergather/internal/wire"
	"scattergather.io/scattergather/internal/wire/wiretest"
)

func TestMain(m *testing.M) {
	// Rapid's default of 30 is too few for the book. The command line may say otherwise.
	if err := flag.Set("rapid.steps", "150"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// fakePackage is a device state as QEMU's decoder takes it: LISTEN, something, PING 3,
// RUN.
var fakePackage = qemu.WrapTail(fakeDevices, 3)

var fakeDevices = []byte("\x04device state")

var fakeConfig = qemutest.NewSetup(true).Config

// content is version v of page i; a page that is zero by the test's plan never asks.
func content(i pages.Index, v pages.Version) []byte {
	data := make([]byte, pages.Size)
	for k := 0; k < len(data); k += 16 {
		binary.LittleEndian.PutUint64(data[k:], uint64(i)*0x9e3779b97f4a7c15+uint64(k))
		binary.LittleEndian.PutUint64(data[k+8:], uint64(v)+1)
	}
	return data
}

// bed is one migration: an engine, the QEMU it feeds, a scripted source and scripted
// intermediaries.
type bed struct {
	t      testing.TB
	id     wire.MigrationID
	key    wire.Key
	sealer *wire.Sealer
	blocks []pages.Block
	layout *pages.Layout
	q      *fakeQEMU
	dir    string
	cfg    Config

	holders []*intermediary
	source  wire.Options
	ln      *wire.Listener

	engine *Engine
	cancel context.CancelFunc
	done   chan struct{}
	res    Result
	err    error

	journal *wire.Journal
	conn    *wire.Conn
	events  chan wire.Frame // of the control lane, but Applied and Credit
	wants   chan pages.Index
	acks    chan uint64
	wg      sync.WaitGroup

	mu     sync.Mutex
	credit uint64
	seq    uint64
	// want is what each page has to hold at the end; nil for zeros.
	want map[pages.Index][]byte
}

func newBed(t testing.TB, holders int, blocks ...pages.Block) *bed {
	t.Helper()
	l, err := pages.NewLayout(blocks)
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{
		t: t, id: wire.NewMigrationID(), key: wire.NewKey(), blocks: blocks, layout: l,
		q: newFakeQEMU(t, fakeConfig, blocks), dir: filepath.Join(t.TempDir(), "state"),
		source: wiretest.Node(t, "source"), journal: wire.NewJournal(),
		events: make(chan wire.Frame, 64), wants: make(chan pages.Index, 1024), acks: make(chan uint64, 1024),
		want: map[pages.Index][]byte{},
	}
	b.sealer = wire.NewSealer(b.key)
	b.cfg = Config{
		Migration: b.id, StateDir: b.dir, Wire: wiretest.Node(t, "destination"),
		Connect: b.q.connect, Recover: b.q.recover, Log: logr.Discard(),
		OpenTimeout: 5 * time.Second, SourceGrace: 5 * time.Second, DissolveTimeout: 2 * time.Second,
	}
	if testing.Verbose() {
		b.cfg.Log = testr.NewWithInterface(t, testr.Options{})
	}
	for k := range holders {
		b.holders = append(b.holders, newIntermediary(t, wire.Identity(fmt.Sprintf("i%d", k))))
	}
	b.ln = wiretest.Listen(t, b.cfg.Wire)
	t.Cleanup(b.close)
	return b
}

func (b *bed) close() {
	if b.conn != nil {
		b.conn.Close()
	}
	b.wg.Wait()
	if b.cancel != nil {
		b.cancel()
		<-b.done
	}
}

// start makes and runs the engine.
func (b *bed) start() {
	b.t.Helper()
	e, err := New(b.cfg)
	if err != nil {
		b.t.Fatal(err)
	}
	b.run(e)
}

func (b *bed) run(e *Engine) {
	ctx, cancel := context.WithCancel(context.Background())
	b.engine, b.cancel, b.done = e, cancel, make(chan struct{})
	done := b.done
	go func() {
		defer close(done)
		b.res, b.err = e.Run(ctx)
	}()
}

// dial connects the source and gives the connection to the engine.
func (b *bed) dial() {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := wire.Dial(ctx, b.source, b.ln.Addr().String(), "destination", wire.SourceToDestination, b.id)
	if err != nil {
		b.t.Fatal(err)
	}
	accepted, err := b.ln.Accept(ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	if err := b.engine.Attach(accepted); err != nil {
		b.t.Fatal(err)
	}
	var f wire.Frame
	if err := conn.Control().Receive(&f); err != nil || f.Type != wire.TypeResume {
		b.t.Fatalf("the engine began with %v, %v", f.Type, err)
	}
	r, err := wire.ParseResume(f.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	b.conn = conn
	b.mu.Lock()
	b.credit = 0
	b.mu.Unlock()
	b.wg.Go(func() { b.control(conn) })
	b.wg.Go(func() { b.pagesLane(conn.Urgent()) })
	for k := range conn.Lanes() {
		b.wg.Go(func() { b.pagesLane(conn.Bulk(k)) })
	}
	if err := b.journal.Attach(conn.Control(), r.Applied); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bed) control(conn *wire.Conn) {
	for {
		var f wire.Frame
		if conn.Control().Receive(&f) != nil {
			b.journal.Detach()
			return
		}
		switch f.Type {
		case wire.TypeApplied:
			if err := b.journal.Applied(f.Seq); err != nil {
				b.t.Error(err)
			}
		case wire.TypeCredit:
			c, err := wire.ParseCredit(f.Body)
			if err != nil {
				b.t.Error(err)
			}
			b.mu.Lock()
			b.credit = max(b.credit, c.Bytes)
			b.mu.Unlock()
		default:
			b.events <- f
		}
	}
}

func (b *bed) pagesLane(l *wire.Lane) {
	var f wire.Frame
	for l.Receive(&f) == nil {
		switch f.Type {
		case wire.TypeAck:
			b.acks <- f.Seq
		case wire.TypeWant:
			list, err := wire.ParseWant(nil, f.Body)
			if err != nil {
				b.t.Error(err)
			}
			for _, i := range list {
				b.wants <- i
			}
		default:
			b.t.Errorf("the engine sent %v on a pages lane", f.Type)
		}
	}
}
