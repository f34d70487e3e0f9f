// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"io"
)

const (
	defaultBuffer = 256 << 10
	leastBuffer   = 16 << 10
	// refillRoom is the least free space a Read is offered before what is left
	// is moved to the front: small enough reads would cost more than the move.
	refillRoom = 64 << 10
	// growStep is the least memory added at once for something large that is
	// arriving; from there it doubles.
	growStep = 64 << 10
	// emptyReads is how often in a row a reader may return nothing.
	emptyReads = 100
)

// reader is a buffer over src that hands out slices of itself instead of copies.
// A slice stays valid until the next call of need.
type reader struct {
	src  io.Reader
	buf  []byte
	r, w int    // buf[r:w] has arrived and is not used yet
	off  uint64 // stream offset of buf[0]
}

func newReader(src io.Reader, size int) reader {
	return reader{src: src, buf: make([]byte, size)}
}

func (b *reader) buffered() int  { return b.w - b.r }
func (b *reader) offset() uint64 { return b.off + uint64(b.r) }

// need returns the next n bytes without using them up; n must be at most
// leastBuffer. Fewer are returned only with an error: io.EOF if there is none,
// io.ErrUnexpectedEOF if there are some.
func (b *reader) need(n int) ([]byte, error) {
	if b.w-b.r < n {
		if err := b.fill(n); err != nil {
			return b.buf[b.r:b.w], err
		}
	}
	return b.buf[b.r : b.r+n : b.r+n], nil
}

// take returns the next n bytes and uses them up.
func (b *reader) take(n int) ([]byte, error) {
	p, err := b.need(n)
	if err != nil {
		return nil, err
	}
	b.r += n
	return p, nil
}

// fill reads, without waiting for more than it must, until n bytes are there.
func (b *reader) fill(n int) error {
	if b.r == b.w || len(b.buf)-b.w < refillRoom || len(b.buf)-b.r < n {
		copy(b.buf, b.buf[b.r:b.w])
		b.off += uint64(b.r)
		b.r, b.w = 0, b.w-b.r
	}
	for b.w-b.r < n {
		m, err := b.read(b.buf[b.w:])
		b.w += m
		if err != nil && b.w-b.r < n {
			return endOf(err, b.w-b.r)
		}
	}
	return nil
}

// read reads at least one byte or fails. It does not believe a reader that
// claims more than it was offered.
func (b *reader) read(p []byte) (int, error) {
	for range emptyReads {
		n, err := b.src.Read(p)
		if n < 0 || n > len(p) {
			return 0, fmt.Errorf("reader returned %d of %d bytes", n, len(p))
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
	return 0, io.ErrNoProgress
}

// takeLarge reads n bytes into dst, growing it as they arrive, so that memory
// follows what was sent and not what was announced.
func (b *reader) takeLarge(dst []byte, n int) ([]byte, error) {
	dst = dst[:0]
	k := min(n, b.buffered())
	dst = append(dst, b.buf[b.r:b.r+k]...)
	b.r += k
	for len(dst) < n {
		free, err := b.readMore(dst, n)
		if err != nil && len(free) < n {
			return free, endOf(err, len(free))
		}
		dst = free
	}
	return dst, nil
}

// readMore appends to dst what one read yields, to at most limit bytes in all.
// The buffer must be empty.
func (b *reader) readMore(dst []byte, limit int) ([]byte, error) {
	if len(dst) == cap(dst) {
		grown := make([]byte, len(dst), min(max(growStep, 2*len(dst)), limit))
		copy(grown, dst)
		dst = grown
	}
	m, err := b.read(dst[len(dst):min(cap(dst), limit)])
	b.off += uint64(m)
	return dst[:len(dst)+m], err
}

// endOf tells an end between two things from an end within one.
func endOf(err error, have int) error {
	if err == io.EOF && have > 0 {
		return io.ErrUnexpectedEOF
	}
	return err
}
