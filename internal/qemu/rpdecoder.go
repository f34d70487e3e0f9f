// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"fmt"
	"io"

	"scattergather.io/scattergather/internal/pages"
)

// maxRPMessage is the longest return-path message; QEMU's source refuses longer
// ones (migration/migration.c, source_return_path_thread). A bitmap follows its
// message and is not part of it.
const maxRPMessage = 512

// rpLengths are the lengths of the messages, -1 where they vary.
var rpLengths = [...]int{
	RPShut: 4, RPPong: 4, RPReqPagesID: -1, RPReqPages: 12, RPRecvBitmap: -1,
	RPResumeAck: 4, RPSwitchoverAck: 0,
}

// RPDecoder reads the return path of a destination QEMU. It is not safe for
// concurrent use and never waits for more than the next message needs.
type RPDecoder struct {
	r      reader
	blocks []pages.Block
	index  map[string]int
	last   int // block of the last RPReqPagesID, -1 for none
	bitmap []byte
	err    error // sticky
}

// NewRPDecoder returns a decoder of the return path r for a destination with
// these blocks, in the order of the block indices it returns.
func NewRPDecoder(r io.Reader, blocks []pages.Block) *RPDecoder {
	d := &RPDecoder{
		r:      newReader(r, leastBuffer),
		blocks: blocks,
		index:  make(map[string]int, len(blocks)),
		last:   -1,
	}
	for i := range blocks {
		d.index[blocks[i].Name] = i
	}
	return d
}

// Next reads the next message. It returns io.EOF when the peer closed between
// two messages, and an error that wraps io.ErrUnexpectedEOF within one. Other
// errors are final.
func (d *RPDecoder) Next(m *RPMessage) error {
	if d.err != nil {
		return d.err
	}
	*m = RPMessage{}
	at := d.r.offset()
	if err := d.message(m); err != nil {
		*m = RPMessage{}
		d.err = err
		if err != io.EOF {
			d.err = fmt.Errorf("return path at byte %d: %w", at, err)
		}
	}
	return d.err
}

func (d *RPDecoder) message(m *RPMessage) error {
	p, err := d.r.take(4)
	if err != nil {
		return err
	}
	t, n := RPType(be.Uint16(p)), int(be.Uint16(p[2:]))
	if t == 0 || int(t) >= len(rpLengths) {
		return fmt.Errorf("message of unknown type %d", t)
	}
	if want := rpLengths[t]; n > maxRPMessage || want >= 0 && n != want {
		return fmt.Errorf("%v of %d bytes", t, n)
	}
	if p, err = d.r.take(n); err != nil {
		return endOf(err, 1)
	}
	m.Type = t
	switch t {
	case RPShut, RPPong, RPResumeAck:
		m.Value = be.Uint32(p)
		return nil
	case RPReqPagesID, RPReqPages:
		err = d.request(m, p)
	case RPRecvBitmap:
		err = d.recvBitmap(m, p)
	}
	if err != nil {
		return fmt.Errorf("%v: %w", t, err)
	}
	return nil
}

// request reads a demand for pages; they must lie in a block.
func (d *RPDecoder) request(m *RPMessage, p []byte) error {
	if len(p) < 12 {
		return fmt.Errorf("%d bytes", len(p))
	}
	m.Start, m.Length = be.Uint64(p), uint64(be.Uint32(p[8:]))
	if m.Type == RPReqPagesID {
		i, err := d.block(p[12:])
		if err != nil {
			return err
		}
		d.last = i
	}
	if d.last < 0 {
		return errors.New("no block was named yet")
	}
	m.Block = d.last
	b := &d.blocks[m.Block]
	if !aligned(m.Start, m.Length) || m.Length == 0 || m.Start >= b.Length || m.Length > b.Length-m.Start {
		return fmt.Errorf("impossible range %#x+%#x of block %q, which has %d bytes", m.Start, m.Length, b.Name, b.Length)
	}
	return nil
}

// recvBitmap reads the answer to RECV_BITMAP. How long the bitmap must be
// follows from the block, so its announced length is only compared.
func (d *RPDecoder) recvBitmap(m *RPMessage, p []byte) error {
	i, err := d.block(p)
	if err != nil {
		return err
	}
	if p, err = d.r.take(8); err != nil {
		return endOf(err, 1)
	}
	b := &d.blocks[i]
	want := bitmapBytes(b.Length)
	if n := be.Uint64(p); n != want {
		return fmt.Errorf("bitmap of %d bytes for block %q, which needs %d", n, b.Name, want)
	}
	if d.bitmap, err = d.r.takeLarge(d.bitmap, int(want)); err != nil {
		return endOf(err, 1)
	}
	if p, err = d.r.take(8); err != nil {
		return endOf(err, 1)
	}
	if end := be.Uint64(p); end != recvBitmapTrailer {
		return fmt.Errorf("bitmap of block %q ends with %#x", b.Name, end)
	}
	m.Block, m.Bitmap = i, d.bitmap
	return nil
}

// block reads the name of a block, which must fill p.
func (d *RPDecoder) block(p []byte) (int, error) {
	name, rest, ok := cutName(p)
	if !ok || len(rest) > 0 {
		return 0, errors.New("malformed block name")
	}
	i, ok := d.index[string(name)]
	if !ok {
		return 0, fmt.Errorf("unknown block %q", name)
	}
	return i, nil
}

// bitmapBytes is the length of the bitmap of a block: a bit per page, in whole
// words of 64 bits.
func bitmapBytes(length uint64) uint64 {
	return (length/pages.Size + 63) / 64 * 8
}
