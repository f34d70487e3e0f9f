// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bytes"
	"fmt"
	"strings"
	"time"
)

// The markers between which the written part of a document lies.
const (
	markBegin = "<!-- begin: written by sglab bench -->"
	markEnd   = "<!-- end: written by sglab bench -->"
)

// Insert replaces the part of a document between the two markers.
func Insert(document []byte, part string) ([]byte, error) {
	before, rest, ok := bytes.Cut(document, []byte(markBegin))
	if !ok {
		return nil, fmt.Errorf("the document has no line %q", markBegin)
	}
	_, after, ok := bytes.Cut(rest, []byte(markEnd))
	if !ok {
		return nil, fmt.Errorf("the document has no line %q after %q", markEnd, markBegin)
	}
	return bytes.Join([][]byte{before, []byte(markBegin + "\n\n" + part + "\n" + markEnd), after}, nil), nil
}

// Markdown is the report for a document: where and how it was measured, the table,
// and the runs behind it.
func (r *Report) Markdown(command string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Measured on %s with `%s`, in %s: %s.\n", r.Date.Format("2 January 2006"), command,
		(time.Duration(r.Seconds) * time.Second).String(), rounds(r.Rounds))
	fmt.Fprintf(&b, "Machine: %s, load before the bench %.1f. QEMU %s, %s.\n", r.Machine, r.Machine.Load, r.QEMU, strings.ToUpper(r.Accelerator))
	fmt.Fprintf(&b, "Guests: one with %d MiB over shaped links (source at %d Mbit/s), one with %d MiB without shaping.\n",
		r.Guest, r.Uplink/1e6, r.Large)
	pages, wrong, failed := r.Verified()
	fmt.Fprintf(&b, "Guests verified %d pages in %d runs: %d wrong, %d runs failed.\n\n", pages, len(r.Runs), wrong, failed)
	b.WriteString("| what | target | median | spread (rounds) | verdict | behind the median |\n|---|---|---|---|---|---|\n")
	for i := range r.Rows {
		row := &r.Rows[i]
		value, spread, detail := row.Result()
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", row.Title, row.Target, value, spread, row.Judge(), detail)
	}
	return b.String() + r.runs()
}

func rounds(n int) string {
	if n == 1 {
		return "1 round"
	}
	return fmt.Sprintf("median of %d rounds", n)
}

// runs is the table of all runs of the first round.
func (r *Report) runs() string {
	var b strings.Builder
	b.WriteString("\nThe runs of the first round:\n\n")
	b.WriteString("| run | limit | source free | total | downtime | faults | p50 | p99 | longest stall |\n|---|---|---|---|---|---|---|---|---|\n")
	for _, m := range r.Runs {
		if m.Round != 1 {
			continue
		}
		if m.Error != "" {
			first, _, _ := strings.Cut(m.Error, "\n")
			fmt.Fprintf(&b, "| %s | failed: %s |\n", m.Scenario, strings.ReplaceAll(first, "|", "/"))
			continue
		}
		fmt.Fprintf(&b, "| %s | %.2f s | %.2f s | %.2f s | %.0f ms | %d | %.1f ms | %.1f ms | %.0f ms |\n", m.Scenario, m.LimitSeconds,
			m.EvictionSeconds, m.TotalMigrationSeconds, m.DowntimeMs, m.FaultCount,
			float64(m.FaultP50Us)/1e3, float64(m.FaultP99Us)/1e3, m.LongestStallMs)
	}
	return b.String()
}
