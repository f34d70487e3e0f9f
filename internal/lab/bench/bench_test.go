// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"scattergather.io/scattergather/internal/lab"
)

func TestPlansMakeSense(t *testing.T) {
	for _, quick := range []bool{false, true} {
		rows := newPlan(quick).rows()
		first, later := scenarios(rows, 0), scenarios(rows, 1)
		specs := map[string]lab.Spec{}
		for _, s := range first {
			if err := s.spec.Validate(); err != nil {
				t.Errorf("quick %v, %s: %v", quick, s.name, err)
			}
			if _, twice := specs[s.name]; twice {
				t.Errorf("quick %v: scenario %s is run twice in a round", quick, s.name)
			}
			specs[s.name] = s.spec
		}
		if len(later) >= len(first) || len(later) == 0 {
			t.Errorf("quick %v: %d runs in the first round, %d in a later one", quick, len(first), len(later))
		}
		for _, r := range rows {
			for _, s := range r.needs {
				if diff := cmp.Diff(specs[s.name], s.spec); diff != "" {
					t.Errorf("quick %v, row %q: two scenarios are called %s:\n%s", quick, r.Title, s.name, diff)
				}
			}
		}
	}
}

// TestALinkIsTheLimit checks that the scenarios meant to be limited by the source's
// link have takers enough, and that those of the model have not until the last.
func TestALinkIsTheLimit(t *testing.T) {
	p := newPlan(false)
	takers := func(s scenario) int64 {
		sum := s.spec.Destination.Down
		for _, i := range s.spec.Intermediaries {
			sum += i.Down
		}
		return sum
	}
	if s := p.slow(12, lab.ScatterGather); takers(s) < uplink*11/10 {
		t.Errorf("%s: the takers take %d bit/s, the source sends %d", s.name, takers(s), int64(uplink))
	}
	for k := range modelMost + 1 {
		if got, all := takers(p.few(k)) > uplink, k == modelMost; got != all {
			t.Errorf("%d intermediaries: more than the source can send is %v", k, got)
		}
	}
}

func TestModel(t *testing.T) {
	p := newPlan(false)
	run := &lab.RunResult{LimitSeconds: 2 * goodput}
	var got []float64
	for k := range modelMost + 1 {
		got = append(got, predicted(p.few(k).spec, run))
	}
	want := []float64{2 / 0.16, 2 / 0.39, 2 / 0.62, 2 / 0.85, 2}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b float64) bool { return abs(a-b) < 1e-6 })); diff != "" {
		t.Errorf("eviction times by the model:\n%s", diff)
	}
}

func TestRowsComeFromOneRound(t *testing.T) {
	rows, err := choose(newPlan(false), []string{"total"})
	if err != nil || len(rows) != 1 {
		t.Fatalf("%d rows, %v", len(rows), err)
	}
	ours, stock := rows[0].needs[0].name, rows[0].needs[1].name
	run := func(s float64) *lab.RunResult { return &lab.RunResult{TotalMigrationSeconds: s} }
	got := evaluate(rows[0], []round{
		{ours: run(10), stock: run(10)},
		{ours: run(30)}, // stock's failed
		{ours: run(24), stock: run(20)},
		{stock: run(20)},
		{ours: run(21), stock: run(20)},
	})
	if diff := cmp.Diff([]float64{1, 1.2, 1.05}, got.Values); diff != "" {
		t.Errorf("values:\n%s", diff)
	}
	value, spread, detail := got.Result()
	if value != "1.05" || spread != "1 … 1.20 (3)" || detail != "21 s against 20 s" || got.Judge() != Met {
		t.Errorf("%s, %s, %s, %s", value, spread, detail, got.Judge())
	}
}

func TestVerdicts(t *testing.T) {
	for _, c := range []struct {
		target Target
		values []float64
		want   Verdict
		text   string
	}{
		{AtMost(1.1), []float64{1.1}, Met, "≤ 1.10"},
		{AtMost(1.1), []float64{1, 1.2}, Met, "≤ 1.10"},
		{AtMost(1.1), []float64{1, 1.3}, Missed, "≤ 1.10"},
		{AtMost(0), []float64{0}, Met, "≤ 0"},
		{AtMost(0), []float64{1}, Missed, "≤ 0"},
		{AtLeast(6), []float64{5.9}, Missed, "≥ 6"},
		{AtLeast(6), []float64{60}, Met, "≥ 6"},
		{Between(0.9, 1.1), []float64{0.8}, Missed, "0.90 … 1.10"},
		{Target{}, []float64{7}, Informs, "–"},
		{AtMost(1), nil, Unknown, "≤ 1"},
	} {
		r := Row{Target: c.target, Values: c.values}
		if got := r.Judge(); got != c.want || c.target.String() != c.text {
			t.Errorf("%v of %s: %s, want %s of %s", c.values, c.target, got, c.want, c.text)
		}
	}
}

func TestUnknownRowsAreNamed(t *testing.T) {
	_, err := choose(newPlan(true), []string{"limit", "speed"})
	if err == nil || !strings.Contains(err.Error(), `"speed"`) || !strings.Contains(err.Error(), "speedup") {
		t.Errorf("%v: want the wrong name and the right ones", err)
	}
}

func TestAllocationsAreRead(t *testing.T) {
	const output = `goos: linux
BenchmarkDecodePages-2             	  100	     900 ns/op	4550.1 MB/s	       0 B/op	       0 allocs/op
BenchmarkHotPath/LedgerPrecopy-2   	  100	      11 ns/op	       0 B/op	       0 allocs/op
BenchmarkHotPath/MapPlace          	  100	      11 ns/op	       8 B/op	       2 allocs/op
BenchmarkBulk/source-destination/seal=true/lanes=2-2  100  9 ns/op  7 cpu-s/GB  0 B/op  0 allocs/op
BenchmarkOpenMap-2                 	  100	      11 ns/op	     800 B/op	      99 allocs/op
`
	got := map[string][]float64{}
	for _, r := range allocationRows([]byte(output)) {
		got[strings.Fields(strings.TrimPrefix(r.Title, "allocations for each page, "))[0]] = r.Values
	}
	want := map[string][]float64{"scatter": {0}, "intermediary": nil, "gather": {2}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("allocations:\n%s", diff)
	}
}

func TestMemoryOfAGibibyte(t *testing.T) {
	for _, r := range memoryRows() {
		// A byte a page for the map and a bit for the ledger are the least.
		if v := r.Values[0]; v < 32 || v > 1024 {
			t.Errorf("%s: %v", r.Title, v)
		}
	}
}

func TestInsert(t *testing.T) {
	doc := []byte("before\n" + markBegin + "\nold\n" + markEnd + "\nafter\n")
	once, err := Insert(doc, "new")
	if err != nil {
		t.Fatal(err)
	}
	if want := "before\n" + markBegin + "\n\nnew\n" + markEnd + "\nafter\n"; string(once) != want {
		t.Errorf("got %q, want %q", once, want)
	}
	twice, err := Insert(once, "new")
	if err != nil || string(twice) != string(once) {
		t.Errorf("inserting twice changed it: %v\n%s", err, twice)
	}
	for _, bad := range []string{"", markBegin, markEnd + markBegin} {
		if _, err := Insert([]byte(bad), "new"); err == nil {
			t.Errorf("%q has no markers in order, but no error came", bad)
		}
	}
}
