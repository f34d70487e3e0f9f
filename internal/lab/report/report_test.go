// SPDX-License-Identifier: Apache-2.0

package report

import (
	"encoding/xml"
	"errors"
	"io"
	"regexp"
	"strings"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/lab"
)

func sample() *lab.Result {
	rates := []float64{0, 8e8, 16e8, 4e8, 0}
	timeline := func(end float64) *lab.Timeline {
		return &lab.Timeline{
			Step: 0.5, From: -0.5, Switched: 0.2, Resumed: 0.25, Released: end / 2, End: end,
			Links:  []lab.LinkSeries{{Node: "source", Out: rates, In: rates}, {Node: "destination", Out: rates, In: rates}, {Node: "intermediary-1", Out: rates, In: rates}},
			Served: []float64{400, 0, 100, 400, 400},
		}
	}
	return &lab.Result{
		QEMU: "10.0.2", Accelerator: "tcg", Links: map[string]lab.Rates{"source": {Up: 16e8, Down: 16e8}, "intermediary-10": {}, "intermediary-9": {}, "destination": {}},
		Runs: []lab.RunResult{
			{Method: lab.StockPrecopy, Error: "it broke: <script>"},
			{Method: lab.StockPostcopy, EvictionSeconds: 9.8, LimitSeconds: 1.2, Timeline: timeline(9.8)},
			{Method: lab.ScatterGather, EvictionSeconds: 1.3, LimitSeconds: 1.2, Timeline: timeline(10)},
		},
	}
}

func TestReportSaysWhatMattersAndNeedsNothingElse(t *testing.T) {
	page, err := HTML(sample(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	text := string(page)
	for _, want := range []string{
		"The source was free after 1.3 s; stock post-copy held it for 9.8 s",
		"source free 4.90 s", "CPU moved 0.25 s", "it broke: &lt;script&gt;",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the report does not say %q", want)
		}
	}
	if strings.Index(text, "<td>intermediary-9</td>") > strings.Index(text, "<td>intermediary-10</td>") {
		t.Error("intermediary 10 comes before 9")
	}
	if m := regexp.MustCompile(`(?:src|href)=|url\(|https?://`).FindString(text); m != "" {
		t.Errorf("the report refers to something outside itself: %q", m)
	}
	if strings.Contains(text, "NaN") || strings.Contains(text, "Inf") {
		t.Error("the report has numbers that are none")
	}
}

func TestPanelsAreWellFormed(t *testing.T) {
	page, err := HTML(sample(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	panels := regexp.MustCompile(`(?s)<svg.*?</svg>`).FindAll(page, -1)
	if len(panels) != 2 {
		t.Fatalf("%d panels, want one for each run that came to its end: 2", len(panels))
	}
	for _, p := range panels {
		d := xml.NewDecoder(strings.NewReader(string(p)))
		for {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%v in\n%s", err, p)
			}
		}
	}
}
