// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"fmt"
	"math/bits"
	"sync"
)

// slots says which slots of an arena are taken. Low ones are given out first.
type slots struct {
	mu      sync.Mutex
	extents []extent
	// room has a bit for every extent that has a slot to give, grown or not.
	room []uint64
	// low is the first word of room that may have a bit set.
	low   int
	taken uint64
	grown uint64
	// grow and drop get and give back the memory of an extent's descriptors.
	grow func(extent int) error
	drop func(extent int)
}

type extent struct {
	taken [extentSlots / 64]uint64
	n     uint16
	grown bool
}

// resize sets the number of extents. It gives up only extents that are not grown, and
// returns the number that remains.
func (s *slots) resize(n int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n < len(s.extents) && !s.extents[len(s.extents)-1].grown {
		s.extents = s.extents[:len(s.extents)-1]
		s.setRoom(len(s.extents), false)
	}
	for len(s.extents) < n {
		s.extents = append(s.extents, extent{})
		if len(s.room)*64 < len(s.extents) {
			s.room = append(s.room, 0)
		}
		s.setRoom(len(s.extents)-1, true)
	}
	return len(s.extents)
}

func (s *slots) setRoom(extent int, room bool) {
	word, bit := extent/64, uint64(1)<<(extent%64)
	if room {
		s.room[word] |= bit
		s.low = min(s.low, word)
	} else {
		s.room[word] &^= bit
	}
}

// first returns the first extent with a slot to give.
func (s *slots) first() (extent int, ok bool) {
	for ; s.low < len(s.room); s.low++ {
		if w := s.room[s.low]; w != 0 {
			return s.low*64 + bits.TrailingZeros64(w), true
		}
	}
	return 0, false
}

// take fills dst with slots, in runs where there are some. When slots run out or an
// extent cannot be grown, it takes nothing and returns ErrFull or grow's error.
func (s *slots) take(dst []uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for got := 0; got < len(dst); {
		e, err := s.roomy()
		if err != nil {
			s.clear(dst[:got])
			return err
		}
		got += s.takeFrom(e, dst[got:])
	}
	return nil
}

// roomy returns a grown extent with a slot to give.
func (s *slots) roomy() (int, error) {
	e, ok := s.first()
	if !ok {
		return 0, fmt.Errorf("%w: all %d slots are taken", ErrFull, s.taken)
	}
	if s.extents[e].grown {
		return e, nil
	}
	if err := s.grow(e); err != nil {
		return 0, err
	}
	s.extents[e].grown = true
	s.grown++
	return e, nil
}

func (s *slots) takeFrom(e int, dst []uint32) (got int) {
	x := &s.extents[e]
	for w := range x.taken {
		for free := ^x.taken[w]; free != 0 && got < len(dst); free &= free - 1 {
			b := bits.TrailingZeros64(free)
			x.taken[w] |= 1 << b
			dst[got] = uint32(e*extentSlots + w*64 + b)
			got++
		}
	}
	x.n += uint16(got)
	s.taken += uint64(got)
	if x.n == extentSlots {
		s.setRoom(e, false)
	}
	return got
}

// adopt makes an extent grown that has its memory, as found in an arena's file.
func (s *slots) adopt(e int) {
	s.extents[e].grown = true
	s.grown++
}

// claim takes one certain slot of a grown extent.
func (s *slots) claim(slot uint32) {
	e, w, b := slot/extentSlots, slot%extentSlots/64, slot%64
	x := &s.extents[e]
	x.taken[w] |= 1 << b
	x.n++
	s.taken++
	if x.n == extentSlots {
		s.setRoom(int(e), false)
	}
}

// tidy calls punch for the slots of an extent that are not taken, and drops it if none
// is.
func (s *slots) tidy(e int, punch func(slot uint32, n int)) {
	x := &s.extents[e]
	for slot := 0; slot < extentSlots; {
		n := 0
		for slot+n < extentSlots && x.taken[(slot+n)/64]>>((slot+n)%64)&1 == 0 {
			n++
		}
		if n > 0 {
			punch(uint32(e*extentSlots+slot), n)
		}
		slot += n + 1
	}
	if x.n == 0 {
		s.ungrow(e)
	}
}

func (s *slots) ungrow(e int) {
	s.drop(e)
	s.extents[e].grown = false
	s.grown--
}

// give gives back slots whose bodies are punched already.
func (s *slots) give(slots []uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clear(slots)
}

func (s *slots) clear(slots []uint32) {
	for _, slot := range slots {
		e := int(slot / extentSlots)
		x := &s.extents[e]
		x.taken[slot%extentSlots/64] &^= 1 << (slot % 64)
		x.n--
		s.taken--
		s.setRoom(e, true)
		if x.n == 0 {
			s.ungrow(e)
		}
	}
}

// count returns the number of taken slots and of grown extents.
func (s *slots) count() (taken, grown uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.taken, s.grown
}
