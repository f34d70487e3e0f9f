// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"time"

	"scattergather.io/scattergather/internal/lab"
	"scattergather.io/scattergather/internal/lab/guest"
)

// uplink is the source's rate in the shaped scenarios, in bits per second: far below
// what two processors carry with the guest emulated beside.
const uplink = 500e6

// The shape of the papers' figure 15 (876 Mbit/s at the source, 139 direct, 200 for
// each intermediary), scaled to uplink.
const (
	modelDirect       = uplink * 16 / 100
	modelIntermediary = uplink * 23 / 100
	modelMost         = 4 // intermediaries
)

// plan says how big the runs are.
type plan struct {
	quick  bool
	memory int // MiB of the guest, shaped
	large  int // MiB of the guest, unshaped
}

func newPlan(quick bool) plan {
	if quick {
		return plan{quick: true, memory: 224, large: 640}
	}
	return plan{memory: 320, large: 1280}
}

// spec is the scene that all scenarios are derived from. The guest's memory is nearly
// all random: data that has to leave.
func (p plan) spec() lab.Spec {
	s := lab.DefaultSpec()
	s.Source = both(uplink)
	s.MemoryMiB = p.memory
	s.Mix = guest.Mix{85, 5, 5, 5}
	s.Timeout = 3 * time.Minute
	return s
}

func both(bits int64) lab.Rates { return lab.Rates{Up: bits, Down: bits} }

// enough is a set of intermediaries that together take more than the source can send.
func enough() []lab.Rates {
	var all []lab.Rates
	for range 5 {
		all = append(all, both(uplink/4))
	}
	return all
}

// slow is a scenario with a destination at 1/divisor of the source's rate and enough
// intermediaries; stock methods do not use them.
func (p plan) slow(divisor int64, method string) scenario {
	s := p.spec()
	s.Destination, s.Intermediaries = both(uplink/divisor), enough()
	return scenario{name: fmt.Sprintf("1/%d %s", divisor, method), method: method, spec: s}
}

// measuredOnce marks a scenario for the first round only.
func measuredOnce(s scenario) scenario {
	s.once = true
	return s
}

// evictionOnly marks a scenario of which only the eviction time counts.
func evictionOnly(s scenario) scenario {
	s.name += " opened"
	s.open = true
	return s
}

// slowing is the scenario whose destination slows from 1/2 to 1/12 while memory
// leaves the source.
func (p plan) slowing() scenario {
	s := evictionOnly(p.slow(2, lab.ScatterGather))
	s.name = "slowing 1/2 to 1/12 " + lab.ScatterGather
	// About how long the source's link needs for the guest's memory.
	whole := time.Duration(float64(p.memory<<20) * 8 / uplink * float64(time.Second))
	for i, divisor := range []int64{4, 6, 8, 12} {
		s.steps = append(s.steps, step{after: whole * time.Duration(i+1) / 6, rates: both(uplink / divisor)})
	}
	return s
}

// alone is the scenario with a destination at a quarter and no intermediary.
func (p plan) alone() scenario {
	s := p.slow(4, lab.ScatterGather)
	s.name, s.spec.Intermediaries = "1/4 without intermediaries "+lab.ScatterGather, nil
	return s
}

// few is the scenario of figure 15 with k intermediaries.
func (p plan) few(k int) scenario {
	s := p.spec()
	s.Destination, s.Intermediaries = both(modelDirect), nil
	for range k {
		s.Intermediaries = append(s.Intermediaries, both(modelIntermediary))
	}
	return evictionOnly(scenario{name: fmt.Sprintf("%d slow intermediaries", k), method: lab.ScatterGather, spec: s})
}

// goodput is the share of a link's rate that is left for data beside the headers of
// Ethernet, IP and TCP with timestamps. The papers' model counts it, too: they put the
// rates that they measured into it, 876 Mbit/s for a link of 1 Gbit/s.
const goodput = 1448.0 / 1514

// predicted is the eviction time that the model gives for a scene, in seconds: what
// has to leave divided by what the source or, together, all takers can carry.
func predicted(s lab.Spec, r *lab.RunResult) float64 {
	takers := s.Destination.Down
	for _, i := range s.Intermediaries {
		takers += i.Down
	}
	// LimitSeconds is what has to leave divided by the source's rate alone.
	return r.LimitSeconds * float64(s.Source.Up) / float64(min(s.Source.Up, takers)) / goodput
}

// unshaped is the scenario on open links with a larger guest.
func (p plan) unshaped(method string) scenario {
	s := p.spec()
	s.Source, s.Destination, s.Intermediaries = lab.Rates{}, lab.Rates{}, nil
	s.MemoryMiB = p.large
	return scenario{name: "unshaped " + method, method: method, spec: s}
}
