// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/go-logr/logr"
)

// group is a connection that waits for its lanes.
type group struct {
	conn    *Conn
	session tls.ConnectionState
	timer   *time.Timer
	// claimed holds the lanes that came, and missing is how many are not open yet.
	// The listener's mutex guards both.
	claimed map[preamble]bool
	missing int
}

// open serves a new TCP connection until it is a lane of a Conn, or fails.
func (l *Listener) open(raw net.Conn, log logr.Logger) error {
	deadline := time.Now().Add(l.o.HandshakeTimeout)
	if err := raw.SetDeadline(deadline); err != nil {
		return err
	}
	in := bufio.NewReaderSize(raw, laneReader)
	first, err := in.Peek(1)
	if err != nil {
		return fmt.Errorf("waiting for the first byte: %w", err)
	}
	switch first[0] {
	case tlsHandshake:
		return l.openControl(&peeked{raw, in}, deadline, log)
	case laneFirstByte:
		return l.openLane(raw, in, log)
	}
	return fmt.Errorf("%w: the first byte is %#x, neither TLS nor a lane", ErrProtocol, first[0])
}

// openControl serves a control lane until its Welcome is sent.
func (l *Listener) openControl(raw *peeked, deadline time.Time, log logr.Logger) error {
	if err := tune(raw.Conn, LaneControl); err != nil {
		return err
	}
	credentials, err := l.o.Credentials()
	if err != nil {
		return fmt.Errorf("our credentials: %w", err)
	}
	var peer Identity
	secure := tls.Server(raw, tlsConfig(credentials, x509.ExtKeyUsageClientAuth, func(id Identity) error {
		peer = id
		return nil
	}))
	if err = secure.HandshakeContext(context.Background()); err != nil { // raw has a deadline
		return fmt.Errorf("TLS handshake: %w", err)
	}
	in := bufio.NewReaderSize(secure, laneReader)
	h, err := receiveHello(in)
	if err != nil {
		code := CodeProtocol
		if errors.Is(err, ErrVersion) {
			code = CodeVersion
		}
		refuse(secure, raw.Conn, &Error{Code: code, Text: err.Error()})
		return fmt.Errorf("node %s: %w", peer, err)
	}
	c := newConn(h.role, h.migration, peer, false, l.o.IdleTimeout, millis(h.idle))
	c.software = printable(h.software)
	c.bulk = make([]*Lane, h.lanes)
	c.control = c.newLane(LaneControl, 0, raw.Conn, secure, in)
	g := &group{conn: c, session: secure.ConnectionState()}
	if err = l.register(g, h, deadline, log); err != nil {
		refuse(secure, raw.Conn, &Error{Code: CodeBusy, Text: err.Error()})
		return fmt.Errorf("node %s: %w", peer, err)
	}
	w := welcome{version: Version, idle: l.o.idleMillis(), software: l.o.Software}
	if err = sendPlain(secure, TypeWelcome, w.encode()); err == nil {
		err = raw.SetDeadline(time.Time{})
	}
	if err != nil {
		c.Close()
		return fmt.Errorf("node %s: sending Welcome: %w", peer, err)
	}
	return nil
}

func receiveHello(r io.Reader) (*hello, error) {
	t, body, err := receivePlain(r)
	if err != nil {
		return nil, fmt.Errorf("waiting for Hello: %w", err)
	}
	if t != TypeHello {
		return nil, fmt.Errorf("%w: %v where Hello is wanted", ErrProtocol, t)
	}
	h, err := parseHello(body)
	if err == nil && (h.minVersion > Version || h.maxVersion < Version) {
		err = fmt.Errorf("%w: you speak %d to %d, this agent speaks %d", ErrVersion, h.minVersion, h.maxVersion, Version)
	}
	return h, err
}

// refuse answers Hello with an error, and gives it time to arrive.
func refuse(secure *tls.Conn, raw net.Conn, e *Error) {
	body, err := e.Append(nil)
	if err != nil || sendPlain(secure, TypeError, body) != nil {
		return
	}
	halfClose(raw)
	if raw.SetReadDeadline(time.Now().Add(linger)) != nil {
		return
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(raw, maxOpening)) // how the peer ends it is all the same
}

// register makes the lanes of a connection welcome until the deadline.
func (l *Listener) register(g *group, h *hello, deadline time.Time, log logr.Logger) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return ErrClosed
	case len(l.conns) >= l.o.MaxConns:
		return fmt.Errorf("this agent has %d connections, at most %d allowed", len(l.conns), l.o.MaxConns)
	case l.groups[h.group] != nil:
		return fmt.Errorf("%w: the group is in use", ErrProtocol)
	}
	lanes := expected(h)
	g.missing = len(lanes)
	g.claimed = make(map[preamble]bool, len(lanes))
	for _, p := range lanes {
		g.claimed[p] = false
	}
	l.groups[h.group] = g
	l.conns[g.conn] = struct{}{}
	g.conn.onClose = func() {
		g.timer.Stop()
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.conns, g.conn)
		if l.groups[h.group] == g {
			delete(l.groups, h.group)
		}
	}
	g.timer = time.AfterFunc(time.Until(deadline), func() {
		log.Info("dropped a connection whose lanes did not all come", "peer", string(g.conn.peer))
		g.conn.Close()
	})
	return nil
}

// openLane serves a lane that is not control until it is open.
func (l *Listener) openLane(raw net.Conn, in *bufio.Reader, log logr.Logger) error {
	var head [preambleSize]byte
	if _, err := io.ReadFull(in, head[:]); err != nil {
		return fmt.Errorf("lane preamble: %w", err)
	}
	p, err := parsePreamble(head[:])
	if err != nil {
		return err
	}
	l.mu.Lock()
	g := l.groups[p.group]
	l.mu.Unlock()
	if g == nil {
		return fmt.Errorf("%w: %v lane %d of an unknown connection", ErrProtocol, p.kind, p.number)
	}
	lane := g.conn.newLane(p.kind, int(p.number), raw, raw, in)
	if err = lane.secure(&g.session, false); err != nil {
		return err
	}
	// Whoever has only overheard the group fails here, before the lane's place is
	// taken.
	if err = lane.receiveOpening(TypeLaneOpen); err != nil {
		return fmt.Errorf("%v: %w", lane, err)
	}
	if err = tune(raw, p.kind); err != nil {
		return err
	}
	if err = l.claim(g, p); err != nil {
		return fmt.Errorf("%v: %w", lane, err)
	}
	if err = lane.sendOpening(TypeLaneReady, nil); err == nil {
		err = raw.SetDeadline(time.Time{})
	}
	if err != nil || !g.conn.addLane(lane) {
		g.conn.Close()
		return fmt.Errorf("%v: sending LaneReady: %w", lane, errors.Join(err, g.conn.Err()))
	}
	if l.opened(g, p) {
		l.deliver(g.conn, log)
	}
	return nil
}

// claim takes the place of a lane. A place is taken once, because the keys of a lane
// must not serve two TCP connections.
func (l *Listener) claim(g *group, p preamble) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	taken, ok := g.claimed[p]
	switch {
	case !ok:
		return fmt.Errorf("%w: not a lane of this connection", ErrProtocol)
	case taken:
		return fmt.Errorf("%w: the lane is open already", ErrProtocol)
	}
	g.claimed[p] = true
	return nil
}

// opened counts a lane that is open, and reports whether it was the last one.
func (l *Listener) opened(g *group, p preamble) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	g.missing--
	if g.missing > 0 || l.groups[p.group] != g {
		return false
	}
	delete(l.groups, p.group)
	return g.timer.Stop()
}
