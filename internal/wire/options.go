// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/go-logr/logr"
)

// Options configure both Dial and Listen. Zero values mean the defaults.
type Options struct {
	// Credentials prove this node and say whom to trust. It is asked at every
	// handshake, so what it returns may change while connections live. Required.
	Credentials CredentialsFunc
	// Lanes is the number of bulk lanes that Dial opens, 1 to MaxLanes. Default 2.
	Lanes int
	// MaxConns bounds the connections that a Listener keeps, complete or not.
	// Default 1024.
	MaxConns int
	// HandshakeTimeout bounds the way from a TCP connection to a complete
	// connection set. Default 10 s.
	HandshakeTimeout time.Duration
	// IdleTimeout is how long a peer may be silent, or take to give or take one
	// frame, before it is held dead: at least 100 ms. Default 30 s. Idle lanes are
	// pinged at a third of it, or of the peer's if that is shorter.
	IdleTimeout time.Duration
	// Log receives what a Listener cannot return: connections that were refused.
	Log logr.Logger
	// Software is this side's name and version for the peer's logs, such as
	// "agent 0.3.1"; at most 63 bytes.
	Software string
	// Dialer opens TCP connections; nil means net.Dialer. The lab binds to
	// addresses with it.
	Dialer func(ctx context.Context, network, addr string) (net.Conn, error)
}

// withDefaults returns o with every field set, or an error naming what is wrong.
func (o Options) withDefaults() (Options, error) {
	if o.Lanes == 0 {
		o.Lanes = 2
	}
	if o.MaxConns == 0 {
		o.MaxConns = 1024
	}
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = 10 * time.Second
	}
	if o.IdleTimeout == 0 {
		o.IdleTimeout = 30 * time.Second
	}
	if o.Dialer == nil {
		o.Dialer = new(net.Dialer).DialContext
	}
	if o.Log.GetSink() == nil {
		o.Log = logr.Discard()
	}
	switch {
	case o.Credentials == nil:
		return o, errors.New("options: no credentials")
	case o.Lanes < 1 || o.Lanes > MaxLanes:
		return o, fmt.Errorf("options: %d bulk lanes, 1 to %d allowed", o.Lanes, MaxLanes)
	case o.MaxConns < 1:
		return o, fmt.Errorf("options: at most %d connections, at least 1 wanted", o.MaxConns)
	case o.HandshakeTimeout < 0:
		return o, fmt.Errorf("options: handshake timeout of %v", o.HandshakeTimeout)
	case o.IdleTimeout < minIdleMillis*time.Millisecond || o.IdleTimeout > 24*time.Hour:
		return o, fmt.Errorf("options: idle timeout of %v, %d ms to 24 h allowed", o.IdleTimeout, minIdleMillis)
	case len(o.Software) > maxSoftware:
		return o, fmt.Errorf("options: software: %d bytes, at most %d allowed", len(o.Software), maxSoftware)
	}
	return o, nil
}

func (o *Options) idleMillis() uint32 { return uint32(o.IdleTimeout / time.Millisecond) }
