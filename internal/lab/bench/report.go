// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"scattergather.io/scattergather/internal/lab"
)

// Report is what a bench measured; bench.json holds it.
type Report struct {
	Date        time.Time `json:"date"`
	Seconds     float64   `json:"seconds"`
	Machine     Machine   `json:"machine"`
	QEMU        string    `json:"qemu"`
	Accelerator string    `json:"accelerator"`
	Rounds      int       `json:"rounds"`
	Quick       bool      `json:"quick"`
	// Guest and Large are the guests' memory in MiB, shaped and unshaped; Uplink is
	// the source's rate in bits per second.
	Guest  int   `json:"guest_mib"`
	Large  int   `json:"large_guest_mib"`
	Uplink int64 `json:"source_bits_per_second"`

	Rows []Row      `json:"rows"`
	Runs []Measured `json:"runs"`
}

// Row is a measured line of the table, with one value a round.
type Row struct {
	Group   string    `json:"group"`
	Title   string    `json:"title"`
	Target  Target    `json:"-"`
	Wanted  string    `json:"target"`
	Unit    string    `json:"unit,omitempty"`
	Values  []float64 `json:"values"`
	Details []string  `json:"details,omitempty"` // of every value
	Median  float64   `json:"median"`
	Verdict Verdict   `json:"verdict"`
}

// Verdict says how a row's median stands to its target.
type Verdict string

// The verdicts.
const (
	Met     Verdict = "met"
	Missed  Verdict = "missed"
	Informs Verdict = "–" // no target
	Unknown Verdict = "not measured"
)

// Measured is a run with the scenario and round that it was made for.
type Measured struct {
	Round    int                  `json:"round"`
	Scenario string               `json:"scenario"`
	Links    map[string]lab.Rates `json:"links"`
	lab.RunResult
}

func newReport(assets *lab.Assets, o Options) *Report {
	p := newPlan(o.Quick)
	return &Report{
		Date: time.Now(), Machine: thisMachine(), QEMU: assets.Version, Accelerator: assets.Accelerator,
		Rounds: max(1, o.Rounds), Quick: o.Quick, Guest: p.memory, Large: p.large, Uplink: uplink,
	}
}

func (r *Report) add(round int, s scenario, result *lab.RunResult) {
	r.Runs = append(r.Runs, Measured{Round: round, Scenario: s.name, Links: s.spec.Links(), RunResult: *result})
}

// Verified sums up what the guests verified in all runs: pages right and wrong, and
// the runs that did not come to their end.
func (r *Report) Verified() (pages, wrong uint64, failed int) {
	for _, run := range r.Runs {
		pages += run.PagesVerified
		wrong += run.PagesWrong
		if run.Error != "" {
			failed++
		}
	}
	return pages, wrong, failed
}

// Result gives the value of a row in words: its median, its spread and the numbers
// behind the value that is nearest to the median.
func (r *Row) Result() (value, spread, detail string) {
	if len(r.Values) == 0 {
		return "–", "–", ""
	}
	m := median(r.Values)
	value = number(m) + r.Unit
	spread = "1 run"
	if n := len(r.Values); n > 1 {
		spread = fmt.Sprintf("%s … %s (%d)", number(slices.Min(r.Values)), number(slices.Max(r.Values)), n)
	}
	if len(r.Details) == len(r.Values) {
		detail = r.Details[nearest(r.Values, m)]
	}
	return value, spread, detail
}

func nearest(values []float64, to float64) int {
	best := 0
	for i, v := range values {
		if abs(v-to) < abs(values[best]-to) {
			best = i
		}
	}
	return best
}

func abs(v float64) float64 { return max(v, -v) }

// Judge says how the row stands.
func (r *Row) Judge() Verdict {
	switch {
	case len(r.Values) == 0:
		return Unknown
	case !r.Target.set:
		return Informs
	case r.Target.Holds(median(r.Values)):
		return Met
	}
	return Missed
}

// JSON is the content of bench.json.
func (r *Report) JSON() ([]byte, error) {
	for i := range r.Rows {
		row := &r.Rows[i]
		row.Wanted, row.Verdict = row.Target.String(), row.Judge()
		if len(row.Values) > 0 {
			row.Median = median(row.Values)
		}
	}
	b, err := json.MarshalIndent(r, "", "  ")
	return append(b, '\n'), err
}
