// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"crypto/cipher"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"slices"
)

// coverage says what the cipher of a lane protects of a Pages frame besides its header
// and descriptors. docs/protocol.md argues why each is enough.
type coverage uint8

const (
	// coverTags protects the tag of each page. The receiver opens the pages, which
	// protects them in turn, so they need not be hashed twice.
	coverTags coverage = iota
	// coverPages protects the pages themselves, for a receiver that cannot open
	// them but vouches for them with an acknowledgement.
	coverPages
)

// coverage returns what the lanes of a conversation use, in both directions.
func (r Role) coverage() coverage {
	if r == SourceToIntermediary {
		return coverPages
	}
	return coverTags
}

func (c coverage) stride() int {
	if c == coverPages {
		return descSize
	}
	return entrySize
}

// frameCipher protects the frames of one direction of one lane with AES-128-GCM under
// a key that is used for nothing else. The nonce is the number of the frame, which is
// not sent: a frame that was dropped, repeated or reordered does not open.
//
// The body of a frame is encrypted, except for sealed pages, which are already. It is
// not safe for concurrent use.
type frameCipher struct {
	aead     cipher.AEAD
	coverage coverage
	frames   uint64 // sealed or opened so far
	nonce    [12]byte
}

func newFrameCipher(key Key, c coverage) *frameCipher {
	return &frameCipher{aead: newGCM(key), coverage: c}
}

func (c *frameCipher) next() []byte {
	// 2^64 frames are out of reach; no lane lives that long.
	binary.BigEndian.PutUint64(c.nonce[4:], c.frames)
	c.frames++
	return c.nonce[:]
}

// seal protects a frame in place: head is the header and, in a Pages frame, the sealed
// pages; the secret bytes lie right behind it. It returns the whole frame, which is
// tagSize longer; a frame with that much spare capacity stays where it is.
func (c *frameCipher) seal(frame []byte, head int) []byte {
	frame = slices.Grow(frame, tagSize)
	out := c.aead.Seal(frame[head:head], c.next(), frame[head:], c.covered(frame, head))
	return frame[:head+len(out)]
}

// open undoes seal in place and returns the frame without its tag.
func (c *frameCipher) open(frame []byte, head int) ([]byte, error) {
	out, err := c.aead.Open(frame[head:head], c.next(), frame[head:], c.covered(frame, head))
	if err != nil {
		return nil, fmt.Errorf("%w: the frame was changed, repeated or reordered on its way", ErrProtocol)
	}
	return frame[:head+len(out)], nil
}

func (c *frameCipher) covered(frame []byte, head int) []byte {
	if c.coverage == coverTags {
		head = headerSize
	}
	return frame[:head]
}

// exporterLabel separates the keys of lanes from other uses of the TLS exporter
// (RFC 8446 section 7.5).
const exporterLabel = "EXPORTER-scattergather-lane"

// laneKey derives the key of one direction of one lane from the TLS session of the
// control lane.
func laneKey(s *tls.ConnectionState, kind LaneKind, number int, fromDialler bool) (k Key, err error) {
	context := []byte{Version, byte(kind), byte(number), 0}
	if fromDialler {
		context[3] = 1
	}
	material, err := s.ExportKeyingMaterial(exporterLabel, context, len(k))
	if err != nil {
		return k, fmt.Errorf("deriving the key of a lane: %w", err)
	}
	copy(k[:], material)
	return k, nil
}
