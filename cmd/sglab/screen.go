// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"scattergather.io/scattergather/internal/lab"
)

// plainEvery is how often a phase tells its progress where there is no
// terminal to rewrite a line on.
const plainEvery = 5 * time.Second

// screen shows a run's progress: one line that is rewritten on a terminal, a
// new line now and then elsewhere.
type screen struct {
	out      io.Writer
	terminal bool
	width    int // of the terminal

	method string
	phase  lab.Phase
	told   time.Time
}

func newScreen(f *os.File) *screen {
	s := &screen{out: f}
	if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && os.Getenv("TERM") != "dumb" {
		s.terminal, s.width = true, int(size.Col)
	}
	return s
}

func (s *screen) intro(a *lab.Assets, spec lab.Spec) {
	fmt.Fprintf(s.out, "QEMU %s (%s), %d VM(s) of %d MiB; links: source %s, destination %s, %d intermediaries\n",
		a.Version, a.Accelerator, spec.VMs, spec.MemoryMiB, megabits(float64(spec.Source.Up)), megabits(float64(spec.Destination.Down)), len(spec.Intermediaries))
}

func megabits(bits float64) string {
	if bits == 0 {
		return "unshaped"
	}
	return fmt.Sprintf("%.0f Mbit/s", bits/1e6)
}

// update is called a few times a second and at each change of phase.
func (s *screen) update(u lab.Update) {
	changed := u.Method != s.method || u.Phase != s.phase
	if !s.terminal && !changed && time.Since(s.told) < plainEvery {
		return
	}
	if u.Phase == lab.PhaseDone {
		s.finish(u)
		return
	}
	s.method, s.phase, s.told = u.Method, u.Phase, time.Now()
	line := fmt.Sprintf("%-24s %s, %.1f s", u.Method, u.Phase, u.Elapsed.Seconds())
	if u.Phase == lab.PhaseMigrate {
		where, held := "guest at the source", "source held"
		if u.Switched {
			where = "guest at the destination"
		}
		if u.Released {
			held = "source FREE"
		}
		line += fmt.Sprintf(" | source out %s, %d MiB | destination in %s | %s | %s",
			megabits(max(u.SourceOut, 1)), u.Sent>>20, megabits(max(u.DestinationIn, 1)), where, held)
	}
	s.print(line)
}

func (s *screen) print(line string) {
	if !s.terminal {
		fmt.Fprintln(s.out, line)
		return
	}
	if s.width > 0 && len(line) >= s.width {
		line = line[:s.width-1]
	}
	fmt.Fprint(s.out, "\r\x1b[K", line)
}

func (s *screen) finish(u lab.Update) {
	if s.terminal {
		fmt.Fprint(s.out, "\r\x1b[K")
	}
	s.method, s.phase = "", ""
	r := u.Result
	if r.Error != "" {
		first, _, _ := strings.Cut(r.Error, "\n")
		fmt.Fprintf(s.out, "%-24s FAILED: %s\n", r.Method, first)
		return
	}
	fmt.Fprintf(s.out, "%-24s source free after %.2f s, all at the destination after %.2f s, downtime %.0f ms, %d pages verified, %d wrong\n",
		r.Method, r.EvictionSeconds, r.TotalMigrationSeconds, r.DowntimeMs, r.PagesVerified, r.PagesWrong)
}

// summary prints the table of all runs and the sentence that matters.
func (s *screen) summary(result *lab.Result) {
	fmt.Fprintln(s.out)
	t := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "method\tsource free\tlimit\ttotal\tdowntime\tfaults\tp50\tp99\tlongest stall\tsource out\tverified\twrong\t")
	for _, r := range result.Runs {
		if r.Error != "" {
			fmt.Fprintf(t, "%s\tfailed\t\t\t\t\t\t\t\t\t%d\t%d\t\n", r.Method, r.PagesVerified, r.PagesWrong)
			continue
		}
		fmt.Fprintf(t, "%s\t%.2f s\t%.2f s\t%.2f s\t%.0f ms\t%d\t%.1f ms\t%.1f ms\t%.0f ms\t%d MiB\t%d\t%d\t\n",
			r.Method, r.EvictionSeconds, r.LimitSeconds, r.TotalMigrationSeconds, r.DowntimeMs, r.FaultCount,
			float64(r.FaultP50Us)/1e3, float64(r.FaultP99Us)/1e3, r.LongestStallMs, r.BytesSourceOut>>20, r.PagesVerified, r.PagesWrong)
	}
	_ = t.Flush() // the rows are in the result file too
	fmt.Fprintln(s.out)
	fmt.Fprintln(s.out, result.Sentence())
}
