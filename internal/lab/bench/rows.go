// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"math"
	"strings"

	"scattergather.io/scattergather/internal/lab"
)

// round is the results of one round by the scenario's name.
type round map[string]*lab.RunResult

// row is one line of the table.
type row struct {
	Group  string // what --rows chooses by
	Title  string
	Target Target
	needs  []scenario
	// value computes the row from the results of needs, in their order, and tells
	// the numbers behind it.
	value func(r []*lab.RunResult) (float64, string)
}

// Groups names the groups of rows, in the order of the table.
func Groups() []string {
	names := []string{}
	for _, r := range newPlan(false).rows() {
		if len(names) == 0 || names[len(names)-1] != r.Group {
			names = append(names, r.Group)
		}
	}
	return append(names, GroupMemory, GroupAllocations)
}

// rows is the whole table of runs.
func (p plan) rows() []row {
	var rows []row
	for _, part := range [][]row{p.limit(), p.speedup(), p.flat(), p.without(), p.total(), p.model(), p.switching(), p.throughput()} {
		rows = append(rows, part...)
	}
	return rows
}

func eviction(r *lab.RunResult) float64 { return r.EvictionSeconds }
func total(r *lab.RunResult) float64    { return r.TotalMigrationSeconds }

// over is a row's value: one number of the first run over the same of the second.
func over(what func(*lab.RunResult) float64, unit string) func([]*lab.RunResult) (float64, string) {
	return func(r []*lab.RunResult) (float64, string) {
		a, b := what(r[0]), what(r[1])
		return a / b, fmt.Sprintf("%.4g %s against %.4g %s", a, unit, b, unit)
	}
}

// under is over the other way round: how many times the second run's number is the
// first's.
func under(what func(*lab.RunResult) float64, unit string) func([]*lab.RunResult) (float64, string) {
	return func(r []*lab.RunResult) (float64, string) {
		a, b := what(r[0]), what(r[1])
		return b / a, fmt.Sprintf("%.4g %s against %.4g %s", a, unit, b, unit)
	}
}

func (p plan) limit() []row {
	return []row{{
		Group: "limit", Title: "eviction time / (bytes that must leave / source's uplink), destination at 1/8",
		Target: AtMost(1.10), needs: []scenario{p.slow(8, lab.ScatterGather)},
		value: func(r []*lab.RunResult) (float64, string) {
			return r[0].EvictionSeconds / r[0].LimitSeconds,
				fmt.Sprintf("%.2f s, limit %.2f s", r[0].EvictionSeconds, r[0].LimitSeconds)
		},
	}}
}

func (p plan) speedup() []row {
	var rows []row
	for _, divisor := range []int64{4, 8, 10} {
		if p.quick && divisor != 8 {
			continue
		}
		ours, target := p.slow(divisor, lab.ScatterGather), Target{}
		if divisor == 8 {
			target = AtLeast(6)
		} else {
			ours = measuredOnce(evictionOnly(ours))
		}
		for _, method := range []string{lab.StockPostcopy, lab.StockPrecopy} {
			theirs := p.slow(divisor, method)
			if divisor == 10 || method == lab.StockPrecopy {
				theirs.once = true
			}
			rows = append(rows, row{
				Group: "speedup", Title: fmt.Sprintf("%s's eviction time / ours, destination at 1/%d", method, divisor),
				Target: target, needs: []scenario{ours, theirs}, value: under(eviction, "s"),
			})
		}
	}
	return rows
}

func (p plan) flat() []row {
	needs := []scenario{
		evictionOnly(p.slow(2, lab.ScatterGather)), p.slow(8, lab.ScatterGather),
		evictionOnly(p.slow(12, lab.ScatterGather)), p.slowing(),
	}
	return []row{{
		Group: "flat", Title: "longest / shortest eviction time: destination at 1/2, 1/8, 1/12, and slowing from 1/2 to 1/12 meanwhile",
		Target: AtMost(1.05), needs: needs,
		value: func(r []*lab.RunResult) (float64, string) {
			low, high, text := math.Inf(1), 0.0, []string{}
			for _, run := range r {
				// What had to leave differs by some pages from run to run.
				relative := run.EvictionSeconds / run.LimitSeconds
				low, high = min(low, relative), max(high, relative)
				text = append(text, fmt.Sprintf("%.2f", run.EvictionSeconds))
			}
			return high / low, strings.Join(text, ", ") + " s"
		},
	}}
}

