// SPDX-License-Identifier: Apache-2.0

package flow

import "time"

// recentAcks is how many acknowledgements vote on the present round-trip time. A busy
// machine delays some by milliseconds and none is ever early, so the smallest counts.
const recentAcks = 8

// recent is the smallest of the last few round-trip times.
type recent struct {
	rtts [recentAcks]time.Duration
	n    int // all that were added since the reset
}

func (r *recent) add(rtt time.Duration) {
	r.rtts[r.n%recentAcks] = rtt
	r.n++
}

func (r *recent) reset() { r.n = 0 }

// min must not be called before add.
func (r *recent) min() time.Duration {
	least := r.rtts[0]
	for _, rtt := range r.rtts[1:min(r.n, recentAcks)] {
		least = min(least, rtt)
	}
	return least
}

const (
	// baseSlot is the time between drains, and baseSlots of them are how long a
	// round-trip time is remembered as that of the empty path: 7.5 to 10 s.
	baseSlot  = 2500 * time.Millisecond
	baseSlots = 4
)

// baseline is the round-trip time of the empty path: the smallest one of the last
// slots. Slots are cut from absolute time, so that all windows of a node, and of all
// nodes with synchronised clocks, begin a slot together.
type baseline struct {
	least [baseSlots]time.Duration // by slot number modulo baseSlots; 0 is none
	slot  int64                    // the newest
}

func (b *baseline) add(rtt time.Duration, now time.Time) {
	slot := now.UnixNano() / int64(baseSlot)
	if slot < b.slot || slot-b.slot >= baseSlots {
		b.least = [baseSlots]time.Duration{} // a long silence, or the clock was set back
		b.slot = slot
	}
	for b.slot < slot {
		b.slot++
		b.least[b.slot%baseSlots] = 0
	}
	if least := &b.least[slot%baseSlots]; *least == 0 || rtt < *least {
		*least = rtt
	}
}

// rtt returns 0 when there is none.
func (b *baseline) rtt() (least time.Duration) {
	for _, rtt := range b.least {
		if rtt > 0 && (least == 0 || rtt < least) {
			least = rtt
		}
	}
	return least
}

// alarm watches for a path that became much slower. It counts acknowledgements that
// come late without one in time between them. Those that a machine held up come in a
// bunch, those of a slow path are spread over time.
type alarm struct {
	n     int
	since time.Time
	bytes int // acknowledged after the first
}

func (a *alarm) late(bytes int, now time.Time) {
	if a.n++; a.n == 1 {
		a.since, a.bytes = now, 0
		return
	}
	a.bytes += bytes
}

func (a *alarm) reset() { a.n = 0 }

// rings tells that the path is slow indeed, and how many bytes a second it carried
// meanwhile.
func (a *alarm) rings(now time.Time, patience time.Duration) (rate float64, ok bool) {
	span := now.Sub(a.since)
	if a.n < 4 || span < patience {
		return 0, false
	}
	return float64(a.bytes) / span.Seconds(), true
}
