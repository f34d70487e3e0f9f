// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/go-logr/logr"
)

const (
	// maxOpeningConns bounds the TCP connections that have not yet proved who they
	// are, and maxOpeningPerAddress those of them from one address, so that one
	// address cannot keep others out. They are generous: a node
	// that evicts many VMs opens many lanes at once.
	maxOpeningConns      = 1024
	maxOpeningPerAddress = 256
)

// Listener accepts connections of other agents.
type Listener struct {
	o     Options
	ln    net.Listener
	ready chan *Conn // complete, to be accepted
	done  chan struct{}
	wg    sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	opening map[net.Conn]netip.Addr // TCP connections before they belong to a Conn
	from    map[netip.Addr]int      // how many of them come from one address
	groups  map[[16]byte]*group     // connections that wait for lanes
	conns   map[*Conn]struct{}      // all of this listener
}

// Listen listens on addr ("host:port", TCP). Close must be called.
func Listen(addr string, o Options) (*Listener, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	if _, err = o.Credentials(); err != nil {
		return nil, fmt.Errorf("our credentials: %w", err)
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listening for agents: %w", err)
	}
	l := &Listener{
		o: o, ln: ln, ready: make(chan *Conn, o.MaxConns), done: make(chan struct{}),
		opening: make(map[net.Conn]netip.Addr), from: make(map[netip.Addr]int),
		groups: make(map[[16]byte]*group), conns: make(map[*Conn]struct{}),
	}
	l.wg.Go(l.run)
	return l, nil
}

// Accept returns the next connection whose lanes are all open. It returns ErrClosed
// after Close. A peer that lost its connection dials again before this side may have
// noticed the loss: a new connection for the same conversation replaces the old one.
func (l *Listener) Accept(ctx context.Context) (*Conn, error) {
	select {
	case <-l.done:
		return nil, ErrClosed
	default:
	}
	select {
	case c := <-l.ready:
		return c, nil
	case <-l.done:
		return nil, ErrClosed
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Addr returns the address that the listener is bound to.
func (l *Listener) Addr() net.Addr { return l.ln.Addr() }

// Close stops listening and closes the connections that were not accepted yet.
func (l *Listener) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	close(l.done)
	for raw := range l.opening {
		raw.Close()
	}
	waiting := make([]*group, 0, len(l.groups))
	for _, g := range l.groups {
		waiting = append(waiting, g)
	}
	l.mu.Unlock()
	err := l.ln.Close()
	for _, g := range waiting {
		g.conn.Close()
	}
	l.wg.Wait()
	for {
		select {
		case c := <-l.ready:
			c.Close()
		default:
			return err
		}
	}
}

// run accepts TCP connections.
func (l *Listener) run() {
	const shortest, longest = 5 * time.Millisecond, time.Second
	pause := shortest
	for {
		raw, err := l.ln.Accept()
		switch {
		case err == nil:
			pause = shortest
			l.admit(raw)
			continue
		case errors.Is(err, net.ErrClosed):
			return
		}
		// Such as out of file descriptors: it passes, or the agent is restarted.
		l.o.Log.Error(err, "accepting a connection failed", "retryAfter", pause.String())
		select {
		case <-l.done:
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, longest)
	}
}

// admit starts to serve a TCP connection unless there are too many.
func (l *Listener) admit(raw net.Conn) {
	from := addressOf(raw)
	l.mu.Lock()
	reason := ""
	switch {
	case l.closed:
		reason = "closing"
	case len(l.opening) >= maxOpeningConns:
		reason = "too many connections are being opened"
	case l.from[from] >= maxOpeningPerAddress:
		reason = "too many connections are being opened from this address"
	default:
		l.opening[raw] = from
		l.from[from]++
	}
	l.mu.Unlock()
	log := l.o.Log.WithValues("remote", raw.RemoteAddr().String())
	if reason != "" {
		raw.Close()
		log.Info("refused a connection", "reason", reason)
		return
	}
	l.wg.Go(func() {
		defer l.forget(raw)
		if err := l.open(raw, log); err != nil {
			raw.Close()
			log.Info("refused a connection", "reason", err.Error())
		}
	})
}

func (l *Listener) forget(raw net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	from := l.opening[raw]
	delete(l.opening, raw)
	if l.from[from]--; l.from[from] == 0 {
		delete(l.from, from)
	}
}

// addressOf returns the address of the peer without its port.
func addressOf(raw net.Conn) netip.Addr {
	if a, ok := raw.RemoteAddr().(*net.TCPAddr); ok {
		return a.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// deliver hands a complete connection to Accept.
func (l *Listener) deliver(c *Conn, log logr.Logger) {
	c.start()
	l.mu.Lock()
	accepted := !l.closed
	if accepted {
		select {
		case l.ready <- c:
		default:
			accepted = false
		}
	}
	l.mu.Unlock()
	if !accepted {
		c.Close()
		log.Info("dropped a connection that nobody accepts", "peer", string(c.peer))
		return
	}
	log.V(1).Info("accepted a connection", "peer", string(c.peer), "software", c.software,
		"role", c.role.String(), "migration", c.migration.String(), "lanes", len(c.bulk))
}
