// SPDX-License-Identifier: Apache-2.0

// Package report draws the results of a comparison as one self-contained page:
// how long each method held the source, and for every run a timeline of what
// each link carried, when the CPU moved, when the source was free and what the
// guest served meanwhile.
package report

import (
	"bytes"
	_ "embed"
	"fmt"
	"html/template"
	"slices"
	"time"

	"scattergather.io/scattergather/internal/lab"
)

//go:embed report.html.tmpl
var page string

var tmpl = template.Must(template.New("report").Parse(page))

// row is a method in the table and in the bars.
type row struct {
	lab.RunResult
	Ours     bool
	Bar      float64 // per cent of the longest
	LimitBar float64
	Label    string
	Sent     string
	P50, P99 string
}

type view struct {
	Sentence string
	Subtitle string
	Rows     []row
	Panels   []panel
	Links    []link
	Made     string
}

type link struct{ Name, Up, Down string }

// HTML draws a result.
func HTML(r *lab.Result, made time.Time) ([]byte, error) {
	v := view{
		Sentence: r.Sentence(),
		Subtitle: fmt.Sprintf("QEMU %s under %s", r.QEMU, r.Accelerator),
		Made:     made.UTC().Format("2006-01-02 15:04 UTC"),
	}
	longest, span, top := 0.0, 0.0, 0.0
	for _, run := range r.Runs {
		longest = max(longest, run.EvictionSeconds)
		if t := run.Timeline; t != nil {
			span = max(span, t.From+t.Step*float64(len(t.Served)))
			top = max(top, highest(t))
		}
	}
	for _, run := range r.Runs {
		v.Rows = append(v.Rows, newRow(run, longest))
		if run.Timeline != nil {
			v.Panels = append(v.Panels, newPanel(run, span, niceCeiling(top)))
		}
	}
	for name, rates := range r.Links {
		v.Links = append(v.Links, link{Name: name, Up: speed(float64(rates.Up)), Down: speed(float64(rates.Down))})
	}
	slices.SortFunc(v.Links, func(a, b link) int { return order(a.Name, b.Name) })
	var b bytes.Buffer
	if err := tmpl.Execute(&b, v); err != nil {
		return nil, fmt.Errorf("drawing the report: %w", err)
	}
	return b.Bytes(), nil
}

func newRow(run lab.RunResult, longest float64) row {
	w := row{RunResult: run, Ours: run.Method == lab.ScatterGather || run.Method == lab.ScatterGatherHybrid}
	if longest > 0 {
		w.Bar, w.LimitBar = 100*run.EvictionSeconds/longest, 100*run.LimitSeconds/longest
	}
	w.Label = fmt.Sprintf("%.2f s", run.EvictionSeconds)
	w.Sent = fmt.Sprintf("%d MiB", run.BytesSourceOut>>20)
	w.P50, w.P99 = fmt.Sprintf("%.1f ms", float64(run.FaultP50Us)/1e3), fmt.Sprintf("%.1f ms", float64(run.FaultP99Us)/1e3)
	if run.Error != "" {
		w.Label = "failed"
	}
	return w
}

// order puts the source first, then the destination, then the intermediaries by
// length and name, so that 10 comes after 9.
func order(a, b string) int {
	rank := func(s string) int {
		switch s {
		case lab.SourceNode:
			return 0
		case lab.DestinationNode:
			return 1
		}
		return 2 + len(s)
	}
	if d := rank(a) - rank(b); d != 0 {
		return d
	}
	if a < b {
		return -1
	}
	return 1
}

func speed(bits float64) string {
	switch {
	case bits == 0:
		return "unshaped"
	case bits >= 1e9:
		return fmt.Sprintf("%.3g Gbit/s", bits/1e9)
	}
	return fmt.Sprintf("%.3g Mbit/s", bits/1e6)
}
