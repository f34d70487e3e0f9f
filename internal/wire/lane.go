// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Lane is one ordered stream of frames in both directions. Any lane's failure closes
// its whole Conn.
type Lane struct {
	conn   *Conn
	kind   LaneKind
	number int
	// raw is the TCP connection. io is the same, or TLS over it on control lanes.
	raw, io net.Conn

	// in is the receiver's: only one goroutine at a time is in Receive.
	in     *bufio.Reader
	opener *frameCipher // nil on control lanes

	// mu guards out and sealer, and keeps frames in the order of the sealer.
	mu     sync.Mutex
	out    []byte       // the frame of the message being sent
	sealer *frameCipher // nil on control lanes

	lastSent atomic.Int64 // as time since conn.born
	pinger   *time.Timer
}

const (
	sending   = "sending"
	receiving = "receiving"
)

// Kind returns what the lane is for.
func (l *Lane) Kind() LaneKind { return l.kind }

// Number returns the number of a bulk lane, else 0.
func (l *Lane) Number() int { return l.number }

// String names the lane and its peer, for logs and errors.
func (l *Lane) String() string {
	if l.kind == LaneBulk {
		return fmt.Sprintf("bulk lane %d with %s", l.number, l.conn.peer)
	}
	return fmt.Sprintf("%v lane with %s", l.kind, l.conn.peer)
}

// Send sends one message. It blocks while the peer takes no data, at most
// Options.IdleTimeout. It is safe for concurrent use. After a failure it returns the
// reason that Conn.Err returns, except that a message beyond a limit, or not allowed
// on this lane, fails without harm to the connection.
func (l *Lane) Send(seq uint64, m Message) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	frame, err := m.Append(l.room(headerSize))
	if err != nil {
		return fmt.Errorf("sending on the %v: %w", l, err)
	}
	l.out = frame
	return l.send(m.Type(), seq, frame)
}

// sendBody is Send for a message that was encoded before.
func (l *Lane) sendBody(t Type, seq uint64, body []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.out = append(l.room(headerSize), body...)
	return l.send(t, seq, l.out)
}

// room returns the first n bytes of l.out, which keeps the largest buffer ever needed:
// at most MaxControlBody and a header.
func (l *Lane) room(n int) []byte {
	if cap(l.out) < n {
		l.out = make([]byte, 256)
	}
	return l.out[:n]
}

// send completes frame, in front of whose body there is room for the header, and writes
// it. The caller holds mu.
func (l *Lane) send(t Type, seq uint64, frame []byte) error {
	size := len(frame) - headerSize
	if err := allowed(t, l.conn.self, l.kind, size); err != nil {
		return fmt.Errorf("sending on the %v: %w", l, err)
	}
	return l.write(header{typ: t, length: uint32(size), seq: seq}, frame, headerSize)
}

