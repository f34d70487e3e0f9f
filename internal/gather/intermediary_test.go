// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"bytes"
	"context"
	"sync"
	"testing"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
	"scattergather.io/scattergather/internal/wire/wiretest"
)

// intermediary is a scripted pool of one migration.
type intermediary struct {
	t       testing.TB
	node    wire.Identity
	ln      *wire.Listener
	session wire.Session
	wg      sync.WaitGroup

	mu        sync.Mutex
	changed   *sync.Cond
	pages     map[wire.PageRef][]byte
	away      bool // refuses connections
	holdBulk  bool // answers no bulk Read
	conns     map[*wire.Conn]bool
	attached  int
	freed     map[pages.Index]bool
	reads     map[wire.PageRef]int
	urgent    []pages.Index
	missing   int // answers that lie about the first page
	corrupt   int // answers whose first page is broken
	dissolved bool
	// same seals page for every Read instead; for benchmarks.
	same *wire.Sealer
	page [pages.Size]byte
}

func newIntermediary(t testing.TB, node wire.Identity) *intermediary {
	t.Helper()
	h := &intermediary{
		t: t, node: node, ln: wiretest.Listen(t, wiretest.Node(t, node)),
		pages: map[wire.PageRef][]byte{}, conns: map[*wire.Conn]bool{}, freed: map[pages.Index]bool{}, reads: map[wire.PageRef]int{},
	}
	h.changed = sync.NewCond(&h.mu)
	copy(h.session[:], node)
	ctx, cancel := context.WithCancel(context.Background())
	h.wg.Go(func() {
		for {
			c, err := h.ln.Accept(ctx)
			if err != nil {
				return
			}
			h.wg.Go(func() { h.serve(c) })
		}
	})
	t.Cleanup(func() {
		cancel()
		h.ln.Close()
		h.drop()
		h.wg.Wait()
	})
	return h
}

func (h *intermediary) put(s *wire.Sealer, i pages.Index, v pages.Version) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.pages[wire.PageRef{Index: i, Version: v}] = s.Seal(nil, content(i, v), i, v, wire.EncodingRaw)
}

// drop closes all connections.
func (h *intermediary) drop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for c := range h.conns {
		c.Close()
	}
	h.changed.Broadcast()
}

func (h *intermediary) set(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
	h.changed.Broadcast()
}

func (h *intermediary) isDissolved() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.dissolved
}

func (h *intermediary) serve(c *wire.Conn) {
	defer c.Close()
	h.mu.Lock()
	if h.away {
		h.mu.Unlock()
		return
	}
	h.conns[c] = true
	h.mu.Unlock()
	var f wire.Frame
	if c.Control().Receive(&f) != nil {
		return
	}
	a, err := wire.ParseAttach(f.Body)
	if f.Type != wire.TypeAttach || err != nil || a.Session != h.session {
		c.Fail(&wire.Error{Code: wire.CodeUnknown, Text: "no such session"})
		return
	}
	h.set(func() { h.attached++ })
	if c.Control().Send(f.Seq, &wire.Attached{}) != nil {
		return
	}
	h.wg.Go(func() { h.lane(c, c.Urgent()) })
	for k := range c.Lanes() {
		h.wg.Go(func() { h.lane(c, c.Bulk(k)) })
	}
	for c.Control().Receive(&f) == nil {
		switch f.Type {
		case wire.TypeFree:
			runs, err := wire.ParseFree(nil, f.Body)
			if err != nil {
				h.t.Error(err)
			}
			h.set(func() {
				for _, r := range runs {
					for i := r.First; i < r.First+pages.Index(r.Count); i++ {
						h.freed[i] = true
					}
				}
			})
		case wire.TypeDissolve:
			h.set(func() { h.dissolved = true })
			if c.Control().Send(f.Seq, wire.Dissolved{}) != nil {
				return
			}
		default:
			h.t.Errorf("the engine sent %v to an intermediary", f.Type)
		}
	}
}

func (h *intermediary) lane(c *wire.Conn, l *wire.Lane) {
	defer c.Close()
	var f wire.Frame
	batch := wire.NewBatch()
	for l.Receive(&f) == nil {
		refs, err := wire.ParseRead(nil, f.Body)
		if err != nil {
			h.t.Error(err)
			return
		}
		batch.Reset(f.Seq)
		h.mu.Lock()
		for h.holdBulk && l.Kind() == wire.LaneBulk && c.Err() == nil {
			h.changed.Wait()
		}
		for k, r := range refs {
			sealed, ok := h.pages[r]
			if h.same != nil {
				batch.Append(h.same, r.Index, r.Version, wire.EncodingRaw, h.page[:])
				continue
			}
			switch {
			case !ok:
				h.t.Errorf("intermediary %s was asked for page %d version %d, which it never had", h.node, r.Index, r.Version)
				batch.AppendMissing(r.Index, r.Version)
			case k == 0 && h.missing > 0:
				h.missing--
				batch.AppendMissing(r.Index, r.Version)
			case k == 0 && h.corrupt > 0:
				h.corrupt--
				bad := bytes.Clone(sealed)
				bad[100] ^= 1
				batch.AppendSealed(wire.Desc{Index: r.Index, Version: r.Version}, bad)
			default:
				batch.AppendSealed(wire.Desc{Index: r.Index, Version: r.Version}, sealed)
			}
			h.reads[r]++
			if l.Kind() == wire.LaneUrgent {
				h.urgent = append(h.urgent, r.Index)
			}
		}
		h.mu.Unlock()
		if l.SendBatch(batch) != nil {
			return
		}
	}
}
