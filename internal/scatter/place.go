// SPDX-License-Identifier: Apache-2.0

package scatter

import "time"

// nowhere is choose's answer when no holder may take the batch now.
const nowhere = -1

// candidate is what choose needs to know of one holder. Holder 0 is always the
// destination, the others are the intermediaries in the order of the plan.
type candidate struct {
	// alive is false for a holder that is lost, refused or was left out.
	alive bool
	// room is how many bytes more may be under way without the queue before the
	// bottleneck growing past its target; it may be negative.
	room int
	// outstanding is the bytes under way that are not acknowledged yet.
	outstanding int
	// left is the bytes that the holder is ready to store: the destination's
	// credit, or what an intermediary reserved less what lies there.
	left uint64
	// finish is the time until the batch would be delivered, at the measured rate.
	finish time.Duration
}

// takes tells whether the holder may be given size bytes now. A holder with
// nothing under way may always be given a batch, or a window smaller than a
// batch would never open.
func (c *candidate) takes(size int) bool {
	return c.alive && c.left >= uint64(size) && (c.room >= size || c.outstanding == 0)
}

// choose says which holder takes a batch of size bytes: the destination while it
// has room ("direct first", paper section 4.2), else the intermediary that would
// have delivered it soonest, else nowhere: the caller waits, and that wait is the
// back-pressure that QEMU feels. It is a pure function of its arguments, so that
// another placement, several holders for one batch or holders that join later
// are a change here alone.
func choose(holders []candidate, size int) int {
	if len(holders) > 0 && holders[0].takes(size) {
		return 0
	}
	best := nowhere
	for i := 1; i < len(holders); i++ {
		h := &holders[i]
		if !h.takes(size) {
			continue
		}
		if best == nowhere || sooner(h, &holders[best]) {
			best = i
		}
	}
	return best
}

// sooner orders two intermediaries that may both take a batch. Equal finish
// times are broken by the emptier queue and then by the memory left, so that
// holders of which nothing is known yet are all tried.
func sooner(a, b *candidate) bool {
	if a.finish != b.finish {
		return a.finish < b.finish
	}
	if a.outstanding != b.outstanding {
		return a.outstanding < b.outstanding
	}
	return a.left > b.left
}
