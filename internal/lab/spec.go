// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"time"

	"scattergather.io/scattergather/internal/lab/guest"
)

// Names of the nodes. Intermediaries are numbered from 1.
const (
	SourceNode      = "source"
	DestinationNode = "destination"
)

// IntermediaryNode is the name of the intermediary with a number from 1.
func IntermediaryNode(number int) string { return fmt.Sprintf("intermediary-%d", number) }

// Spec says what a run looks like: the nodes, their links and the guests.
type Spec struct {
	Source, Destination Rates
	Intermediaries      []Rates       // one for every intermediary
	Queue               time.Duration // the longest wait in a shaped link's queue

	VMs        int
	MemoryMiB  int // of each guest
	WorkingSet int // MiB of each guest that are dirtied and requested
	DirtyRate  int // pages per second and guest
	VerifyRate int // pages verified per second and guest while it runs
	Requests   int // per second and guest
	CPUs       int // of each guest, 1 or 2
	Mix        guest.Mix

	// Timeout bounds the migration, not the boot before it.
	Timeout time.Duration
}

// DefaultSpec is the run of the demonstration: the destination takes an eighth
// of what the source can send, and there are two intermediaries more than it takes
// to carry the rest. The links are slow enough for two processors, which also run
// the guests, all agents and the links, to keep them full.
func DefaultSpec() Spec {
	const source = 800e6
	slow := Rates{Up: source / 4, Down: source / 4}
	return Spec{
		Source:         Rates{Up: source, Down: source},
		Destination:    Rates{Up: source / 8, Down: source / 8},
		Intermediaries: []Rates{slow, slow, slow, slow, slow, slow},
		Queue:          25 * time.Millisecond,
		VMs:            1,
		MemoryMiB:      384,
		WorkingSet:     32,
		DirtyRate:      1000,
		VerifyRate:     1000,
		Requests:       400,
		CPUs:           1,
		Mix:            guest.DefaultMix,
		Timeout:        90 * time.Second,
	}
}

// kernelMiB is what the guest's kernel, its init and the bookkeeping of the
// verification need of the guest's memory.
const kernelMiB = 112

// guestConfig is what the guest with a number from 0 is told. Guests hold
// different data.
func (s Spec) guestConfig(number int) guest.Config {
	return guest.Config{
		Seed: uint64(number)*0x9e3779b97f4a7c15 + 1, FillMiB: s.MemoryMiB - kernelMiB - s.MemoryMiB*3/100,
		Mix: s.Mix, WorkingSet: s.WorkingSet, DirtyRate: s.DirtyRate, VerifyRate: s.VerifyRate,
		Requests: s.Requests, Touches: 4, CPUs: s.CPUs,
	}
}

// Validate names the first thing that makes no sense.
func (s Spec) Validate() error {
	switch {
	case s.VMs < 1 || s.VMs > 64:
		return fmt.Errorf("%d VMs: want 1 to 64", s.VMs)
	case s.MemoryMiB < 192:
		return fmt.Errorf("%d MiB of guest memory: want at least 192, the guest's kernel needs %d of them", s.MemoryMiB, kernelMiB)
	case s.WorkingSet < 1 || s.WorkingSet > s.guestConfig(0).FillMiB:
		return fmt.Errorf("working set of %d MiB: want 1 to the %d MiB that a guest of %d MiB fills", s.WorkingSet, s.guestConfig(0).FillMiB, s.MemoryMiB)
	case s.CPUs < 1 || s.CPUs > 2:
		return fmt.Errorf("%d guest CPUs: want 1 or 2", s.CPUs)
	case len(s.Intermediaries) > 200:
		return fmt.Errorf("%d intermediaries: want at most 200", len(s.Intermediaries))
	case s.DirtyRate < 0 || s.VerifyRate < 0 || s.Requests < 0:
		return fmt.Errorf("a rate of the guest is negative")
	}
	return nil
}

func (s Spec) nodes() []NodeSpec {
	nodes := []NodeSpec{{SourceNode, s.Source}, {DestinationNode, s.Destination}}
	for i, r := range s.Intermediaries {
		nodes = append(nodes, NodeSpec{IntermediaryNode(i + 1), r})
	}
	return nodes
}

// Links gives the links of all nodes by name, for result.json.
func (s Spec) Links() map[string]Rates {
	links := map[string]Rates{}
	for _, n := range s.nodes() {
		links[n.Name] = n.Rates
	}
	return links
}
