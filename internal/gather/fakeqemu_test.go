// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"bufio"
	"context"
	"errors"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
)

// fakeQEMU is a destination QEMU for tests. It parses the stream by its own small
// parser and is as strict as the real one is known to be: what would pause or kill that
// one is an error here.
type fakeQEMU struct {
	t      testing.TB
	path   string
	ln     *net.UnixListener
	config []byte
	blocks []pages.Block
	layout *pages.Layout

	// Faults to inject, set before use.
	refuseSetup   bool
	refusePackage bool
	breakAfter    int // pages, once; the connection breaks within the record after them
	slow          time.Duration

	mu       sync.Mutex
	changed  *sync.Cond
	conn     net.Conn // for the return path
	rpBlock  string
	loaded   bool // LISTEN was seen
	placed   *pages.Bitmap
	mem      []byte
	waiting  map[pages.Index]bool // faults, by first page of the host page
	order    []pages.Index        // as placed
	requests int
	err      error
	complete bool
	broken   bool
	accepted int
	wg       sync.WaitGroup
}

func newFakeQEMU(t testing.TB, config []byte, blocks []pages.Block) *fakeQEMU {
	t.Helper()
	l, err := pages.NewLayout(blocks)
	if err != nil {
		t.Fatal(err)
	}
	q := &fakeQEMU{
		t: t, config: config, blocks: blocks, layout: l, path: filepath.Join(t.TempDir(), "qemu"),
		placed: pages.NewBitmap(l.Pages()), mem: make([]byte, l.Bytes()), waiting: map[pages.Index]bool{},
	}
	q.changed = sync.NewCond(&q.mu)
	q.ln, err = net.ListenUnix("unix", &net.UnixAddr{Name: q.path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		q.ln.Close()
		q.mu.Lock()
		if q.conn != nil {
			q.conn.Close()
		}
		q.mu.Unlock()
		q.wg.Wait()
	})
	return q
}

// connect is a Stream: the first connection of the migration.
func (q *fakeQEMU) connect(ctx context.Context) (net.Conn, error) { return q.dial(ctx, false) }

// recover is a Recover.
func (q *fakeQEMU) recover(ctx context.Context) (net.Conn, error) {
	q.mu.Lock()
	complete, err := q.complete, q.err
	q.mu.Unlock()
	if complete {
		return nil, ErrCompleted
	}
	if err != nil {
		return nil, err
	}
	return q.dial(ctx, true)
}

func (q *fakeQEMU) dial(ctx context.Context, again bool) (net.Conn, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", q.path)
	if err != nil {
		return nil, err
	}
	s, err := q.ln.AcceptUnix()
	if err != nil {
		c.Close()
		return nil, err
	}
	q.mu.Lock()
	q.conn, q.rpBlock, q.broken = s, "", false
	q.accepted++
	q.mu.Unlock()
	q.wg.Go(func() {
		defer s.Close()
		p := &parser{q: q, r: bufio.NewReaderSize(s, 32<<10), last: -1}
		err := p.run(again)
		q.mu.Lock()
		defer q.mu.Unlock()
		q.broken = !q.complete
		if err != nil && !errors.Is(err, errCut) {
			q.err = err
		}
		q.changed.Broadcast()
	})
	return c, nil
}

var errCut = errors.New("connection cut")

// fault makes the guest wait for the host page of page i. It returns false if it has it.
func (q *fakeQEMU) fault(i pages.Index) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	first, _ := q.layout.Unit(i)
	if q.placed.Test(first) {
		return false
	}
	if !q.waiting[first] {
		q.waiting[first] = true
		q.request(first)
	}
	return true
}

// request sends REQ_PAGES; the caller holds q.mu.
func (q *fakeQEMU) request(first pages.Index) {
	q.requests++
	if q.conn == nil || q.broken || !q.loaded {
		return
	}
	block, offset := q.layout.Locate(first)
	b := q.blocks[block]
	if q.rpBlock == b.Name {
		q.say(qemu.AppendReqPages(nil, offset, uint32(b.PageSize)))
	} else {
		q.say(qemu.AppendReqPagesID(nil, b.Name, offset, uint32(b.PageSize)))
	}
	q.rpBlock = b.Name
}

// say writes to the return path; the caller holds q.mu.
func (q *fakeQEMU) say(msg []byte) {
	// The peer may have gone, which the parser notices.
	_, _ = q.conn.Write(msg)
}

// await waits until page i is placed.
func (q *fakeQEMU) await(i pages.Index) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for !q.placed.Test(i) && q.err == nil && !q.complete {
		q.changed.Wait()
	}
}

// awaitPlaced waits until n pages are placed.
func (q *fakeQEMU) awaitPlaced(n uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.placed.Count() < n && q.err == nil && !q.complete {
		q.changed.Wait()
	}
}

// awaitLoaded waits until the device state is loaded.
func (q *fakeQEMU) awaitLoaded() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for !q.loaded && q.err == nil {
		q.changed.Wait()
	}
}
