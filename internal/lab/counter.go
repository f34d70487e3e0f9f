// SPDX-License-Identifier: Apache-2.0

package lab

// Counter is what became of the number that a guest counts up with every beat. A
// guest that runs once, and goes on where it stopped, never repeats a number and
// never goes back.
type Counter struct {
	// First and Last are the numbers heard first and last.
	First, Last uint32
	// Heard is how many beats arrived from the source and from the destination.
	Heard [2]int
	// Lost is how many numbers never arrived. The guest drops a beat when its serial
	// port is full, so a few are no error.
	Lost int
	// Jump is how many numbers are missing between the last beat from the source and
	// the first one from the destination.
	Jump int
	// Back is how often a number did not grow: the guest ran at both ends, or began
	// at the destination with an older state than it left the source with.
	Back int
}

// Counter sums up all beats so far, those of the source before those of the
// destination: the two come on different lines, and may be heard out of order.
func (g *Guest) Counter() Counter {
	g.mu.Lock()
	defer g.mu.Unlock()
	var c Counter
	for _, side := range []Side{AtSource, AtDestination} {
		for _, b := range g.beats {
			if b.side == side {
				c.count(b)
			}
		}
	}
	return c
}

func (c *Counter) count(b beat) {
	heard := c.Heard[AtSource] + c.Heard[AtDestination]
	c.Heard[b.side]++
	switch {
	case heard == 0:
		c.First = b.Seq
	case b.Seq <= c.Last:
		c.Back++
	default:
		missing := int(b.Seq - c.Last - 1)
		c.Lost += missing
		if b.side == AtDestination && c.Heard[AtDestination] == 1 {
			c.Jump = missing
		}
	}
	c.Last = b.Seq
}
