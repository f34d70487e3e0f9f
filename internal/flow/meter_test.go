// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestMeterAgainstAllBytes(t *testing.T) {
	type add struct {
		at    time.Time
		bytes int
	}
	rapid.Check(t, func(t *rapid.T) {
		var m Meter
		var adds []add
		now := time.Unix(1_700_000_000, rapid.Int64Range(0, 1e9).Draw(t, "start"))
		for range rapid.IntRange(1, 50).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.OneOf(rapid.Int64Range(0, 3e7), rapid.Int64Range(0, 3e9)).Draw(t, "pause")))
			adds = append(adds, add{now, rapid.IntRange(1, 1<<20).Draw(t, "bytes")})
			m.Add(adds[len(adds)-1].bytes, now)
		}
		now = now.Add(time.Duration(rapid.Int64Range(0, 2e9).Draw(t, "wait")))
		var total, least, most float64
		for _, a := range adds {
			total += float64(a.bytes)
			if ago := now.Sub(a.at); ago <= time.Second {
				least += float64(a.bytes)
			}
			if ago := now.Sub(a.at); ago <= time.Second+meterSlot {
				most += float64(a.bytes)
			}
		}
		if float64(m.Total()) != total {
			t.Fatalf("total %d, want %v", m.Total(), total)
		}
		// Over the second before now, or over up to a slot more; over less after a start.
		span := min(1.0, now.Sub(adds[0].at).Seconds())
		if got := m.Rate(now); got < least/1.1-1e-6 || got > most/max(span, meterSlot.Seconds())+1e-6 {
			t.Fatalf("rate %v, want %v to %v in %v s", got, least, most, span)
		}
	})
}

func TestMeterOfASteadyFlow(t *testing.T) {
	var m Meter
	if got := m.Rate(time.Unix(1_700_000_000, 0)); got != 0 {
		t.Errorf("nothing has a rate of %v", got)
	}
	if left, ok := m.Left(1, time.Unix(1_700_000_000, 0)); ok {
		t.Errorf("nothing is done in %v", left)
	}
	now := time.Unix(1_700_000_000, 0)
	for k := range 3000 {
		m.Add(1000, now)
		now = now.Add(time.Millisecond)
		if got := m.Rate(now); k > 200 && math.Abs(got/1e6-1) > 0.02 {
			t.Fatalf("after %d ms: %v bytes a second, want a million", k, got)
		}
	}
	if left, ok := m.Left(5e6, now); !ok || left < 4900*time.Millisecond || left > 5100*time.Millisecond {
		t.Errorf("5 MB left take %v %v", left, ok)
	}
	if left, ok := m.Left(math.MaxUint64, now); !ok || left != 365*24*time.Hour {
		t.Errorf("all bytes there are take %v %v", left, ok)
	}
	if got := m.Rate(now.Add(-time.Hour)); got < 0.5e6 || got > 11e6 {
		t.Errorf("%v bytes a second with the clock set back", got)
	}
	now = now.Add(2 * time.Second)
	if _, ok := m.Left(1, now); ok || m.Rate(now) != 0 || m.Total() != 3e6 {
		t.Errorf("a flow that ended has %v bytes a second, %d in all", m.Rate(now), m.Total())
	}
}
