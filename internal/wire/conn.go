// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/go-logr/logr"
)

var errSkeleton = errors.New("not built yet")

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
	// IdleTimeout is how long a peer may be silent, or take no data, before it is
	// held dead. Default 30 s. Idle lanes are pinged at a third of it.
	IdleTimeout time.Duration
	// Log receives what a Listener cannot return: connections that were refused.
	Log logr.Logger
	// Software is this side's name and version for the peer's logs, such as
	// "agent 0.3.1".
	Software string
	// Dialer opens TCP connections; nil means net.Dialer. Tests and the lab bind
	// to addresses with it.
	Dialer func(ctx context.Context, network, addr string) (net.Conn, error)
}

// Dial opens all lanes of a connection for one migration to the agent at addr
// ("host:port"). It fails with ErrPeer unless that agent proves to be peer. Errors of
// the peer are *Error.
func Dial(ctx context.Context, o Options, addr string, peer Identity, role Role, id MigrationID) (*Conn, error) {
	return nil, errSkeleton
}

// Listener accepts connections of other agents.
type Listener struct{}

// Listen listens on addr ("host:port", TCP). Close must be called.
func Listen(addr string, o Options) (*Listener, error) { return nil, errSkeleton }

// Accept returns the next connection whose lanes are all open. It returns ErrClosed
// after Close.
func (l *Listener) Accept(ctx context.Context) (*Conn, error) { return nil, errSkeleton }

// Addr returns the address that the listener is bound to.
func (l *Listener) Addr() net.Addr { return nil }

// Close stops listening and drops the connections that were not accepted yet.
func (l *Listener) Close() error { return nil }

// Conn is the set of lanes between two agents for one migration.
type Conn struct{}

// Peer returns the identity that the other side proved.
func (c *Conn) Peer() Identity { return "" }

// Role returns the conversation that the connection is for.
func (c *Conn) Role() Role { return 0 }

// Migration returns the migration that the connection is for.
func (c *Conn) Migration() MigrationID { return MigrationID{} }

// Control returns the control lane.
func (c *Conn) Control() *Lane { return nil }

// Urgent returns the urgent lane.
func (c *Conn) Urgent() *Lane { return nil }

// Bulk returns bulk lane i, 0 to Lanes()-1.
func (c *Conn) Bulk(i int) *Lane { return nil }

// Lanes returns the number of bulk lanes.
func (c *Conn) Lanes() int { return 0 }

// RemoteAddr returns the peer's address, for logs.
func (c *Conn) RemoteAddr() net.Addr { return nil }

// Done is closed when the connection is, by either side or by a failure.
func (c *Conn) Done() <-chan struct{} { return nil }

// Err returns why the connection was closed: nil while it is open, ErrClosed after
// Close, else the first failure.
func (c *Conn) Err() error { return nil }

// Close closes all lanes at once; frames still under way may be lost. Calls blocked
// in Send and Receive return ErrClosed.
func (c *Conn) Close() error { return nil }

// Fail tells the peer why before it closes: it sends e on the control lane, then
// waits at most one second for the peer to close.
func (c *Conn) Fail(e *Error) {}

// Lane is one ordered stream of frames in both directions. Any lane's failure closes
// its whole Conn.
type Lane struct{}

// Kind returns what the lane is for.
func (l *Lane) Kind() LaneKind { return 0 }

// Number returns the number of a bulk lane, else 0.
func (l *Lane) Number() int { return 0 }

// Send sends one message. It blocks while the peer takes no data, at most
// Options.IdleTimeout. It is safe for concurrent use. After a failure it returns the
// reason that Conn.Err returns, except that a message beyond a limit, or not allowed
// on this lane, fails without harm to the connection.
func (l *Lane) Send(seq uint64, m Message) error { return errSkeleton }

// SendBatch sends the pages of b, which must not be empty, as one frame with b.Seq.
// It blocks like Send and is safe for concurrent use with other batches. When it
// returns, b may be changed, or sent again.
func (l *Lane) SendBatch(b *Batch) error { return errSkeleton }

// Receive waits for the next frame and reads it into f, reusing f's buffer. Pings
// and unknown optional frames are handled inside. One goroutine at a time may call
// it. It returns io.EOF when the peer closed the lane between two frames.
func (l *Lane) Receive(f *Frame) error { return errSkeleton }
