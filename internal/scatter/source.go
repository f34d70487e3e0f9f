// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
)

const (
	// flushAfter is how long a batch that is not full waits for more pages.
	flushAfter = 500 * time.Microsecond
	// returnTimeout bounds a write on the return path.
	returnTimeout = 30 * time.Second
	// leaveTimeout bounds the wait for QEMU to close its stream after SHUT.
	leaveTimeout = 30 * time.Second
)

// source is one connection of the source QEMU: its main stream with the return path,
// or a multifd channel.
type source struct {
	conn net.Conn
	// first are the first bytes where they were looked at, ahead those of them that
	// were not read yet.
	first [4]byte
	ahead []byte

	mu sync.Mutex
	// returnPath is set when QEMU reads answers.
	returnPath bool
	// halted makes every read fail without closing the stream.
	halted error
	// block is that of the last request, -1 before the first.
	block int
	buf   []byte
}

func newSource(c net.Conn) *source { return &source{conn: c, block: -1} }

// close ends the stream. QEMU then takes the migration for failed and its guest goes
// on, if it was not handed over: see the package comment.
func (s *source) close() { s.conn.Close() }

// halt makes reads fail and leaves the stream open.
func (s *source) halt(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.halted = err
	_ = s.conn.SetReadDeadline(time.Unix(1, 0)) // fails on a closed stream, which no read waits on
}

// until sets the read deadline, unless the source was halted.
func (s *source) until(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.halted != nil {
		return s.halted
	}
	return s.conn.SetReadDeadline(t)
}

// answer writes what build appends to the return path.
func (s *source) answer(build func([]byte) []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.returnPath {
		return errors.New("the source QEMU opened no return path")
	}
	s.buf = build(s.buf[:0])
	if err := s.conn.SetWriteDeadline(time.Now().Add(returnTimeout)); err != nil {
		return fmt.Errorf("writing to the source QEMU: %w", err)
	}
	if _, err := s.conn.Write(s.buf); err != nil {
		return fmt.Errorf("writing to the source QEMU: %w", err)
	}
	return nil
}

func (s *source) pong(v uint32) error {
	return s.answer(func(b []byte) []byte { return qemu.AppendPong(b, v) })
}

// request asks QEMU for host pages.
func (s *source) request(l *pages.Layout, units []pages.Index) error {
	if len(units) == 0 {
		return nil
	}
	return s.answer(func(b []byte) []byte {
		for _, i := range units {
			block, offset := l.Locate(i)
			n := uint32(l.Blocks()[block].PageSize)
			if block == s.block {
				b = qemu.AppendReqPages(b, offset, n)
				continue
			}
			s.block = block
			b = qemu.AppendReqPagesID(b, l.Blocks()[block].Name, offset, n)
		}
		return b
	})
}

// shut tells QEMU that the migration is complete, waits until it has left, and closes
// the stream. A QEMU without return path leaves by itself.
func (s *source) shut() error {
	var err error
	if s.returnPath {
		err = s.answer(func(b []byte) []byte { return qemu.AppendShut(b, 0) })
	}
	err = errors.Join(err, s.until(time.Now().Add(leaveTimeout)))
	if n, eof := io.Copy(io.Discard, s.conn); n > 0 || eof != nil {
		err = errors.Join(err, fmt.Errorf("the source QEMU did not close its stream after SHUT (%d bytes more): %w", n, eof))
	}
	s.close()
	return err
}

// tap is what a decoder reads a stream from. Before it waits for QEMU for long, it
// gives the open batch away, so that the pages of a slow stream do not wait for more.
type tap struct {
	src  *source
	feed *feeder
}

// Read reads once from the stream.
func (t *tap) Read(p []byte) (int, error) {
	if len(t.src.ahead) > 0 {
		n := copy(p, t.src.ahead)
		t.src.ahead = t.src.ahead[n:]
		return n, nil
	}
	if t.feed.open != nil {
		if err := t.src.until(time.Now().Add(flushAfter)); err != nil {
			return 0, err
		}
		n, err := t.src.conn.Read(p)
		if n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		if err := t.feed.flush(true); err != nil {
			return 0, err
		}
	}
	if err := t.src.until(time.Time{}); err != nil {
		return 0, err
	}
	n, err := t.src.conn.Read(p)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		if halted := t.src.until(time.Time{}); halted != nil {
			err = halted
		}
	}
	return n, err
}
