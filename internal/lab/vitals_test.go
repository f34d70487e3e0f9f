// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"scattergather.io/scattergather/internal/lab/guest"
)

func TestVitalsTellDowntimeAndStallsApart(t *testing.T) {
	began := time.Unix(1000, 0)
	at := func(ms int) time.Time { return began.Add(time.Duration(ms) * time.Millisecond) }
	g := NewGuest("vm")
	served := uint32(0)
	for _, b := range []struct {
		side      Side
		host, own int // ms
		requests  uint32
	}{
		{AtSource, 0, 5000, 1},
		{AtSource, 100, 5100, 10},
		{AtSource, 140, 5140, 4},
		{AtDestination, 200, 5145, 2}, // the guest's clock stood still: no stall
		{AtDestination, 390, 5335, 6}, // waiting for a page
		{AtDestination, 399, 5344, 1},
	} {
		served += b.requests
		frame := guest.AppendBeat(nil, guest.Beat{Nanos: uint64(b.own) * 1e6, Served: served})
		g.hear(b.side, at(b.host), frame)
	}
	select {
	case <-g.Resumed():
	default:
		t.Error("the guest was heard from the destination, but Resumed is open")
	}
	want := Vitals{Switched: at(140), Resumed: at(200), LongestStall: 190 * time.Millisecond, Served: []int{0, 14, 2, 7, 0}}
	if diff := cmp.Diff(want, g.Vitals(at(0), at(400), 100*time.Millisecond)); diff != "" {
		t.Errorf("vitals (-want +got):\n%s", diff)
	}
	if got := g.clockAt(at(250)); got != 5145e6 {
		t.Errorf("the guest's clock at 250 ms is %d, want that of the beat before: 5145e6", got)
	}
}

// A frame that the switch cuts in two comes out of both ports in order.
func TestABeatCutByTheSwitchIsPutTogether(t *testing.T) {
	g := NewGuest("vm")
	frame := guest.AppendBeat(nil, guest.Beat{Seq: 7, Nanos: 1})
	g.hear(AtSource, time.Now(), frame[:9])
	g.hear(AtDestination, time.Now(), frame[9:])
	if len(g.beats) != 1 || g.beats[0].Seq != 7 || g.decoder.Skipped() != 0 {
		t.Errorf("beats %+v, %d bytes skipped", g.beats, g.decoder.Skipped())
	}
}

func TestSeriesInterpolatesCounters(t *testing.T) {
	began := time.Unix(1000, 0)
	samples := []Sample{
		{At: began, Nodes: []Traffic{{Out: 100, In: 0}}},
		{At: began.Add(100 * time.Millisecond), Nodes: []Traffic{{Out: 1100, In: 0}}},
		{At: began.Add(200 * time.Millisecond), Nodes: []Traffic{{Out: 1100, In: 500}}},
	}
	out, in := series(samples, 0, began, 50*time.Millisecond, 5)
	if diff := cmp.Diff([]float64{80_000, 80_000, 0, 0, 0}, out); diff != "" {
		t.Errorf("bits per second out (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]float64{0, 0, 40_000, 40_000, 0}, in); diff != "" {
		t.Errorf("bits per second in (-want +got):\n%s", diff)
	}
}

func TestTheSentenceComparesWhatRan(t *testing.T) {
	ours := RunResult{Method: ScatterGather, EvictionSeconds: 1.3}
	post := RunResult{Method: StockPostcopy, EvictionSeconds: 9.8}
	pre := RunResult{Method: StockPrecopy, EvictionSeconds: 13}
	broken := RunResult{Method: StockPostcopy, Error: "no"}
	for _, c := range []struct {
		runs []RunResult
		want string
	}{
		{[]RunResult{pre, post, ours}, "The source was free after 1.3 s; stock post-copy held it for 9.8 s (7.5 times as long)."},
		{[]RunResult{pre, ours}, "The source was free after 1.3 s; stock pre-copy held it for 13.0 s (10.0 times as long)."},
		{[]RunResult{ours, broken}, "scatter-gather: the source was free after 1.3 s."},
		{[]RunResult{broken}, "No run came to its end."},
	} {
		if got := (&Result{Runs: c.runs}).Sentence(); got != c.want {
			t.Errorf("sentence %q, want %q", got, c.want)
		}
	}
}