// SendBatch sends the pages of b, which must not be empty, as one frame with b.Seq.
// It blocks like Send and is safe for concurrent use with other batches. When it
// returns, b may be changed, or sent again.
func (l *Lane) SendBatch(b *Batch) error {
	if b.n == 0 {
		return fmt.Errorf("sending on the %v: an empty batch", l)
	}
	if l.sealer == nil {
		return fmt.Errorf("sending on the %v: %w", l, allowed(TypePages, l.conn.self, l.kind, 0))
	}
	head := len(b.buf)
	frame := b.appendEntries(b.buf, l.sealer.coverage == coverTags)
	size := len(frame) - headerSize
	if err := allowed(TypePages, l.conn.self, l.kind, size); err != nil {
		return fmt.Errorf("sending on the %v: %w", l, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	h := header{typ: TypePages, count: uint16(b.n), length: uint32(size), seq: b.Seq}
	return l.write(h, frame, head)
}

// write puts the header in front of the frame, protects what lies behind head, and
// writes all of it at once. The caller holds mu.
func (l *Lane) write(h header, frame []byte, head int) error {
	if l.sealer != nil {
		h.length += tagSize
	}
	h.put(frame)
	if l.sealer != nil {
		frame = l.sealer.seal(frame, head)
		if h.typ != TypePages {
			l.out = frame
		}
	}
	now := time.Now()
	l.lastSent.Store(int64(now.Sub(l.conn.born)))
	err := l.io.SetWriteDeadline(now.Add(l.conn.idle))
	if err == nil {
		_, err = l.io.Write(frame)
	}
	if err != nil {
		return l.fail(sending, err)
	}
	return nil
}

// Receive waits for the next frame and reads it into f, reusing f's buffer. Pings and
// unknown optional frames are handled inside. One goroutine at a time may call it, and
// on every lane one has to be in it nearly always: that is how a dead peer is noticed
// and how pings are taken from the socket. Its error is or wraps io.EOF when the
// peer closed the lane between two frames; that proves nothing about why it did.
func (l *Lane) Receive(f *Frame) error {
	for {
		if err := l.receive(f); err != nil {
			return l.fail(receiving, err)
		}
		if f.Type != TypePing && f.Type.known() {
			return nil
		}
	}
}

func (l *Lane) receive(f *Frame) error {
	if err := l.deadline(); err != nil {
		return err
	}
	raw := f.room(headerSize)
	if _, err := io.ReadFull(l.in, raw); err != nil {
		return err
	}
	h := parseHeader(raw)
	size, err := l.sizeOf(&h)
	if err != nil {
		return err
	}
	// Bounded by sizeOf: the rule of the type.
	frame := f.room(headerSize + int(h.length))
	if l.in.Buffered() < int(h.length) {
		if err = l.deadline(); err != nil {
			return err
		}
	}
	if _, err = io.ReadFull(l.in, frame[headerSize:]); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("%v frame of %d bytes: %w", h.typ, size, err)
	}
	f.Type, f.Seq, f.count = h.typ, h.seq, int(h.count)
	if l.opener != nil {
		f.stride = l.opener.coverage.stride()
		head := headerSize
		if h.typ == TypePages {
			head += size - f.count*f.stride // sizeOf has checked that it is not negative
		}
		if frame, err = l.opener.open(frame, head); err != nil {
			return fmt.Errorf("%v frame of %d bytes: %w", h.typ, size, err)
		}
	}
	f.Body = frame[headerSize:]
	return nil
}

// deadline gives the peer the idle time to send the next header, or the rest of a
// frame.
func (l *Lane) deadline() error {
	return l.io.SetReadDeadline(time.Now().Add(l.conn.idle))
}

// sizeOf checks a header before anything is allocated for its frame, and returns the
// size of its body without the tag.
func (l *Lane) sizeOf(h *header) (int, error) {
	size := int64(h.length)
	if l.opener != nil {
		size -= tagSize
	}
	switch {
	case h.flags&^flagOptional != 0:
		return 0, fmt.Errorf("%w: %v with unknown flags %#x", ErrProtocol, h.typ, h.flags)
	case size < 0:
		return 0, fmt.Errorf("%w: %v of %d bytes has no room for its tag", ErrProtocol, h.typ, h.length)
	case !h.typ.known() && h.flags&flagOptional != 0:
		if limit := maxSkipped(l.kind); size > int64(limit) {
			return 0, fmt.Errorf("%w: %v of %d bytes, at most %d are skipped", ErrProtocol, h.typ, size, limit)
		}
		return int(size), nil
	}
	if err := allowed(h.typ, l.conn.other, l.kind, int(size)); err != nil {
		return 0, err
	}
	if h.typ != TypePages {
		if h.count != 0 {
			return 0, fmt.Errorf("%w: %v with %d descriptors", ErrProtocol, h.typ, h.count)
		}
		return int(size), nil
	}
	if n := int64(h.count) * int64(l.opener.coverage.stride()); n > size {
		return 0, fmt.Errorf("%w: %v of %d bytes with %d descriptors", ErrProtocol, h.typ, size, h.count)
	}
	return int(size), nil
}

// fail closes the connection because of err and returns what the caller should return.
// When the peer closed a lane, its last words on the control lane get a moment to be
// read: only the end of what the control lane has to give closes at once.
func (l *Lane) fail(doing string, err error) error {
	gone := errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("%w for %v", ErrTimeout, l.conn.idle)
	}
	reason := fmt.Errorf("%s on the %v: %w", doing, l, err)
	if gone && (l.kind != LaneControl || doing == sending) {
		l.conn.closeSoon(reason)
	} else {
		l.conn.close(reason)
	}
	if err == io.EOF {
		return err
	}
	if first := l.conn.Err(); first != nil {
		return first
	}
	return reason
}

// keepalive pings the peer when the lane was idle for an interval, and sets its timer
// for when it would be next.
func (l *Lane) keepalive(interval time.Duration) {
	idle := time.Since(l.conn.born) - time.Duration(l.lastSent.Load())
	if idle >= interval {
		if l.sendBody(TypePing, 0, nil) != nil {
			return
		}
		idle = 0
	}
	l.conn.mu.Lock()
	defer l.conn.mu.Unlock()
	if l.conn.err == nil {
		l.pinger.Reset(interval - idle)
	}
}
