// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"scattergather.io/scattergather/internal/lab"
	"scattergather.io/scattergather/internal/lab/guest"
	"scattergather.io/scattergather/internal/scatter"
)

// rate is a flag for bits per second, written like 1.6G, 200M or 0.
type rate int64

func (r *rate) Type() string { return "rate" }

func (r *rate) String() string {
	switch {
	case *r == 0:
		return "0"
	case *r%1e9 == 0:
		return fmt.Sprintf("%dG", *r/1e9)
	case *r%1e6 == 0:
		return fmt.Sprintf("%dM", *r/1e6)
	}
	return strconv.FormatInt(int64(*r), 10)
}

func (r *rate) Set(text string) error {
	number, unit := text, 1.0
	for suffix, factor := range map[string]float64{"k": 1e3, "M": 1e6, "G": 1e9} {
		if cut, found := strings.CutSuffix(text, suffix); found {
			number, unit = cut, factor
		}
	}
	f, err := strconv.ParseFloat(number, 64)
	if err != nil || f < 0 || f*unit > 1e12 {
		return fmt.Errorf("%q is no rate: write bits per second like 1.6G, 200M or 0 for unshaped", text)
	}
	*r = rate(f * unit)
	return nil
}

// sceneFlags are the flags that run and compare share.
type sceneFlags struct {
	s                                 lab.Spec
	source, destination, intermediary rate
	intermediaries                    int
	rates                             []string
	mix                               string
}

func newSceneFlags() *sceneFlags {
	s := lab.DefaultSpec()
	return &sceneFlags{
		s: s, source: rate(s.Source.Up), destination: rate(s.Destination.Up), intermediary: rate(s.Intermediaries[0].Up),
		intermediaries: len(s.Intermediaries), mix: s.Mix.String(),
	}
}

func (f *sceneFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.IntVar(&f.intermediaries, "intermediaries", f.intermediaries, "number of intermediaries")
	flags.Var(&f.source, "source-rate", "link of the source, each direction, in bits per second; 0 is unshaped")
	flags.Var(&f.destination, "destination-rate", "link of the destination")
	flags.Var(&f.intermediary, "intermediary-rate", "link of each intermediary")
	flags.StringSliceVar(&f.rates, "intermediary-rates", nil, "links of the intermediaries one by one, instead of the two flags above")
	flags.DurationVar(&f.s.Queue, "queue", f.s.Queue, "longest wait in a shaped link's queue")
	flags.IntVar(&f.s.VMs, "vms", f.s.VMs, "number of VMs, all moved at once")
	flags.IntVar(&f.s.MemoryMiB, "memory", f.s.MemoryMiB, "memory of each guest, in MiB")
	flags.IntVar(&f.s.WorkingSet, "working-set", f.s.WorkingSet, "memory that each guest dirties and serves requests from, in MiB")
	flags.IntVar(&f.s.DirtyRate, "dirty-rate", f.s.DirtyRate, "pages that each guest dirties per second")
	flags.IntVar(&f.s.VerifyRate, "verify-rate", f.s.VerifyRate, "pages that each guest verifies per second while it runs")
	flags.IntVar(&f.s.Requests, "requests", f.s.Requests, "requests that each guest serves per second")
	flags.IntVar(&f.s.CPUs, "cpus", f.s.CPUs, "CPUs of each guest, 1 or 2")
	flags.StringVar(&f.mix, "mix", f.mix, "what memory holds, in per cent: random:compressible:duplicate:zero")
	flags.DurationVar(&f.s.Timeout, "timeout", f.s.Timeout, "longest time that a migration may take")
}

func (f *sceneFlags) spec() (lab.Spec, error) {
	s := f.s
	var err error
	if s.Mix, err = guest.ParseMix(f.mix); err != nil {
		return s, err
	}
	both := func(r rate) lab.Rates { return lab.Rates{Up: int64(r), Down: int64(r)} }
	s.Source, s.Destination = both(f.source), both(f.destination)
	s.Intermediaries = nil
	for range f.intermediaries {
		s.Intermediaries = append(s.Intermediaries, both(f.intermediary))
	}
	if len(f.rates) > 0 {
		s.Intermediaries = nil
		for _, text := range f.rates {
			var r rate
			if err := r.Set(text); err != nil {
				return s, fmt.Errorf("--intermediary-rates: %w", err)
			}
			s.Intermediaries = append(s.Intermediaries, both(r))
		}
	}
	return s, s.Validate()
}

func allMethods() []lab.Method {
	options := lab.AgentOptions{Binary: agentBinary()}
	return append(lab.Stock(),
		lab.NewScatterGather(scatter.Immediate, options), lab.NewScatterGather(scatter.Hybrid, options))
}

// agentBinary is the agent that was built beside this program, or the one that
// SG_AGENT names.
func agentBinary() string {
	if path := os.Getenv("SG_AGENT"); path != "" {
		return path
	}
	self, err := os.Executable()
	if err != nil {
		return "agent" // looked up in PATH
	}
	return filepath.Join(filepath.Dir(self), "agent")
}

func methodNames() string {
	var names []string
	for _, m := range allMethods() {
		names = append(names, m.Name())
	}
	return strings.Join(names, ", ")
}

func chooseMethods(names []string) ([]lab.Method, error) {
	var chosen []lab.Method
	for _, name := range names {
		before := len(chosen)
		for _, m := range allMethods() {
			if m.Name() == name {
				chosen = append(chosen, m)
			}
		}
		if len(chosen) == before {
			return nil, fmt.Errorf("there is no method %q; there are %s", name, methodNames())
		}
	}
	return chosen, nil
}
