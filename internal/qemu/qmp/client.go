// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

const (
	// MaxLine is the longest line accepted from QEMU, in bytes. The longest that
	// stock QEMU sends is the reply to query-qmp-schema, about 250 KiB.
	MaxLine = 4 << 20
	// MaxCommand is the longest command sent, in bytes.
	MaxCommand = 1 << 20
	// DefaultTimeout bounds a call whose context has no deadline.
	DefaultTimeout = 30 * time.Second

	// QEMU stops reading at 8 queued commands (QMP_REQ_QUEUE_LEN_MAX in
	// monitor/qmp.c), and then no out-of-band command gets through either.
	maxUnanswered    = 6
	maxUnansweredOOB = 16
)

var (
	// ErrClosed says that the connection is gone: closed by [Client.Close], by
	// QEMU, or after a message that made no sense. The reason is wrapped beside it.
	ErrClosed = errors.New("qmp: connection closed")
	// ErrNoOOB says that this QEMU or this monitor runs nothing out of band.
	ErrNoOOB = errors.New("qmp: monitor offers no out-of-band execution")
)

// Client is one connection to a QEMU's monitor. It is safe for concurrent use.
type Client struct {
	conn    net.Conn
	version Version
	oob     bool

	// A place is taken before a command is sent and given back by its reply, so
	// that abandoned commands count: QEMU still has them.
	places, placesOOB chan struct{}
	writing           chan struct{} // held by whoever writes

	mu      sync.Mutex
	nextID  uint64
	pending map[uint64]*call
	subs    map[*Subscription]struct{}
	cause   error // set once, when the connection ends

	ended chan struct{} // closed by the reader when it returns
}

// call waits for one reply.
type call struct {
	places chan struct{}
	reply  chan message // room for one, so that the reader never blocks
}

// Dial connects to the monitor on the unix socket at path, reads its greeting and
// negotiates capabilities, out-of-band execution among them when it is offered.
// A monitor serves one client: when another is connected there is no greeting,
// and Dial fails at the context's deadline or after [DefaultTimeout].
func Dial(ctx context.Context, path string) (*Client, error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("connecting to the monitor: %w", err)
	}
	c, err := newClient(ctx, conn)
	if err != nil {
		return nil, fmt.Errorf("opening the monitor at %s: %w", path, err)
	}
	return c, nil
}

// newClient owns conn and closes it on error.
func newClient(ctx context.Context, conn net.Conn) (*Client, error) {
	c := &Client{
		conn:      conn,
		places:    make(chan struct{}, maxUnanswered),
		placesOOB: make(chan struct{}, maxUnansweredOOB),
		writing:   make(chan struct{}, 1),
		pending:   make(map[uint64]*call),
		subs:      make(map[*Subscription]struct{}),
		ended:     make(chan struct{}),
	}
	lines := bufio.NewReaderSize(conn, 16<<10)
	if err := c.greet(ctx, lines); err != nil {
		conn.Close()
		return nil, err
	}
	go c.read(lines)
	var args struct {
		Enable []string `json:"enable,omitempty"`
	}
	if c.oob {
		args.Enable = []string{"oob"}
	}
	if err := c.Execute(ctx, "qmp_capabilities", args, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Client) greet(ctx context.Context, lines *bufio.Reader) error {
	// Where a deadline cannot be set, the connection is closed and nothing waits on it.
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	line, err := readLine(lines, nil)
	if err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("no greeting, perhaps another client is connected: %w", context.Cause(ctx))
		}
		return fmt.Errorf("reading the greeting: %w", err)
	}
	m, err := decode(line)
	if err != nil {
		return fmt.Errorf("reading the greeting: %w", err)
	}
	if m.kind != kindGreeting {
		return fmt.Errorf("expected a greeting, got %s", excerpt(line))
	}
	if !stop() {
		return fmt.Errorf("after the greeting: %w", context.Cause(ctx))
	}
	c.version, c.oob = m.version, m.oob
	return nil
}

// Version returns the version that QEMU named in its greeting.
func (c *Client) Version() Version { return c.version }

// OOB tells whether [Client.ExecuteOOB] can be used.
func (c *Client) OOB() bool { return c.oob }

// Done is closed when the connection has ended, for whatever reason.
func (c *Client) Done() <-chan struct{} { return c.ended }

// Close ends the connection, and with it every call and subscription. It returns
// when nothing of the client runs any more. QEMU itself goes on.
func (c *Client) Close() error {
	c.end(nil)
	<-c.ended
	return nil
}

// end closes the connection; the first cause stays.
func (c *Client) end(cause error) {
	c.mu.Lock()
	if c.cause == nil {
		c.cause = ErrClosed
		if cause != nil {
			c.cause = fmt.Errorf("%w: %w", ErrClosed, cause)
		}
	}
	c.mu.Unlock()
	c.conn.Close()
}

func (c *Client) endCause() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cause
}

// Execute runs one command and waits for its reply. args is marshalled as the
// command's arguments, nil for none; the returned value is unmarshalled into
// reply unless that is nil. Commands of one client run one after the other.
//
// A command that QEMU refuses gives an [*Error]. When the context ends first the
// command may still run: QMP has no way to take it back.
func (c *Client) Execute(ctx context.Context, command string, args, reply any) error {
	return c.execute(ctx, c.places, "execute", command, args, reply)
}

