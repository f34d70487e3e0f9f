// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sync/atomic"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// The arena file; see the package comment.
const (
	extentSlots = 1024
	descBytes   = 32
	extentDesc  = extentSlots * descBytes
	extentBody  = extentSlots * pages.Size
	tailBytes   = wire.MaxSealed - pages.Size
	minSealed   = wire.Overhead + 1

	descBase = 4096
	bodyBase = 1 << 36
	// maxExtents bounds one session to 4 TiB, and its descriptors to half of what
	// lies before bodyBase.
	maxExtents = 1 << 20
)

// What is charged to the budget beyond the bytes in the arena: the index on the heap,
// at most 21.4 bytes a page (see table), and what every session takes.
const (
	indexBytes   = 24
	extentCost   = extentBody + extentDesc + extentSlots*indexBytes
	sessionFixed = descBase + 64<<10
)

// maxPages bounds page numbers: no VM has more.
const maxPages = pages.MaxBytes / pages.Size

// descriptor says what a slot holds. It lies in the mapped part of the arena. Its
// words are written in the order page, tail, meta when the slot becomes live.
type descriptor struct {
	meta atomic.Uint64
	page atomic.Uint64
	tail [2]atomic.Uint64
}

// meta is the word that makes a descriptor live, and 0 of a dead one: from the low
// end 16 bits version, 16 bits length of the sealed page, 8 bits encoding, 8 bits
// slotLive, and 16 bits that differ each time a slot is filled.
type meta uint64

const slotLive = 0xa7

func makeMeta(v pages.Version, length int, e wire.Encoding, turn uint16) meta {
	return meta(v) | meta(length)<<16 | meta(e)<<32 | slotLive<<40 | meta(turn)<<48
}

func (m meta) version() pages.Version  { return pages.Version(m) }
func (m meta) length() int             { return int(uint16(m >> 16)) }
func (m meta) encoding() wire.Encoding { return wire.Encoding(m >> 32) }

// check tells whether a descriptor found in a file can be one that put wrote.
func (m meta) check(page uint64) error {
	switch {
	case byte(m>>40) != slotLive:
		return fmt.Errorf("state %#x", byte(m>>40))
	case m.length() < minSealed || m.length() > wire.MaxSealed:
		return fmt.Errorf("sealed page of %d bytes, want %d to %d", m.length(), minSealed, wire.MaxSealed)
	case page >= maxPages:
		return fmt.Errorf("page %d, want less than %d", page, uint64(maxPages))
	}
	return nil
}

// header is the part of the arena's first page that never changes.
type header struct {
	migration     wire.MigrationID
	session       wire.Session
	owner, reader wire.Identity
}

// The first page of an arena. Words in it that change are atomics at fixed offsets.
const (
	headerMagic  = "SGARENA\x00"
	headerFormat = 1
	headerFixed  = 8 + 4*4 + 16 + 16 + 2*(2+wire.MaxIdentity) + 4

	wordExtents = 2048 // capacity in extents
	wordPhase   = 2056
	wordGrace   = 2064 // what the source asked for, in seconds
)

var errHeader = errors.New("no arena of this format")

// append writes the header in headerFixed bytes.
func (h *header) append(dst []byte) []byte {
	start := len(dst)
	dst = append(dst, headerMagic...)
	for _, word := range headerShape {
		dst = binary.LittleEndian.AppendUint32(dst, word)
	}
	dst = append(dst, h.migration[:]...)
	dst = append(dst, h.session[:]...)
	for _, name := range []wire.Identity{h.owner, h.reader} {
		dst = binary.LittleEndian.AppendUint16(dst, uint16(len(name)))
		dst = append(dst, name...)
		dst = append(dst, make([]byte, wire.MaxIdentity-len(name))...)
	}
	return binary.LittleEndian.AppendUint32(dst, crc32.ChecksumIEEE(dst[start:]))
}

// wordIn reads one of the words that change from the first page of an arena.
func wordIn(page []byte, offset int) uint64 { return binary.NativeEndian.Uint64(page[offset:]) }

// headerShape is what both sides must agree on for the rest of the file to make sense.
var headerShape = [4]uint32{headerFormat, descBytes, pages.Size, extentSlots}

// parseHeader reads what append wrote. All bytes are checked: the file may be of
// another version, cut short, or made by somebody else.
func parseHeader(b []byte) (header, error) {
	var h header
	if len(b) < headerFixed || string(b[:8]) != headerMagic {
		return h, fmt.Errorf("%w: the magic bytes are missing", errHeader)
	}
	b = b[:headerFixed]
	if sum := binary.LittleEndian.Uint32(b[headerFixed-4:]); sum != crc32.ChecksumIEEE(b[:headerFixed-4]) {
		return h, fmt.Errorf("%w: the header's checksum does not match", errHeader)
	}
	b = b[8:]
	for _, want := range headerShape {
		if got := binary.LittleEndian.Uint32(b); got != want {
			return h, fmt.Errorf("%w: format, descriptor, page or extent of %d, want %d", errHeader, got, want)
		}
		b = b[4:]
	}
	b = b[copy(h.migration[:], b):]
	b = b[copy(h.session[:], b):]
	for _, name := range []*wire.Identity{&h.owner, &h.reader} {
		n := int(binary.LittleEndian.Uint16(b))
		field := b[2 : 2+wire.MaxIdentity]
		if n == 0 || n > len(field) || len(bytes.Trim(field[n:], "\x00")) != 0 {
			return h, fmt.Errorf("%w: a node's name of %d bytes, want 1 to %d", errHeader, n, wire.MaxIdentity)
		}
		*name = wire.Identity(field[:n])
		b = b[2+wire.MaxIdentity:]
	}
	return h, nil
}

// checkNames refuses names that a header cannot hold.
func checkNames(names ...wire.Identity) error {
	for _, name := range names {
		if len(name) == 0 || len(name) > wire.MaxIdentity {
			return fmt.Errorf("%w: node name of %d bytes, want 1 to %d", ErrInvalid, len(name), wire.MaxIdentity)
		}
	}
	return nil
}
