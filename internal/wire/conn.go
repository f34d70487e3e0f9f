// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bufio"
	"net"
	"slices"
	"sync"
	"time"
)

// linger is how long the last words of one side may take to reach the other.
const linger = time.Second

// Conn is the set of lanes between two agents for one migration.
type Conn struct {
	role      Role
	migration MigrationID
	peer      Identity
	software  string        // the peer's
	idle      time.Duration // after which the peer is held dead
	ping      time.Duration // between pings of an idle lane
	born      time.Time
	// self and other are the two ends as senders of frames.
	self, other party

	control, urgent *Lane
	bulk            []*Lane

	done chan struct{}

	mu      sync.Mutex
	err     error // why the connection was closed
	last    *time.Timer
	onClose func() // of the listener
}

// newConn makes a connection with its control lane; the others are added by addLane.
func newConn(role Role, id MigrationID, peer Identity, dialler bool, idle, peerIdle time.Duration) *Conn {
	return &Conn{
		role: role, migration: id, peer: peer, idle: idle, ping: min(idle, peerIdle) / 3,
		born: time.Now(), self: role.party(dialler), other: role.party(!dialler),
		done: make(chan struct{}),
	}
}

func (c *Conn) newLane(kind LaneKind, number int, raw, io net.Conn, in *bufio.Reader) *Lane {
	return &Lane{conn: c, kind: kind, number: number, raw: raw, io: io, in: in}
}

// start begins with keepalives, once all lanes are open.
func (c *Conn) start() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	for _, l := range c.all() {
		l.lastSent.Store(int64(time.Since(c.born)))
		l.pinger = time.AfterFunc(c.ping, func() { l.keepalive(c.ping) })
	}
}

// all returns the lanes that are there.
func (c *Conn) all() []*Lane {
	lanes := append([]*Lane{c.control, c.urgent}, c.bulk...)
	return slices.DeleteFunc(lanes, func(l *Lane) bool { return l == nil })
}

// Peer returns the identity that the other side proved.
func (c *Conn) Peer() Identity { return c.peer }

// PeerSoftware returns the name and version that the other side gave, for logs.
func (c *Conn) PeerSoftware() string { return c.software }

// Role returns the conversation that the connection is for.
func (c *Conn) Role() Role { return c.role }

// Migration returns the migration that the connection is for.
func (c *Conn) Migration() MigrationID { return c.migration }

// Control returns the control lane.
func (c *Conn) Control() *Lane { return c.control }

// Urgent returns the urgent lane, nil between source and intermediary, who have nothing
// urgent to say.
func (c *Conn) Urgent() *Lane { return c.urgent }

// Bulk returns bulk lane i, 0 to Lanes()-1.
func (c *Conn) Bulk(i int) *Lane { return c.bulk[i] }

// Lanes returns the number of bulk lanes.
func (c *Conn) Lanes() int { return len(c.bulk) }

// RemoteAddr returns the peer's address, for logs.
func (c *Conn) RemoteAddr() net.Addr { return c.control.raw.RemoteAddr() }

// Done is closed when the connection is, by either side or by a failure.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err returns why the connection was closed: nil while it is open, ErrClosed after
// Close, else the first failure, which wraps io.EOF when the peer closed it.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close closes all lanes at once; frames still under way may be lost. Calls blocked in
// Send and Receive return ErrClosed. It always returns nil.
func (c *Conn) Close() error {
	c.close(ErrClosed)
	return nil
}

// close closes the connection for a reason; only the first one counts.
func (c *Conn) close(reason error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = reason
	if c.last != nil {
		c.last.Stop()
	}
	for _, l := range c.all() {
		if l.pinger != nil {
			l.pinger.Stop()
		}
		// Not through TLS, which would try to write for up to five seconds.
		l.raw.Close()
	}
	onClose := c.onClose
	c.mu.Unlock()
	close(c.done)
	if onClose != nil {
		onClose()
	}
}

// closeSoon closes the connection after a moment unless it is closed before.
func (c *Conn) closeSoon(reason error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil && c.last == nil {
		c.last = time.AfterFunc(linger, func() { c.close(reason) })
	}
}

// Fail tells the peer why before it closes: it sends e on the control lane, then waits
// until the peer closes the connection, at most one second. Someone has to be in
// Receive on the control lane to notice that.
func (c *Conn) Fail(e *Error) {
	if c.control.Send(0, e) == nil {
		halfClose(c.control.raw)
		wait := time.NewTimer(linger)
		defer wait.Stop()
		select {
		case <-c.done:
		case <-wait.C:
		}
	}
	c.close(ErrClosed)
}

// halfClose ends our direction. Closing both while the peer's bytes are unread would
// make the kernel reset the connection, and the peer lose our last words.
func halfClose(raw net.Conn) {
	if t, ok := raw.(interface{ CloseWrite() error }); ok {
		_ = t.CloseWrite() // of a broken connection there is nothing to end
	}
}

// addLane puts an open lane into its place. It reports false when the connection was
// closed meanwhile; the caller then closes the lane.
func (c *Conn) addLane(l *Lane) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return false
	}
	switch l.kind {
	case LaneControl:
		c.control = l
	case LaneUrgent:
		c.urgent = l
	case LaneBulk:
		c.bulk[l.number] = l
	}
	return true
}
