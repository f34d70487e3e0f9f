// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"scattergather.io/scattergather/internal/lab"
	"scattergather.io/scattergather/internal/lab/bench"
)

// benchFlags are the flags of bench.
type benchFlags struct {
	groups   []string
	rounds   int
	quick    bool
	out      string
	micro    string
	document string
}

func newBenchCommand() *cobra.Command {
	var f benchFlags
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure what the project promises, each number a ratio taken in one round",
		Long: `Bench measures the table of docs/benchmarks.md. Each row is a ratio of two runs of
the same round on this machine, so that the machine's speed drops out; the table
shows the median over the rounds and the spread.

The links are shaped so slow that they are what every method waits for. Still,
leave the machine alone while the bench runs. It takes about 20 minutes on two
processors, and about 5 with --quick.

A missed target is shown and is no failure. The exit code is not 0 when a guest
found a wrong page or a run failed.

Rows: ` + strings.Join(bench.Groups(), ", ") + `.`,
		Example: `  # The whole table, three times:
  sglab bench

  # Two groups of rows, five times each:
  sglab bench --rows limit,downtime --repeat 5

  # A first look, smaller guests, no row that takes long:
  sglab bench --quick

  # What "make bench" does: Go benchmarks too, and the table into the document:
  go test -run '^$' -bench . -benchmem ./internal/... > out/bench/micro.txt
  sglab bench --micro out/bench/micro.txt --write-doc docs/benchmarks.md`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rounds := cmd.Flags().Lookup("repeat")
			if f.quick && !rounds.Changed {
				f.rounds = 1
			}
			return f.execute(cmd.Context())
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringSliceVar(&f.groups, "rows", nil, "groups of rows to measure (default all): "+strings.Join(bench.Groups(), ", "))
	flags.IntVar(&f.rounds, "repeat", 3, "rounds; 1 unless given with --quick")
	flags.BoolVar(&f.quick, "quick", false, "smaller guests, and without the rows that take longest")
	flags.StringVar(&f.out, "out", "out/bench", "directory for bench.json and table.md")
	flags.StringVar(&f.micro, "micro", "", "output of the Go benchmarks, for the rows of allocations")
	flags.StringVar(&f.document, "write-doc", "", "document whose part between the two markers is replaced by the table")
	return cmd
}

func (f *benchFlags) execute(ctx context.Context) error {
	if f.rounds < 1 {
		return fmt.Errorf("--repeat %d: want at least 1", f.rounds)
	}
	assets, err := lab.FindAssets(ctx)
	if err != nil {
		return err
	}
	screen, began := newScreen(os.Stdout), time.Now()
	o := bench.Options{
		Groups: f.groups, Rounds: f.rounds, Quick: f.quick, Watch: screen.update,
		Method: func(name string) (lab.Method, error) {
			chosen, err := chooseMethods([]string{name})
			if err != nil {
				return nil, err
			}
			return chosen[0], nil
		},
		Begin: func(number, of, round int, scenario string) {
			fmt.Printf("[%d/%d, round %d of %d, %v so far] %s\n", number, of, round, f.rounds, time.Since(began).Round(time.Second), scenario)
		},
	}
	if f.micro != "" {
		if o.Micro, err = os.ReadFile(f.micro); err != nil {
			return fmt.Errorf("reading the Go benchmarks' output: %w", err)
		}
	}
	report, err := bench.Run(ctx, assets, o)
	if report == nil || ctx.Err() != nil {
		return err
	}
	printBench(os.Stdout, report)
	return errors.Join(err, f.write(report))
}

// write writes the results' files and, if asked for, into the document.
func (f *benchFlags) write(report *bench.Report) error {
	data, err := report.JSON()
	if err != nil {
		return err
	}
	table := report.Markdown(f.command())
	if err := os.MkdirAll(f.out, 0o755); err != nil {
		return err
	}
	for name, data := range map[string][]byte{"bench.json": data, "table.md": []byte(table)} {
		if err := os.WriteFile(filepath.Join(f.out, name), data, 0o644); err != nil {
			return fmt.Errorf("writing the results: %w", err)
		}
	}
	fmt.Printf("All runs: %s, the table: %s\n", filepath.Join(f.out, "bench.json"), filepath.Join(f.out, "table.md"))
	if f.document == "" {
		return nil
	}
	document, err := os.ReadFile(f.document)
	if err != nil {
		return fmt.Errorf("--write-doc: %w", err)
	}
	if document, err = bench.Insert(document, table); err != nil {
		return fmt.Errorf("--write-doc %s: %w", f.document, err)
	}
	return os.WriteFile(f.document, document, 0o644)
}

// command is what somebody else types to measure the same.
func (f *benchFlags) command() string {
	if len(f.groups) == 0 && f.micro != "" {
		if f.quick {
			return "make bench QUICK=1"
		}
		return "make bench"
	}
	c := "sglab bench"
	if len(f.groups) > 0 {
		c += " --rows " + strings.Join(f.groups, ",")
	}
	if f.quick {
		c += " --quick"
	}
	return fmt.Sprintf("%s --repeat %d", c, f.rounds)
}

// printBench prints the table.
func printBench(out io.Writer, report *bench.Report) {
	fmt.Fprintln(out)
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "what\ttarget\tmedian\tspread (rounds)\tverdict\tbehind the median")
	missed := 0
	for i := range report.Rows {
		row := &report.Rows[i]
		value, spread, detail := row.Result()
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", row.Title, row.Target, value, spread, row.Judge(), detail)
		if row.Judge() == bench.Missed {
			missed++
		}
	}
	_ = t.Flush() // the rows are in the result file too
	pages, wrong, failed := report.Verified()
	fmt.Fprintf(out, "\n%d runs, %d failed; %d pages verified, %d wrong; %d targets missed.\n", len(report.Runs), failed, pages, wrong, missed)
}