func (p plan) without() []row {
	return []row{{
		Group: "alone", Title: "eviction time without any intermediary / stock post-copy's, destination at 1/4",
		Target: AtMost(1.05), needs: []scenario{p.alone(), p.slow(4, lab.StockPostcopy)}, value: over(eviction, "s"),
	}}
}

func (p plan) total() []row {
	return []row{{
		Group: "total", Title: "total migration time / stock post-copy's, destination at 1/8",
		Target: AtMost(1.10), needs: []scenario{p.slow(8, lab.ScatterGather), p.slow(8, lab.StockPostcopy)},
		value: over(total, "s"),
	}}
}

func (p plan) model() []row {
	var rows []row
	for k := range modelMost + 1 {
		if p.quick && k%2 == 1 {
			continue
		}
		s := p.few(k)
		rows = append(rows, row{
			Group: "model", Title: fmt.Sprintf("eviction time / model's, %d intermediaries slower than the source", k),
			Target: Between(0.90, 1.10), needs: []scenario{s},
			value: func(r []*lab.RunResult) (float64, string) {
				model := predicted(s.spec, r[0])
				return r[0].EvictionSeconds / model, fmt.Sprintf("%.2f s, model %.2f s", r[0].EvictionSeconds, model)
			},
		})
	}
	return rows
}

// switching is what the guest feels.
func (p plan) switching() []row {
	ours := p.slow(8, lab.ScatterGather)
	stock, preempt := p.slow(8, lab.StockPostcopy), p.slow(8, lab.StockPostcopyPreempt)
	downtime := func(r *lab.RunResult) float64 { return r.DowntimeMs }
	p50 := func(r *lab.RunResult) float64 { return float64(r.FaultP50Us) / 1e3 }
	p99 := func(r *lab.RunResult) float64 { return float64(r.FaultP99Us) / 1e3 }
	return []row{
		{
			Group: "downtime", Title: "downtime / stock post-copy's, destination at 1/8", Target: AtMost(1.5),
			needs: []scenario{ours, stock}, value: over(downtime, "ms"),
		},
		{
			Group: "faults", Title: "demand fault while gathering, median / stock post-copy-preempt's", Target: AtMost(1),
			needs: []scenario{ours, preempt}, value: over(p50, "ms"),
		},
		{
			Group: "faults", Title: "demand fault while gathering, 99th percentile / stock post-copy-preempt's", Target: AtMost(1),
			needs: []scenario{ours, preempt}, value: over(p99, "ms"),
		},
	}
}

func (p plan) throughput() []row {
	var rows []row
	for _, what := range []struct {
		title string
		time  func(*lab.RunResult) float64
	}{{"source's release", eviction}, {"whole migration", total}} {
		for _, method := range []string{lab.StockPostcopy, lab.StockPrecopy} {
			rows = append(rows, row{
				Group: "throughput", Title: fmt.Sprintf("unshaped throughput of the %s, sealed / %s's", what.title, method),
				Target: AtLeast(1), needs: []scenario{p.unshaped(lab.ScatterGather), p.unshaped(method)},
				value: func(r []*lab.RunResult) (float64, string) {
					ours, theirs := what.time(r[0]), what.time(r[1])
					return theirs / ours, fmt.Sprintf("%.2f s for %d MiB on the wire against %.2f s for %d MiB",
						ours, r[0].BytesSourceOut>>20, theirs, r[1].BytesSourceOut>>20)
				},
			})
		}
	}
	return rows
}
