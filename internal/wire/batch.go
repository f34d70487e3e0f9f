// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"scattergather.io/scattergather/internal/pages"
)

// Desc describes one page of a Pages frame.
type Desc struct {
	// Index and Version name the page's content for the life of the migration.
	Index   pages.Index
	Version pages.Version
	// Length is the size of the sealed page in bytes: Overhead more than what was
	// sealed, at most MaxSealed; 0 if Missing.
	Length uint16
	// Encoding of the page under its seal.
	Encoding Encoding
	// Missing is true in answers to Read, for a page that the holder does not have
	// in that version.
	Missing bool
}

const (
	// descSize is the size of a descriptor: index 8, version 2, length 2, encoding 1,
	// flags 1, and 2 that are 0.
	descSize = 16
	// entrySize is the size of a descriptor followed by a copy of the page's tag, on
	// lanes whose cipher covers the tags instead of the pages.
	entrySize = descSize + Overhead

	descMissing = 1 // flag

	maxPagesBody = MaxBatch * (MaxSealed + entrySize)
)

// Batch is one Pages frame under construction: sealed pages in one buffer of about
// 264 KiB, filled without allocating and written by one system call. It stays intact
// when sent, so that it can be sent again, on another lane or to another holder, until
// it is acknowledged. It is not safe for concurrent use.
type Batch struct {
	// Seq is the sequence number that the next SendBatch gives the frame. It must
	// be unique among the unanswered frames of a lane; in an answer to Read it is
	// the number of the Read.
	Seq uint64

	n     int
	descs [MaxBatch]Desc
	// buf is the frame's header, then the sealed pages. Its spare capacity has room
	// for a full frame; SendBatch builds the trailer there.
	buf   []byte
	nonce [12]byte
}

// NewBatch returns an empty batch.
func NewBatch() *Batch {
	return &Batch{buf: make([]byte, headerSize, headerSize+maxPagesBody+tagSize)}
}

// Reset empties the batch and sets its sequence number.
func (b *Batch) Reset(seq uint64) {
	b.Seq, b.n, b.buf = seq, 0, b.buf[:headerSize]
}

// Append seals page, 1 to pages.Size bytes in the given encoding, and adds it. It
// reports false, and does nothing, when the batch is full or page has no such size.
func (b *Batch) Append(s *Sealer, i pages.Index, v pages.Version, e Encoding, page []byte) bool {
	if b.n == MaxBatch || len(page) == 0 || len(page) > pages.Size {
		return false
	}
	setNonce(&b.nonce, i, v, e)
	b.buf = s.aead.Seal(b.buf, b.nonce[:], page, nil)
	b.add(Desc{Index: i, Version: v, Encoding: e, Length: uint16(len(page) + Overhead)})
	return true
}

// AppendSealed adds a page that was sealed before, as intermediaries do. The length of
// sealed counts, not d.Length. It reports false, and does nothing, when the batch is
// full or sealed is no sealed page of 1 to pages.Size bytes.
func (b *Batch) AppendSealed(d Desc, sealed []byte) bool {
	if b.n == MaxBatch || len(sealed) <= Overhead || len(sealed) > MaxSealed {
		return false
	}
	b.buf = append(b.buf, sealed...)
	d.Length, d.Missing = uint16(len(sealed)), false
	b.add(d)
	return true
}

// AppendMissing adds the answer that page i is not held in version v. It reports
// false, and does nothing, when the batch is full.
func (b *Batch) AppendMissing(i pages.Index, v pages.Version) bool {
	if b.n == MaxBatch {
		return false
	}
	b.add(Desc{Index: i, Version: v, Missing: true})
	return true
}

func (b *Batch) add(d Desc) {
	b.descs[b.n] = d
	b.n++
}

// Len returns the number of pages in the batch.
func (b *Batch) Len() int { return b.n }

// Full reports whether the batch holds MaxBatch pages.
func (b *Batch) Full() bool { return b.n == MaxBatch }

// Payload returns the size of the sealed pages in bytes, which is what Credit and
// Reserve count.
func (b *Batch) Payload() int { return len(b.buf) - headerSize }

// Bytes returns the size of the frame in bytes, as it takes from a link's rate; on some
// lanes it is some hundred bytes less.
func (b *Batch) Bytes() int { return len(b.buf) + b.n*entrySize + tagSize }

// Each calls fn for every page in order of Append until fn fails, and returns fn's
// error. The sealed page is valid until the next Reset.
func (b *Batch) Each(fn func(d Desc, sealed []byte) error) error {
	rest := b.buf[headerSize:]
	for _, d := range b.descs[:b.n] {
		if err := fn(d, rest[:d.Length:d.Length]); err != nil {
			return err
		}
		rest = rest[d.Length:]
	}
	return nil
}