// ExecuteOOB is [Client.Execute] out of band: it is answered although QEMU's main
// loop hangs. Few commands can: among them migrate-recover, migrate-pause and
// yank. It gives [ErrNoOOB] where the monitor does not offer it.
func (c *Client) ExecuteOOB(ctx context.Context, command string, args, reply any) error {
	if !c.oob {
		return fmt.Errorf("%s: %w", command, ErrNoOOB)
	}
	return c.execute(ctx, c.placesOOB, "exec-oob", command, args, reply)
}

func (c *Client) execute(ctx context.Context, places chan struct{}, verb, command string, args, reply any) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	select {
	case places <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("%s: not sent, %d commands are unanswered: %w", command, cap(places), context.Cause(ctx))
	case <-c.ended:
		return fmt.Errorf("%s: %w", command, c.endCause())
	}
	w := &call{places: places, reply: make(chan message, 1)}
	if err := c.send(ctx, w, verb, command, args); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	select {
	case m := <-w.reply:
		return finish(m, command, reply)
	case <-ctx.Done():
		return fmt.Errorf("%s: no reply: %w", command, context.Cause(ctx))
	case <-c.ended:
		// The reply may have been the last thing read.
		select {
		case m := <-w.reply:
			return finish(m, command, reply)
		default:
			return fmt.Errorf("%s: %w", command, c.endCause())
		}
	}
}

func finish(m message, command string, reply any) error {
	if m.kind == kindError {
		err := m.err
		err.Command = command
		return &err
	}
	if reply == nil {
		return nil
	}
	if err := json.Unmarshal(m.payload, reply); err != nil {
		return fmt.Errorf("%s: reply %s: %w", command, excerpt(m.payload), err)
	}
	return nil
}

// send registers w and writes the command. On error w and its place are free.
func (c *Client) send(ctx context.Context, w *call, verb, command string, args any) error {
	id := c.register(w)
	fields := map[string]any{verb: command, "id": id}
	if args != nil {
		fields["arguments"] = args
	}
	line, err := json.Marshal(fields)
	if err == nil && len(line) >= MaxCommand {
		err = fmt.Errorf("command has %d bytes, more than %d", len(line), MaxCommand)
	}
	if err == nil {
		err = c.write(ctx, append(line, '\n'))
	}
	if err != nil {
		c.answered(id)
	}
	return err
}

func (c *Client) register(w *call) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nextID++
	c.pending[c.nextID] = w
	return c.nextID
}

// answered forgets a command and frees its place. It returns nil for one unknown.
func (c *Client) answered(id uint64) *call {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := c.pending[id]
	if w != nil {
		delete(c.pending, id)
		<-w.places
	}
	return w
}

func (c *Client) write(ctx context.Context, line []byte) error {
	select {
	case c.writing <- struct{}{}:
		defer func() { <-c.writing }()
	case <-ctx.Done():
		return fmt.Errorf("not sent: %w", context.Cause(ctx))
	case <-c.ended:
		return c.endCause()
	}
	interrupted := make(chan struct{})
	// As in greet, a deadline that cannot be set is that of a closed connection.
	stop := context.AfterFunc(ctx, func() {
		_ = c.conn.SetWriteDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	n, err := c.conn.Write(line)
	if !stop() {
		<-interrupted
		_ = c.conn.SetWriteDeadline(time.Time{})
	}
	switch {
	case err == nil:
		return nil
	case n == 0 && ctx.Err() != nil:
		return fmt.Errorf("not sent: %w", context.Cause(ctx))
	}
	// Half a command cannot be followed by another.
	c.end(fmt.Errorf("writing a command: %w", err))
	return c.endCause()
}

// read is the only reader of the connection. It waits for nobody but QEMU.
func (c *Client) read(lines *bufio.Reader) {
	var buf []byte
	for {
		line, err := readLine(lines, buf)
		if err == nil {
			buf = line[:0]
			err = c.dispatch(line)
		}
		if err != nil {
			c.end(err)
			break
		}
		if cap(buf) > 256<<10 {
			buf = nil // one long reply must not stay in memory
		}
	}
	c.closeSubscriptions()
	close(c.ended)
}

func (c *Client) dispatch(line []byte) error {
	m, err := decode(line)
	if err != nil {
		return err
	}
	switch m.kind {
	case kindEvent:
		c.publish(Event{Name: m.event, Data: m.payload, Time: m.time})
	case kindReturn, kindError:
		if !m.hasID {
			// QEMU answers so when it could not parse: nobody knows whom it meant.
			return fmt.Errorf("reply without an id: %s", excerpt(line))
		}
		w := c.answered(m.id)
		if w == nil {
			return fmt.Errorf("reply to a command that was not asked: %s", excerpt(line))
		}
		w.reply <- m
	case kindGreeting:
		return errors.New("second greeting")
	}
	return nil
}

// readLine reads a line with its newline into buf, at most MaxLine bytes.
func readLine(r *bufio.Reader, buf []byte) ([]byte, error) {
	for {
		part, err := r.ReadSlice('\n')
		if len(buf)+len(part) > MaxLine {
			return nil, fmt.Errorf("line longer than %d bytes", MaxLine)
		}
		buf = append(buf, part...)
		switch {
		case err == nil:
			return buf, nil
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF) && len(buf) > 0:
			return nil, io.ErrUnexpectedEOF
		default:
			return nil, err
		}
	}
}

func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, DefaultTimeout)
}
