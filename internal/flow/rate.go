// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"math"
	"time"
)

// rate smooths the delivered bytes a second over the time in which bytes are under
// way.
type rate struct {
	value  float64
	bytes  int           // delivered since value was renewed
	active time.Duration // and the time it took
	total  time.Duration
	since  time.Time
}

// resume notes that bytes are under way again.
func (r *rate) resume(now time.Time) { r.since = now }

// add counts delivered bytes. The rate is renewed every 20 ms at most, since
// acknowledgements come in bunches. It forgets over ten round trips, and is the plain
// mean before that.
func (r *rate) add(bytes int, now time.Time, rtt time.Duration) {
	r.bytes += bytes
	if now.After(r.since) {
		r.active += now.Sub(r.since)
		r.since = now
	}
	if r.active < 20*time.Millisecond && r.total > 0 || r.active == 0 {
		return
	}
	r.total += r.active
	sample := float64(r.bytes) / r.active.Seconds()
	forget := max(200*time.Millisecond, 10*rtt)
	weight := max(1-math.Exp(-float64(r.active)/float64(forget)), float64(r.active)/float64(r.total))
	r.value += (sample - r.value) * weight
	r.bytes, r.active = 0, 0
}
