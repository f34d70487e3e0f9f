// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"scattergather.io/scattergather/internal/lab"
)

// Groups of rows that need no run.
const (
	GroupMemory      = "memory"
	GroupAllocations = "allocations"
)

// Options say what is measured.
type Options struct {
	// Groups chooses rows, see Groups; none means all.
	Groups []string
	// Rounds is how often everything is measured, at least 1.
	Rounds int
	// Quick measures with smaller guests and leaves out the rows that take longest.
	Quick bool
	// Micro is the output of the Go benchmarks ("go test -bench"), from which the row
	// of allocations comes; without it there is no such row.
	Micro []byte
	// Method gives a fresh lab method by its name.
	Method func(name string) (lab.Method, error)
	// Begin is told every run before it starts: its number from 1, how many there
	// are, and its scenario. Watch follows it, as in lab.Run.
	Begin func(number, of int, round int, scenario string)
	Watch func(lab.Update)
}

// Run measures. It returns what was measured together with an error when a run failed
// or a guest found a wrong page; the other runs are made all the same.
func Run(ctx context.Context, assets *lab.Assets, o Options) (*Report, error) {
	p := newPlan(o.Quick)
	rows, err := choose(p, o.Groups)
	if err != nil {
		return nil, err
	}
	rep := newReport(assets, o)
	var errs []error
	rounds := make([]round, max(1, o.Rounds))
	of, number := 0, 0
	for i := range rounds {
		of += len(scenarios(rows, i))
	}
	for i := range rounds {
		rounds[i] = round{}
		for _, s := range scenarios(rows, i) {
			number++
			o.Begin(number, of, i+1, s.name)
			result, err := measure(ctx, assets, o, s)
			if err != nil {
				errs = append(errs, fmt.Errorf("round %d, %s: %w", i+1, s.name, err))
			} else {
				rounds[i][s.name] = result
			}
			if result != nil {
				rep.add(i+1, s, result)
			}
			if ctx.Err() != nil {
				return rep, errors.Join(errs...)
			}
		}
	}
	for _, r := range rows {
		rep.Rows = append(rep.Rows, evaluate(r, rounds))
	}
	if wanted(o.Groups, GroupMemory) {
		rep.Rows = append(rep.Rows, memoryRows()...)
	}
	if wanted(o.Groups, GroupAllocations) && o.Micro != nil {
		rep.Rows = append(rep.Rows, allocationRows(o.Micro)...)
	}
	rep.Seconds = time.Since(rep.Date).Seconds()
	return rep, errors.Join(errs...)
}

// measure makes one run.
func measure(ctx context.Context, assets *lab.Assets, o Options, s scenario) (*lab.RunResult, error) {
	m, err := o.Method(s.method)
	if err != nil {
		return nil, err
	}
	return lab.Run(ctx, assets, s.spec, &scripted{Method: m, open: s.open, steps: s.steps}, o.Watch)
}

func wanted(groups []string, group string) bool {
	return len(groups) == 0 || slices.Contains(groups, group)
}

// choose gives the rows of the chosen groups.
func choose(p plan, groups []string) ([]row, error) {
	for _, g := range groups {
		if !slices.Contains(Groups(), g) {
			return nil, fmt.Errorf("there are no rows %q; there are %s", g, strings.Join(Groups(), ", "))
		}
	}
	rows := p.rows()
	return slices.DeleteFunc(rows, func(r row) bool { return !wanted(groups, r.Group) }), nil
}

// scenarios are the runs of one round, from 0, that the rows need, each once.
func scenarios(rows []row, round int) []scenario {
	var all []scenario
	for _, r := range rows {
		for _, s := range r.needs {
			known := slices.IndexFunc(all, func(a scenario) bool { return a.name == s.name })
			if known >= 0 {
				all[known].once = all[known].once && s.once
				continue
			}
			all = append(all, s)
		}
	}
	return slices.DeleteFunc(all, func(s scenario) bool { return s.once && round > 0 })
}

// evaluate computes a row for every round that has all the runs that it needs.
func evaluate(r row, rounds []round) Row {
	out := Row{Group: r.Group, Title: r.Title, Target: r.Target}
	for _, round := range rounds {
		var results []*lab.RunResult
		for _, s := range r.needs {
			if got := round[s.name]; got != nil {
				results = append(results, got)
			}
		}
		if len(results) < len(r.needs) {
			continue
		}
		v, detail := r.value(results)
		if math.IsNaN(v) || math.IsInf(v, 0) {
			continue // a method without a single fault has no latency to compare with
		}
		out.Values = append(out.Values, v)
		out.Details = append(out.Details, detail)
	}
	return out
}
