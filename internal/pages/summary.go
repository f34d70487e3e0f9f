// SPDX-License-Identifier: Apache-2.0

package pages

import "math/bits"

// summary is a set of small numbers with fast neighbours: a bit per number, over it a
// bit per non-empty word, and so on up to a single word. For the 2^22 words of a
// bitmap of 1 TiB it has four levels, so a search reads at most seven words.
type summary struct {
	levels [][]uint64
}

func newSummary(n uint64) summary {
	var s summary
	for {
		n = (n + 63) / 64
		s.levels = append(s.levels, make([]uint64, n))
		if n <= 1 {
			return s
		}
	}
}

func (s *summary) set(i uint64) {
	for _, level := range s.levels {
		word := &level[i/64]
		had := *word
		if *word |= 1 << (i % 64); had != 0 {
			return
		}
		i /= 64
	}
}

func (s *summary) clear(i uint64) {
	for _, level := range s.levels {
		word := &level[i/64]
		if *word &^= 1 << (i % 64); *word != 0 {
			return
		}
		i /= 64
	}
}

// next returns the smallest member >= i.
func (s *summary) next(i uint64) (uint64, bool) {
	for k := range s.levels {
		if i/64 >= uint64(len(s.levels[k])) {
			return 0, false
		}
		if w := s.levels[k][i/64] >> (i % 64); w != 0 {
			i += uint64(bits.TrailingZeros64(w))
			for ; k > 0; k-- {
				i = i*64 + uint64(bits.TrailingZeros64(s.levels[k-1][i]))
			}
			return i, true
		}
		i = i/64 + 1
	}
	return 0, false
}

// prev returns the largest member <= i, which must be within the set's bounds.
func (s *summary) prev(i uint64) (uint64, bool) {
	for k := range s.levels {
		if w := s.levels[k][i/64] << (63 - i%64); w != 0 {
			i -= uint64(bits.LeadingZeros64(w))
			for ; k > 0; k-- {
				i = i*64 + 63 - uint64(bits.LeadingZeros64(s.levels[k-1][i]))
			}
			return i, true
		}
		if i /= 64; i == 0 {
			return 0, false
		}
		i--
	}
	return 0, false
}

func (s *summary) bytes() uint64 {
	var n uint64
	for _, level := range s.levels {
		n += 8 * uint64(len(level))
	}
	return n
}
