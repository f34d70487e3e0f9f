// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"encoding/json"
	"fmt"
	"time"
)

// Result is result.json: the runs of one comparison on the same links.
type Result struct {
	Runs        []RunResult      `json:"runs"`
	Links       map[string]Rates `json:"links"`
	QEMU        string           `json:"qemu"`
	Accelerator string           `json:"accelerator"`
}

// RunResult is the measurement of one method. With several VMs the times are
// those of the whole group, from the first start to the last end; downtime,
// stall and fault latencies are those of the VM that fared worst, and counts
// are sums.
type RunResult struct {
	Method string `json:"method"`
	// EvictionSeconds runs until nothing is needed from the source any more.
	EvictionSeconds float64 `json:"eviction_seconds"`
	// TotalMigrationSeconds runs until the destination holds every page.
	TotalMigrationSeconds float64 `json:"total_migration_seconds"`
	// DowntimeMs is the guest's own gap at the switch.
	DowntimeMs float64 `json:"downtime_ms"`
	// LimitSeconds is the time that the bytes that had to leave take on the
	// source's link alone.
	LimitSeconds float64 `json:"limit_seconds"`
	// FaultCount counts first touches after the switch slower than 200 us, as
	// the guest saw them; P50 and P99 are of those.
	FaultCount uint64 `json:"fault_count"`
	FaultP50Us uint64 `json:"fault_p50_us"`
	FaultP99Us uint64 `json:"fault_p99_us"`
	// LongestStallMs is the longest time without a sign of life, the switch
	// excepted.
	LongestStallMs float64 `json:"longest_stall_ms"`
	PagesVerified  uint64  `json:"pages_verified"`
	PagesWrong     uint64  `json:"pages_wrong"`
	// BytesSourceOut and BytesDestinationIn are bytes on the wire.
	BytesSourceOut     uint64 `json:"bytes_source_out"`
	BytesDestinationIn uint64 `json:"bytes_destination_in"`
	// BytesByIntermediary is what each intermediary received, on the wire.
	BytesByIntermediary map[string]uint64 `json:"bytes_by_intermediary"`
	// Error says why the run failed; its numbers are then those up to there.
	Error string `json:"error,omitempty"`

	Timeline *Timeline `json:"-"`
}

// Timeline is what happened when, in seconds since the start of the migration.
type Timeline struct {
	Step     float64 // width of an entry of the series
	From     float64 // of the first entry: negative, the time before the start
	Switched float64 // the guest was last heard from the source
	Resumed  float64 // and first heard from the destination
	Released float64
	End      float64
	// Links has, for every node in order, the bits per second that its link
	// carried in each step.
	Links []LinkSeries
	// Served is the requests per second that all guests served.
	Served []float64
}

// LinkSeries is the traffic of one node.
type LinkSeries struct {
	Node    string
	Out, In []float64
}

// JSON is the file's content.
func (r *Result) JSON() []byte {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		panic("lab: result.json: " + err.Error()) // plain numbers and strings
	}
	return append(b, '\n')
}

// Run finds a method's run.
func (r *Result) Run(method string) *RunResult {
	for i := range r.Runs {
		if r.Runs[i].Method == method {
			return &r.Runs[i]
		}
	}
	return nil
}

// Sentence is the one that matters: how long the source was held.
func (r *Result) Sentence() string {
	ours, theirs := r.Run(ScatterGather), r.Run(StockPostcopy)
	if ours == nil {
		ours = r.Run(ScatterGatherHybrid)
	}
	if theirs == nil {
		theirs = r.Run(StockPrecopy)
	}
	name := map[bool]string{true: "pre-copy", false: "post-copy"}[theirs != nil && theirs.Method == StockPrecopy]
	switch {
	case ours != nil && theirs != nil && ours.Error == "" && theirs.Error == "":
		return fmt.Sprintf("The source was free after %.1f s; stock %s held it for %.1f s (%.1f times as long).",
			ours.EvictionSeconds, name, theirs.EvictionSeconds, theirs.EvictionSeconds/ours.EvictionSeconds)
	case len(r.Runs) > 0 && r.Runs[0].Error == "":
		return fmt.Sprintf("%s: the source was free after %.1f s.", r.Runs[0].Method, r.Runs[0].EvictionSeconds)
	}
	return "No run came to its end."
}

func seconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1e6 }
func millis(d time.Duration) float64  { return float64(d.Microseconds()) / 1e3 }
