// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

// Bitmap is a set of pages. Counting is O(1), and looking for the next or previous
// page inside or outside the set reads a handful of words however far it lies. It
// takes about 1.03 bits a page.
type Bitmap struct {
	n     uint64
	count uint64
	words []uint64
	some  summary // words that hold a set bit
	open  summary // words that hold a clear bit
}

// NewBitmap returns an empty set for pages 0 to n-1.
func NewBitmap(n uint64) *Bitmap {
	words := (n + 63) / 64
	b := &Bitmap{n: n, words: make([]uint64, words), some: newSummary(words), open: newSummary(words)}
	for w := range words {
		b.open.set(w)
	}
	return b
}

// Len returns the number of pages the set can hold.
func (b *Bitmap) Len() uint64 { return b.n }

// Count returns the number of pages in the set.
func (b *Bitmap) Count() uint64 { return b.count }

// MemoryBytes returns the size of the set in bytes.
func (b *Bitmap) MemoryBytes() uint64 {
	return 8*uint64(len(b.words)) + b.some.bytes() + b.open.bytes()
}

// Test tells whether i is in the set. A page past the end is not.
func (b *Bitmap) Test(i Index) bool {
	return uint64(i) < b.n && b.words[i/64]>>(i%64)&1 != 0
}

// Set adds i. It panics when i is past the end.
func (b *Bitmap) Set(i Index) { b.put(uint64(i), 1, 1) }

// Clear removes i. It panics when i is past the end.
func (b *Bitmap) Clear(i Index) { b.put(uint64(i), 1, 0) }

// SetRange adds n pages from first. It panics when they reach past the end.
func (b *Bitmap) SetRange(first Index, n uint64) { b.fill(first, n, ^uint64(0)) }

// ClearRange removes n pages from first. It panics when they reach past the end.
func (b *Bitmap) ClearRange(first Index, n uint64) { b.fill(first, n, 0) }

func (b *Bitmap) fill(first Index, n uint64, pattern uint64) {
	for at := uint64(first); n > 0; {
		step := min(64-at%64, n)
		b.put(at, step, pattern)
		at, n = at+step, n-step
	}
}

// put replaces n <= 64 bits from at by the low bits of value.
func (b *Bitmap) put(at, n, value uint64) {
	if at >= b.n || n > b.n-at {
		panic(fmt.Sprintf("pages: bit %d of a bitmap of %d", at+n-1, b.n))
	}
	w, shift := at/64, at%64
	mask := ^uint64(0) >> (64 - n)
	b.swap(w, mask<<shift, value<<shift)
	if spill := shift + n; spill > 64 {
		b.swap(w+1, mask>>(64-shift), value>>(64-shift))
	}
}

// swap replaces the bits of a word that mask names and keeps count and summaries.
func (b *Bitmap) swap(w, mask, value uint64) {
	old := b.words[w]
	now := old&^mask | value&mask
	if now == old {
		return
	}
	b.words[w] = now
	b.count += uint64(bits.OnesCount64(now)) - uint64(bits.OnesCount64(old))
	if old == 0 {
		b.some.set(w)
	} else if now == 0 {
		b.some.clear(w)
	}
	if valid := b.valid(w); now == valid {
		b.open.clear(w)
	} else if old == valid {
		b.open.set(w)
	}
}

// valid returns the bits of a word that stand for pages.
func (b *Bitmap) valid(w uint64) uint64 {
	if rest := b.n - w*64; rest < 64 {
		return 1<<rest - 1
	}
	return ^uint64(0)
}

// NextSet returns the first page >= from that is in the set.
func (b *Bitmap) NextSet(from Index) (Index, bool) { return b.next(from, &b.some, 0) }

// NextClear returns the first page >= from that is not in the set.
func (b *Bitmap) NextClear(from Index) (Index, bool) { return b.next(from, &b.open, ^uint64(0)) }

// PrevSet returns the last page <= from that is in the set.
func (b *Bitmap) PrevSet(from Index) (Index, bool) { return b.prev(from, &b.some, 0) }

// PrevClear returns the last page <= from that is not in the set.
func (b *Bitmap) PrevClear(from Index) (Index, bool) { return b.prev(from, &b.open, ^uint64(0)) }

// next looks for a set bit after the words are turned over by flip. Turned over, the
// bits past the end look set, so the words are cut to the valid ones.
func (b *Bitmap) next(from Index, in *summary, flip uint64) (Index, bool) {
	if uint64(from) >= b.n {
		return 0, false
	}
	w := uint64(from) / 64
	if word := (b.words[w] ^ flip) & b.valid(w) >> (from % 64); word != 0 {
		return from + Index(bits.TrailingZeros64(word)), true
	}
	w, ok := in.next(w + 1)
	if !ok {
		return 0, false
	}
	return Index(w*64 + uint64(bits.TrailingZeros64((b.words[w]^flip)&b.valid(w)))), true
}

func (b *Bitmap) prev(from Index, in *summary, flip uint64) (Index, bool) {
	if b.n == 0 {
		return 0, false
	}
	from = min(from, Index(b.n-1))
	w := uint64(from) / 64
	if word := (b.words[w] ^ flip) & b.valid(w) << (63 - from%64); word != 0 {
		return from - Index(bits.LeadingZeros64(word)), true
	}
	if w == 0 {
		return 0, false
	}
	w, ok := in.prev(w - 1)
	if !ok {
		return 0, false
	}
	return Index(w*64 + 63 - uint64(bits.LeadingZeros64((b.words[w]^flip)&b.valid(w)))), true
}

// LoadLittleEndian replaces the n pages from first by the bits of data, bit k of byte
// j standing for page first+8j+k. That is the form in which QEMU sends the received
// pages of one block (ramblock_recv_bitmap_send in migration/ram.c): data must have
// n/8 bytes, rounded up to a multiple of 8; bits past n are ignored.
func (b *Bitmap) LoadLittleEndian(first Index, n uint64, data []byte) error {
	if uint64(first) > b.n || n > b.n-uint64(first) {
		return fmt.Errorf("bitmap of %d pages from page %d of %d: %w", n, first, b.n, ErrRange)
	}
	if want := (n + 63) / 64 * 8; uint64(len(data)) != want {
		return fmt.Errorf("bitmap of %d pages has %d bytes, want %d", n, len(data), want)
	}
	for at := uint64(first); n > 0; data = data[8:] {
		step := min(64, n)
		b.put(at, step, binary.LittleEndian.Uint64(data))
		at, n = at+step, n-step
	}
	return nil
}

// AppendLittleEndian appends the n pages from first in the form that
// LoadLittleEndian reads. It panics when they reach past the end.
func (b *Bitmap) AppendLittleEndian(dst []byte, first Index, n uint64) []byte {
	if uint64(first) > b.n || n > b.n-uint64(first) {
		panic(fmt.Sprintf("pages: %d bits from %d of a bitmap of %d", n, first, b.n))
	}
	for at := uint64(first); n > 0; {
		step := min(64, n)
		w, shift := at/64, at%64
		word := b.words[w] >> shift
		if shift+step > 64 {
			word |= b.words[w+1] << (64 - shift)
		}
		dst = binary.LittleEndian.AppendUint64(dst, word&(^uint64(0)>>(64-step)))
		at, n = at+step, n-step
	}
	return dst
}
