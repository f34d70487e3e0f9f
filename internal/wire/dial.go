// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// Dial opens all lanes of a connection for one migration to the agent at addr
// ("host:port"). It fails with ErrPeer unless that agent proves to be peer, or if it
// does not accept our certificate. An *Error in the error is what the peer said.
func Dial(ctx context.Context, o Options, addr string, peer Identity, role Role, id MigrationID) (*Conn, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	if role < SourceToDestination || role > DestinationToIntermediary {
		return nil, fmt.Errorf("dialling node %s: %v", peer, role)
	}
	if err = peer.check(); err != nil {
		return nil, fmt.Errorf("dialling %s: %w", addr, err)
	}
	ctx, cancel := context.WithTimeout(ctx, o.HandshakeTimeout)
	defer cancel()
	d := &dialling{o: &o, addr: addr, peer: peer, hello: hello{
		minVersion: Version, maxVersion: Version, role: role, lanes: uint8(o.Lanes),
		idle: o.idleMillis(), migration: id, software: o.Software,
	}}
	rand.Read(d.hello.group[:]) // never fails: it crashes the process instead
	c, err := d.dial(ctx)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		return nil, fmt.Errorf("dialling node %s at %s: %w", peer, addr, err)
	}
	return c, nil
}

// dialling is one Dial under way.
type dialling struct {
	o     *Options
	addr  string
	peer  Identity
	hello hello
	conn  *Conn
}

func (d *dialling) dial(ctx context.Context) (*Conn, error) {
	session, err := d.control(ctx)
	if err != nil {
		return nil, err
	}
	if err := d.lanes(ctx, session); err != nil {
		d.conn.Close()
		return nil, err
	}
	d.conn.start()
	return d.conn, nil
}

// connect opens a TCP connection that is closed when ctx ends before stop is called.
func (d *dialling) connect(ctx context.Context, kind LaneKind) (raw net.Conn, stop func() bool, err error) {
	if raw, err = d.o.Dialer(ctx, "tcp", d.addr); err != nil {
		return nil, nil, fmt.Errorf("opening the %v lane: %w", kind, err)
	}
	if err = tune(raw, kind); err != nil {
		raw.Close()
		return nil, nil, err
	}
	return raw, context.AfterFunc(ctx, func() { raw.Close() }), nil
}

// control opens the control lane and makes the connection with it.
func (d *dialling) control(ctx context.Context) (*tls.ConnectionState, error) {
	credentials, err := d.o.Credentials()
	if err != nil {
		return nil, fmt.Errorf("our credentials: %w", err)
	}
	raw, stop, err := d.connect(ctx, LaneControl)
	if err != nil {
		return nil, err
	}
	session, err := d.greet(ctx, raw, credentials)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		raw.Close()
		return nil, err
	}
	return session, nil
}

// greet does the TLS handshake and the Hello on a new TCP connection.
func (d *dialling) greet(ctx context.Context, raw net.Conn, credentials *Credentials) (*tls.ConnectionState, error) {
	secure := tls.Client(raw, tlsConfig(credentials, x509.ExtKeyUsageServerAuth, func(id Identity) error {
		if id != d.peer {
			return fmt.Errorf("%w: it proved to be node %s, wanted is node %s", ErrPeer, id, d.peer)
		}
		return nil
	}))
	if err := secure.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("TLS handshake: %w", err)
	}
	if err := sendPlain(secure, TypeHello, d.hello.encode()); err != nil {
		return nil, fmt.Errorf("sending Hello: %w", rejected(err, credentials))
	}
	in := bufio.NewReaderSize(secure, laneReader)
	t, body, err := receivePlain(in)
	if err != nil {
		return nil, fmt.Errorf("waiting for Welcome: %w", rejected(err, credentials))
	}
	w, err := welcomed(t, body)
	if err != nil {
		return nil, err
	}
	d.conn = newConn(d.hello.role, d.hello.migration, d.peer, true, d.o.IdleTimeout, millis(w.idle))
	d.conn.software = printable(w.software)
	d.conn.bulk = make([]*Lane, d.hello.lanes)
	d.conn.addLane(d.conn.newLane(LaneControl, 0, raw, secure, in))
	session := secure.ConnectionState()
	return &session, nil
}

// welcomed reads the answer to Hello.
func welcomed(t Type, body []byte) (*welcome, error) {
	switch t {
	case TypeWelcome:
		return parseWelcome(body)
	case TypeError:
		e, err := ParseError(body)
		switch {
		case err != nil:
			return nil, err
		case e.Code == CodeVersion:
			return nil, fmt.Errorf("%w: %w", ErrVersion, e)
		}
		return nil, e
	}
	return nil, fmt.Errorf("%w: %v where Welcome is wanted", ErrProtocol, t)
}

// rejected explains an alert of the peer, which with TLS 1.3 comes after our side of the
// handshake is done, and which says little.
func rejected(err error, ours *Credentials) error {
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "remote error" {
		return err
	}
	leaf, leafErr := ours.leaf()
	if leafErr != nil {
		return fmt.Errorf("%w: the peer does not accept our certificate: %w", ErrPeer, err)
	}
	return fmt.Errorf("%w: the peer does not accept our certificate (%q, signed by %q, valid until %s); its log says why: %w",
		ErrPeer, leaf.Subject, leaf.Issuer, leaf.NotAfter.Format(time.RFC3339), err)
}

// lanes opens the other lanes, all at once, and returns the first error.
func (d *dialling) lanes(ctx context.Context, session *tls.ConnectionState) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for _, p := range expected(&d.hello) {
		wg.Go(func() {
			if err := d.lane(ctx, session, p); err != nil {
				cancel(fmt.Errorf("opening %v lane %d: %w", p.kind, p.number, err))
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// expected returns the lanes that follow the control lane.
func expected(h *hello) []preamble {
	var lanes []preamble
	if h.role != SourceToIntermediary {
		lanes = append(lanes, preamble{kind: LaneUrgent, group: h.group})
	}
	for i := range h.lanes {
		lanes = append(lanes, preamble{kind: LaneBulk, number: i, group: h.group})
	}
	return lanes
}

func (d *dialling) lane(ctx context.Context, session *tls.ConnectionState, p preamble) error {
	raw, stop, err := d.connect(ctx, p.kind)
	if err != nil {
		return err
	}
	l := d.conn.newLane(p.kind, int(p.number), raw, raw, bufio.NewReaderSize(raw, laneReader))
	if err = l.secure(session, true); err == nil {
		err = l.sendOpening(TypeLaneOpen, p.encode())
	}
	if err == nil {
		err = l.receiveOpening(TypeLaneReady)
	}
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil || !d.conn.addLane(l) {
		raw.Close()
		return err
	}
	return nil
}
