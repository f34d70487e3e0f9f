// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"slices"
	"time"
)

// Vitals is what a guest's beats tell about a stretch of time.
type Vitals struct {
	// Switched is when the guest was last heard from the source, Resumed when
	// it was first heard from the destination. Between the two lies its
	// downtime: the guest's own gap as an observer of its serial line sees it,
	// clock stop, faults of its first steps and all.
	Switched, Resumed time.Time

	// LongestStall is the longest time between two beats by the guest's own
	// clock, the switch excepted.
	LongestStall time.Duration

	// Served is the number of requests served, one entry for every step.
	Served []int
}

// Downtime is the guest's gap at the switch, zero when it never switched.
func (v Vitals) Downtime() time.Duration { return v.Resumed.Sub(v.Switched) }

// switchBeats are the last beat from the source and the first from the
// destination.
func (g *Guest) switchBeats() (last, first beat, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := 1; i < len(g.beats); i++ {
		if g.beats[i].side == AtDestination {
			return g.beats[i-1], g.beats[i], g.beats[i-1].side == AtSource
		}
	}
	return beat{}, beat{}, false
}

// clockAt is the guest's clock at a moment of the host's, to the width of a
// beat.
func (g *Guest) clockAt(at time.Time) uint64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, b := range slices.Backward(g.beats) {
		if !b.at.After(at) {
			return b.Nanos
		}
	}
	return 0
}

// Vitals sums up the beats between two moments; step is the width of an entry
// of Served.
func (g *Guest) Vitals(from, to time.Time, step time.Duration) Vitals {
	var v Vitals
	if last, first, ok := g.switchBeats(); ok {
		v.Switched, v.Resumed = last.at, first.at
	}
	v.Served = make([]int, int(to.Sub(from)/step)+1)
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := 1; i < len(g.beats); i++ {
		b, before := g.beats[i], g.beats[i-1]
		if b.at.Before(from) || b.at.After(to) {
			continue
		}
		v.Served[b.at.Sub(from)/step] += int(b.Served - before.Served)
		if gap := time.Duration(b.Nanos - before.Nanos); b.side == before.side && gap > v.LongestStall {
			v.LongestStall = gap
		}
	}
	return v
}
