// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

func drawCandidates(t *rapid.T) []candidate {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) candidate {
		return candidate{
			alive:       rapid.Bool().Draw(t, "alive"),
			room:        rapid.IntRange(-1<<20, 1<<20).Draw(t, "room"),
			outstanding: rapid.IntRange(0, 1<<20).Draw(t, "outstanding"),
			left:        rapid.Uint64Range(0, 1<<20).Draw(t, "left"),
			finish:      time.Duration(rapid.IntRange(0, 20).Draw(t, "finish")) * time.Millisecond,
		}
	}), 0, 8).Draw(t, "holders")
}

// The rules of placement hold for any state of any number of holders.
func TestChooseKeepsTheRules(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		holders := drawCandidates(t)
		size := rapid.IntRange(1, 300<<10).Draw(t, "size")
		got := choose(holders, size)
		if got == nowhere {
			for i := range holders {
				if holders[i].takes(size) {
					t.Fatalf("nowhere although holder %d takes %d bytes: %+v", i, size, holders[i])
				}
			}
			return
		}
		c := holders[got]
		if !c.alive || c.left < uint64(size) || (c.room < size && c.outstanding > 0) {
			t.Fatalf("holder %d may not take %d bytes: %+v", got, size, c)
		}
		if got > 0 && holders[0].takes(size) {
			t.Fatalf("intermediary %d chosen although the destination has room", got)
		}
		for i := 1; i < len(holders) && got > 0; i++ {
			if holders[i].takes(size) && holders[i].finish < c.finish {
				t.Fatalf("holder %d (%v) chosen although %d finishes in %v", got, c.finish, i, holders[i].finish)
			}
		}
	})
}

// Making the chosen holder better never makes the choice go elsewhere.
func TestChooseIsMonotone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		holders := drawCandidates(t)
		size := rapid.IntRange(1, 300<<10).Draw(t, "size")
		got := choose(holders, size)
		if got == nowhere {
			return
		}
		holders[got].room += 1000
		holders[got].left += 1000
		holders[got].finish /= 2
		if again := choose(holders, size); again != got {
			t.Fatalf("choice moved from %d to %d when %d got better", got, again, got)
		}
	})
}

// Equal intermediaries share the load instead of the first taking all of it.
func TestChooseSpreadsOverEquals(t *testing.T) {
	holders := make([]candidate, 5)
	for i := range holders {
		holders[i] = candidate{alive: i > 0, room: 1 << 30, left: 1 << 30}
	}
	count := make([]int, len(holders))
	for range 400 {
		i := choose(holders, 1000)
		count[i]++
		holders[i].outstanding += 1000
	}
	for i, n := range count[1:] {
		if n != 100 {
			t.Errorf("intermediary %d took %d of 400 batches, want 100", i+1, n)
		}
	}
}

func TestChooseDoesNotAllocate(t *testing.T) {
	holders := make([]candidate, 64)
	for i := range holders {
		holders[i] = candidate{alive: true, room: i, left: 1 << 20, outstanding: 1, finish: time.Duration(i)}
	}
	if n := testing.AllocsPerRun(100, func() { choose(holders, 4096) }); n != 0 {
		t.Errorf("choose allocates %v times", n)
	}
}