// appendEntries appends the trailer of the frame: the descriptors, each with the tag of
// its page if tags is true. dst has the room.
func (b *Batch) appendEntries(dst []byte, tags bool) []byte {
	rest := b.buf[headerSize:]
	for i := range b.descs[:b.n] {
		d := &b.descs[i]
		flags := byte(0)
		if d.Missing {
			flags = descMissing
		}
		dst = binary.BigEndian.AppendUint64(dst, uint64(d.Index))
		dst = binary.BigEndian.AppendUint16(dst, uint16(d.Version))
		dst = binary.BigEndian.AppendUint16(dst, d.Length)
		dst = append(dst, byte(d.Encoding), flags, 0, 0)
		if tags {
			dst = append(dst, tagOf(rest[:d.Length])...)
		}
		rest = rest[d.Length:]
	}
	return dst
}

var noTag [Overhead]byte

// tagOf returns the tag at the end of a sealed page, zeros for a missing one.
func tagOf(sealed []byte) []byte {
	if len(sealed) == 0 {
		return noTag[:]
	}
	return sealed[len(sealed)-Overhead:]
}

// PageFrame is the checked content of a received Pages frame. It aliases the Frame.
type PageFrame struct {
	sealed  []byte
	entries []byte
	stride  int // size of an entry: descSize or entrySize
}

// parsePages checks a body of n pages: sealed pages, then their entries.
func parsePages(body []byte, n, stride int) (PageFrame, error) {
	if n == 0 || n > MaxBatch {
		return PageFrame{}, fmt.Errorf("%w: Pages: %d pages, 1 to %d allowed", ErrProtocol, n, MaxBatch)
	}
	split := len(body) - n*stride
	if split < 0 {
		return PageFrame{}, fmt.Errorf("%w: Pages: %d descriptors do not fit into %d bytes", ErrProtocol, n, len(body))
	}
	p := PageFrame{sealed: body[:split], entries: body[split:], stride: stride}
	rest := p.sealed
	for k := range n {
		e := p.entries[k*stride : (k+1)*stride]
		d := parseDesc(e)
		if err := d.check(e, len(rest)); err != nil {
			return PageFrame{}, fmt.Errorf("%w: Pages: page %d, number %d of %d: %w", ErrProtocol, d.Index, k, n, err)
		}
		if stride == entrySize && !bytes.Equal(e[descSize:], tagOf(rest[:d.Length])) {
			return PageFrame{}, fmt.Errorf("%w: Pages: page %d, number %d of %d: its tag was changed", ErrProtocol, d.Index, k, n)
		}
		rest = rest[d.Length:]
	}
	if len(rest) != 0 {
		return PageFrame{}, fmt.Errorf("%w: Pages: %d bytes belong to no page", ErrProtocol, len(rest))
	}
	return p, nil
}

func parseDesc(e []byte) Desc {
	return Desc{
		Index:    pages.Index(binary.BigEndian.Uint64(e)),
		Version:  pages.Version(binary.BigEndian.Uint16(e[8:])),
		Length:   binary.BigEndian.Uint16(e[10:]),
		Encoding: Encoding(e[12]),
		Missing:  e[13] == descMissing,
	}
}

// check is for a received descriptor d in entry e, with left bytes of pages behind it.
func (d *Desc) check(e []byte, left int) error {
	switch n := int(d.Length); {
	case e[13] > descMissing || e[14] != 0 || e[15] != 0:
		return fmt.Errorf("flags %x are not known", e[13:16])
	case d.Missing && n != 0:
		return fmt.Errorf("%d bytes of a page that is missing", n)
	case !d.Missing && (n <= Overhead || n > MaxSealed):
		return fmt.Errorf("%d bytes, %d to %d allowed", n, Overhead+1, MaxSealed)
	case n > left:
		return fmt.Errorf("%d bytes, %d left", n, left)
	}
	return nil
}

// Len returns the number of pages, 1 to MaxBatch.
func (p PageFrame) Len() int {
	if p.stride == 0 {
		return 0
	}
	return len(p.entries) / p.stride
}

// Payload returns the size of the sealed pages in bytes.
func (p PageFrame) Payload() int { return len(p.sealed) }

// Each calls fn for every page in the sender's order until fn fails, and returns fn's
// error. A missing page comes with no bytes.
func (p PageFrame) Each(fn func(d Desc, sealed []byte) error) error {
	rest := p.sealed
	for k := range p.Len() {
		d := parseDesc(p.entries[k*p.stride:])
		if err := fn(d, rest[:d.Length:d.Length]); err != nil {
			return err
		}
		rest = rest[d.Length:]
	}
	return nil
}
