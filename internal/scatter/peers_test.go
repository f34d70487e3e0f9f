// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"context"
	"fmt"
	"sync"
	"time"

	"scattergather.io/scattergather/internal/wire"
)

// testbed is a certificate authority and the nodes that it trusts.
type testbed struct {
	t     tb
	ca    *wire.CA
	nodes map[wire.Identity]*wire.Credentials
}

// tb is what *testing.T and *rapid.T have in common.
type tb interface {
	Cleanup(func())
	Error(...any)
	Errorf(string, ...any)
	Fatal(...any)
	Fatalf(string, ...any)
	FailNow()
	Log(...any)
}

func newTestbed(t tb) *testbed {
	ca, err := wire.NewCA("test", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return &testbed{t, ca, map[wire.Identity]*wire.Credentials{}}
}

// with returns the testbed for another test, so that authority and certificates are
// made once for many.
func (b *testbed) with(t tb) *testbed { return &testbed{t, b.ca, b.nodes} }

func (b *testbed) options(node wire.Identity) wire.Options {
	c := b.nodes[node]
	if c == nil {
		var err error
		if c, err = b.ca.Issue(node, time.Hour); err != nil {
			b.t.Fatal(err)
		}
		b.nodes[node] = c
	}
	return wire.Options{Credentials: c.Static(), HandshakeTimeout: 5 * time.Second, IdleTimeout: 10 * time.Second}
}

// listen accepts connections for a node until the test ends.
func (b *testbed) listen(node wire.Identity, serve func(*wire.Conn)) string {
	ln, err := wire.Listen("127.0.0.1:0", b.options(node))
	if err != nil {
		b.t.Fatal(err)
	}
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	wg.Go(func() {
		for {
			c, err := ln.Accept(ctx)
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				stop := context.AfterFunc(ctx, func() { c.Close() })
				defer stop()
				serve(c)
			})
		}
	})
	b.t.Cleanup(func() { cancel(); ln.Close(); wg.Wait() })
	return ln.Addr().String()
}

// everyLane reads all lanes of a connection until it ends.
func everyLane(c *wire.Conn, handle func(*wire.Lane, *wire.Frame) error) error {
	lanes := []*wire.Lane{c.Control()}
	if c.Urgent() != nil {
		lanes = append(lanes, c.Urgent())
	}
	for i := range c.Lanes() {
		lanes = append(lanes, c.Bulk(i))
	}
	var wg sync.WaitGroup
	var once sync.Once
	var first error
	for _, l := range lanes {
		wg.Go(func() {
			var f wire.Frame
			for {
				err := l.Receive(&f)
				if err == nil {
					err = handle(l, &f)
				}
				if err != nil {
					once.Do(func() { first = err })
					c.Close()
					return
				}
			}
		})
	}
	wg.Wait()
	return first
}

// testLender is an intermediary that a test can starve, slow down and kill.
type testLender struct {
	node     wire.Identity
	addr     string
	capacity int // sealed pages; nothing is granted when 0, refusals beyond it
	grant    uint64
	delay    func() // before each acknowledgement

	mu        sync.Mutex
	conn      *wire.Conn
	held      map[wire.PageRef][]byte
	dissolved bool
	left      bool
	frames    int
	onFrame   func(n int, c *wire.Conn)
}

func (b *testbed) lender(node wire.Identity, capacity int) *testLender {
	l := &testLender{node: node, capacity: capacity, grant: uint64(capacity) * wire.MaxSealed, held: map[wire.PageRef][]byte{}}
	l.addr = b.listen(node, l.serve)
	return l
}

func (l *testLender) peer() Peer {
	return Peer{Name: string(l.node), Identity: l.node, Address: l.addr, Bytes: 1 << 40}
}

func (l *testLender) serve(c *wire.Conn) {
	l.mu.Lock()
	l.conn = c
	l.mu.Unlock()
	_ = everyLane(c, func(lane *wire.Lane, f *wire.Frame) error {
		switch f.Type {
		case wire.TypeReserve:
			if l.grant == 0 {
				return lane.Send(f.Seq, &wire.Error{Code: wire.CodeFull, Text: "no memory to lend"})
			}
			return lane.Send(f.Seq, &wire.Reserved{Session: wire.Session{byte(len(l.node))}, Bytes: l.grant})
		case wire.TypeDissolve:
			l.mu.Lock()
			l.dissolved = true
			clear(l.held)
			l.mu.Unlock()
			return lane.Send(f.Seq, wire.Dissolved{})
		case wire.TypePages:
			return l.store(c, lane, f)
		}
		return fmt.Errorf("lender got frame type %d", f.Type)
	})
	l.mu.Lock()
	l.left = true
	l.mu.Unlock()
}

func (l *testLender) store(c *wire.Conn, lane *wire.Lane, f *wire.Frame) error {
	p, err := f.Pages()
	if err != nil {
		return err
	}
	if l.delay != nil {
		l.delay()
	}
	l.mu.Lock()
	l.frames++
	n, hook := l.frames, l.onFrame
	full := len(l.held)+p.Len() > l.capacity
	if !full {
		err = p.Each(func(d wire.Desc, sealed []byte) error {
			l.held[wire.PageRef{Index: d.Index, Version: d.Version}] = append([]byte(nil), sealed...)
			return nil
		})
	}
	l.mu.Unlock()
	if hook != nil {
		hook(n, c)
	}
	switch {
	case err != nil:
		return err
	case full:
		return lane.Send(f.Seq, &wire.Nack{Code: wire.CodeFull})
	}
	return lane.Send(f.Seq, wire.Ack{})
}
