// SPDX-License-Identifier: Apache-2.0

package guest

// PageSize is the size in bytes of a page of the guest.
const PageSize = 4096

// PageWords is the number of 64-bit words of a page.
const PageWords = PageSize / 8

// Page is one page of the guest's memory.
type Page [PageWords]uint64

// Kind says what a page that was never dirtied holds.
type Kind uint8

// The kinds of pages. A zero page that is dirtied holds random content from
// then on; pages of the other kinds keep theirs, with another seed.
const (
	Random Kind = iota
	Compressible
	Duplicate
	Zero
)

// duplicates is the number of distinct contents that all Duplicate pages share.
const duplicates = 16

// Pattern gives the content that every page must have. It is a pure function of
// the page's number and generation, so neither side keeps a copy.
type Pattern struct {
	Seed uint64
	Mix  Mix
}

// Kind is the kind of a page, drawn by hashing its number.
func (p Pattern) Kind(page uint32) Kind {
	draw := int(mix64(p.Seed^uint64(page)*0x9e3779b97f4a7c15) % 100)
	for kind, share := range p.Mix {
		if draw < share {
			return Kind(kind)
		}
		draw -= share
	}
	return Zero
}

// Fill writes the content of a page at a generation.
func (p Pattern) Fill(dst *Page, page, generation uint32) {
	first, period := p.stream(page, generation)
	if first == 0 {
		*dst = Page{}
		return
	}
	for base := 0; base < PageWords; base += period {
		state := first
		run := dst[base : base+period]
		for i := range run {
			state = next(state)
			run[i] = state
		}
	}
}

// Check compares a page with the content it must have at a generation and gives
// the index of the first word that differs, or -1, and the word it should be.
func (p Pattern) Check(got *Page, page, generation uint32) (word int, want uint64) {
	first, period := p.stream(page, generation)
	if first == 0 {
		for i, w := range got {
			if w != 0 {
				return i, 0
			}
		}
		return -1, 0
	}
	for base := 0; base < PageWords; base += period {
		state := first
		run := got[base : base+period]
		for i, w := range run {
			state = next(state)
			if w != state {
				return base + i, state
			}
		}
	}
	return -1, 0
}

// stream gives the state from which a page's words are drawn and after how many
// words they repeat; state 0 means a page of zeros.
func (p Pattern) stream(page, generation uint32) (state uint64, period int) {
	key, period := uint64(generation)<<32|uint64(page), PageWords
	switch p.Kind(page) {
	case Zero:
		if generation == 0 {
			return 0, PageWords
		}
	case Compressible:
		period = PageWords / 16
	case Duplicate:
		key = uint64(page+generation) % duplicates
	}
	return mix64(key^p.Seed) | 1, period
}

// next is one step of xorshift64: cheap, and incompressible to every usual
// compressor.
func next(x uint64) uint64 {
	x ^= x << 13
	x ^= x >> 7
	x ^= x << 17
	return x
}

// mix64 is the finaliser of splitmix64: every bit of x changes every bit of the
// result.
func mix64(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}
