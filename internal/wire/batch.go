// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"errors"

	"scattergather.io/scattergather/internal/pages"
)

// Encoding says how a page's bytes were made before they were sealed.
type Encoding uint8

// EncodingRaw is the page as it is.
const EncodingRaw Encoding = 0

// Desc describes one page of a Pages frame.
type Desc struct {
	// Index and Version name the page's content for the life of the migration.
	Index   pages.Index
	Version pages.Version
	// Encoding of the page under its seal.
	Encoding Encoding
	// Missing is true in answers to Read, for a page that the holder does not have
	// in that version. Its Length is 0.
	Missing bool
	// Length is the size of the sealed page in bytes: Overhead more than what was
	// sealed, at most MaxSealed.
	Length uint16
}

const (
	// Overhead is what sealing adds to a page in bytes.
	Overhead = 16
	// MaxSealed is the size of the largest sealed page in bytes.
	MaxSealed = pages.Size + Overhead
)

// Batch is one Pages frame under construction: descriptors and sealed pages in one
// buffer of about 264 KiB, filled without allocating and written by one system call.
// It stays intact when sent, so that it can be sent again, on another lane or to
// another holder, until it is acknowledged. It is not safe for concurrent use.
type Batch struct {
	// Seq is the sequence number that the next SendBatch gives the frame. It must
	// be unique among the unanswered frames of a lane; in an answer to Read it is
	// the number of the Read.
	Seq uint64

	n   int
	buf []byte
}

// NewBatch returns an empty batch.
func NewBatch() *Batch { return &Batch{} }

// Reset empties the batch and sets its sequence number.
func (b *Batch) Reset(seq uint64) { b.Seq, b.n = seq, 0 }

// Append seals page, at most pages.Size bytes in the given encoding, and adds it. It
// reports false, and does nothing, when the batch is full.
func (b *Batch) Append(s *Sealer, i pages.Index, v pages.Version, e Encoding, page []byte) bool {
	return false
}

// AppendSealed adds a page that was sealed before, as intermediaries do. d.Length is
// ignored, the length of sealed counts. It reports false, and does nothing, when the
// batch is full or sealed is larger than MaxSealed.
func (b *Batch) AppendSealed(d Desc, sealed []byte) bool { return false }

// AppendMissing adds the answer that page i is not held in version v. It reports
// false, and does nothing, when the batch is full.
func (b *Batch) AppendMissing(i pages.Index, v pages.Version) bool { return false }

// Len returns the number of pages in the batch.
func (b *Batch) Len() int { return b.n }

// Full reports whether the batch holds MaxBatch pages.
func (b *Batch) Full() bool { return b.n == MaxBatch }

// Bytes returns the size of the frame in bytes, as it takes from a link's rate.
func (b *Batch) Bytes() int { return len(b.buf) }

// Each calls fn for every page in order of Append until fn fails, and returns fn's
// error. The sealed page is valid until the next Reset.
func (b *Batch) Each(fn func(d Desc, sealed []byte) error) error { return nil }

// PageFrame is the checked content of a received Pages frame. It aliases the Frame.
type PageFrame struct {
	descs, sealed []byte
}

// Len returns the number of pages, 1 to MaxBatch.
func (p PageFrame) Len() int { return 0 }

// Each calls fn for every page in the sender's order until fn fails, and returns
// fn's error.
func (p PageFrame) Each(fn func(d Desc, sealed []byte) error) error { return nil }

// Key is the key under which the pages of one migration are sealed. Only its source
// and its destination know it.
type Key [16]byte

// NewKey returns a random key.
func NewKey() Key { return Key{} }

// String hides the key from logs.
func (Key) String() string { return "key(hidden)" }

// Sealer seals and opens pages with AES-128-GCM. The nonce is made of the page's
// index, version and encoding, so a page opens only as exactly what it was sealed
// as. For one key, one page and one version, there must never be two contents. A
// Sealer is safe for concurrent use and does not allocate.
type Sealer struct{}

// NewSealer returns a Sealer for a key.
func NewSealer(key Key) *Sealer { return &Sealer{} }

// Seal appends the sealed page to dst, Overhead bytes more than page.
func (s *Sealer) Seal(dst, page []byte, i pages.Index, v pages.Version, e Encoding) []byte {
	return dst
}

// Open appends the page to dst. Its error is ErrSealed and dst is then unchanged up
// to its length. dst and sealed must not overlap, except that dst may be sealed[:0].
func (s *Sealer) Open(dst, sealed []byte, i pages.Index, v pages.Version, e Encoding) ([]byte, error) {
	return dst, errors.New("not built yet")
}
