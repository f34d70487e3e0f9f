// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"sync"

	"scattergather.io/scattergather/internal/pages"
)

// Key is the key under which the pages of one migration are sealed. Only its source
// and its destination know it.
type Key [16]byte

// NewKey returns a random key.
func NewKey() (k Key) {
	rand.Read(k[:]) // never fails: it crashes the process instead
	return k
}

// Format writes a placeholder, whatever the verb: a key must not get into logs.
func (Key) Format(w fmt.State, _ rune) { _, _ = io.WriteString(w, "key(hidden)") }

// Encoding says how a page's bytes were made before they were sealed.
type Encoding uint8

// EncodingRaw is the page as it is.
const EncodingRaw Encoding = 0

const (
	// Overhead is what sealing adds to a page in bytes: the tag of AES-GCM.
	Overhead = 16
	// MaxSealed is the size of the largest sealed page in bytes.
	MaxSealed = pages.Size + Overhead
)

// Sealer seals and opens pages with AES-128-GCM. The nonce is made of the page's
// index, version and encoding, so a page opens only as exactly what it was sealed as.
// Under one key, a page and version must never be given two contents: that would use
// one nonce twice and give both contents away. pages.Ledger sees to it. A Sealer is
// safe for concurrent use and does not allocate.
type Sealer struct {
	aead cipher.AEAD
}

// nonces keeps Seal and Open from allocating: a nonce on the stack would be moved to
// the heap, since cipher.AEAD is an interface.
var nonces = sync.Pool{New: func() any { return new([12]byte) }}

// NewSealer returns a Sealer for a key.
func NewSealer(key Key) *Sealer { return &Sealer{aead: newGCM(key)} }

func newGCM(key Key) cipher.AEAD {
	block, err := aes.NewCipher(key[:])
	if err != nil {
		panic("wire: AES-128 takes 16 bytes: " + err.Error())
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic("wire: AES has blocks of 16 bytes: " + err.Error())
	}
	return aead
}

func setNonce(n *[12]byte, i pages.Index, v pages.Version, e Encoding) {
	binary.BigEndian.PutUint64(n[0:], uint64(i))
	binary.BigEndian.PutUint16(n[8:], uint16(v))
	n[10], n[11] = byte(e), 0
}

// Seal appends the sealed page to dst, Overhead bytes more than page. dst's spare
// capacity must not overlap page, except that dst may be page[:0].
func (s *Sealer) Seal(dst, page []byte, i pages.Index, v pages.Version, e Encoding) []byte {
	n := nonces.Get().(*[12]byte)
	setNonce(n, i, v, e)
	dst = s.aead.Seal(dst, n[:], page, nil)
	nonces.Put(n)
	return dst
}

// Open appends the page to dst. Its error is ErrSealed, and then what lies behind
// dst's length is undefined. dst's spare capacity must not overlap sealed, except that
// dst may be sealed[:0].
func (s *Sealer) Open(dst, sealed []byte, i pages.Index, v pages.Version, e Encoding) ([]byte, error) {
	n := nonces.Get().(*[12]byte)
	setNonce(n, i, v, e)
	out, err := s.aead.Open(dst, n[:], sealed, nil)
	nonces.Put(n)
	if err != nil {
		return dst, ErrSealed
	}
	return out, nil
}
