// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bufio"
	"bytes"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// paths are the Go benchmarks that a page passes on its way, by the path.
var paths = []struct {
	title string
	names *regexp.Regexp
}{
	{"scatter path (QEMU's stream, ledger, sealing, sending)", regexp.MustCompile(
		`^BenchmarkDecodePages|^BenchmarkReceiver|^BenchmarkHotPath/Ledger|^BenchmarkBulk/.*seal=true`)},
	{"intermediary (receiving, storing, reading)", regexp.MustCompile(
		`^BenchmarkBulk/.*seal=false|^BenchmarkPut|^BenchmarkGet`)},
	{"gather path (receiving, opening, page map, order, stream to QEMU)", regexp.MustCompile(
		`^BenchmarkBulk/.*seal=true|^BenchmarkHotPath/(Map|Order)|^BenchmarkEncode|^BenchmarkDirect|^BenchmarkIntermediaries`)},
}

var allocsPerOp = regexp.MustCompile(`^(Benchmark\S+?)(?:-\d+)?\s.*?(\d+(?:\.\d+)?) allocs/op`)

// allocationRows reads the allocations per page off the output of Go benchmarks. A
// benchmark's operation is a page or a batch of them.
func allocationRows(output []byte) []Row {
	rows := make([]Row, len(paths))
	for i, p := range paths {
		rows[i] = Row{Group: GroupAllocations, Title: "allocations for each page, " + p.title, Target: AtMost(0)}
		worst, from, n := -1.0, "", 0
		for lines := bufio.NewScanner(bytes.NewReader(output)); lines.Scan(); {
			match := allocsPerOp.FindStringSubmatch(lines.Text())
			if match == nil || !p.names.MatchString(match[1]) {
				continue
			}
			n++
			if v, err := strconv.ParseFloat(match[2], 64); err == nil && v > worst {
				worst, from = v, strings.TrimPrefix(match[1], "Benchmark")
			}
		}
		if n == 0 {
			continue
		}
		rows[i].Values = []float64{worst}
		rows[i].Details = []string{fmt.Sprintf("most of %d benchmarks", n)}
		if worst > 0 {
			rows[i].Details[0] += ": " + from
		}
	}
	return rows
}
