// SPDX-License-Identifier: Apache-2.0

// Sglab runs live migrations of real QEMU guests between several nodes on one
// machine, by scatter-gather and by stock QEMU, and measures them side by side.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"scattergather.io/scattergather/internal/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	err := newCommand().ExecuteContext(ctx)
	interrupted := ctx.Err() != nil
	stop()
	switch {
	case interrupted:
		fmt.Fprintln(os.Stderr, "sglab: interrupted; everything is cleaned up")
		os.Exit(130)
	case err != nil:
		fmt.Fprintln(os.Stderr, "sglab:", err)
		os.Exit(1)
	}
}

func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "sglab",
		Short: "Migrate real QEMU guests between nodes on one machine",
		Long: `Sglab builds several nodes on this machine (network namespaces with shaped
links), boots real guests under stock QEMU on one of them, and moves them to
another: by scatter-gather through intermediaries, or by stock QEMU. The guests
verify every page of their memory and tell how the migration felt to them.

It needs root, and what hack/setup.sh installs. Whatever happens, nothing stays
behind; what a killed run left is cleared by the next one or by "sglab clean".`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(newRunCommand(), newCompareCommand(), newBenchCommand(), newCleanCommand())
	return root
}

func newRunCommand() *cobra.Command {
	f := newSceneFlags()
	var method, strategy, out string
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run one migration and measure it",
		Example: `  # Scatter-gather, CPU first, through two intermediaries:
  sglab run --intermediaries 2

  # Memory first into the pool, then the CPU, then the dirty rest:
  sglab run --strategy hybrid --dirty-rate 4000

  # Stock post-copy of two VMs over a fast link to a slow destination:
  sglab run --method stock-postcopy --vms 2 --source-rate 1G --destination-rate 100M`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if method == lab.ScatterGather && strategy == "hybrid" {
				method = lab.ScatterGatherHybrid
			} else if strategy != "hybrid" && strategy != "immediate" {
				return fmt.Errorf("--strategy %s: want immediate or hybrid", strategy)
			}
			return execute(cmd.Context(), f, []string{method}, out)
		},
	}
	f.register(cmd)
	cmd.Flags().StringVar(&method, "method", lab.ScatterGather, "how to move the VMs: "+methodNames())
	cmd.Flags().StringVar(&strategy, "strategy", "immediate", "of scatter-gather: immediate (CPU first) or hybrid (one pass of memory first)")
	cmd.Flags().StringVar(&out, "out", "out/run", "directory for result.json and report.html")
	return cmd
}

func newCompareCommand() *cobra.Command {
	f := newSceneFlags()
	var methods []string
	var out string
	cmd := &cobra.Command{
		Use:   "compare",
		Short: "Run stock QEMU and scatter-gather on the same links, side by side",
		Example: `  # The demonstration: all methods, the destination's link at 1/8 of the source's:
  sglab compare

  # Only two of them, with a destination at a quarter:
  sglab compare --methods stock-postcopy,scatter-gather --destination-rate 400M`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return execute(cmd.Context(), f, methods, out)
		},
	}
	f.register(cmd)
	var all []string
	for _, m := range allMethods() {
		all = append(all, m.Name())
	}
	cmd.Flags().StringSliceVar(&methods, "methods", all, "methods to compare, in this order")
	cmd.Flags().StringVar(&out, "out", "out/demo", "directory for result.json and report.html")
	return cmd
}

func newCleanCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "clean",
		Short: "Clear what crashed runs left behind",
		Long: `Clean ends the processes and removes the namespaces and directories of runs
that are no longer alive. Runs that are alive are left alone.`,
		Example: "  sglab clean",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			cleared, err := lab.Clean()
			for _, id := range cleared {
				fmt.Println("cleared run", id)
			}
			if len(cleared) == 0 && err == nil {
				fmt.Println("nothing to clear")
			}
			return err
		},
	}
}

// execute runs methods one after the other on the same kind of scene and writes
// the results. A method that fails does not keep the others from running.
func execute(ctx context.Context, f *sceneFlags, names []string, out string) error {
	spec, err := f.spec()
	if err != nil {
		return err
	}
	methods, err := chooseMethods(names)
	if err != nil {
		return err
	}
	assets, err := lab.FindAssets(ctx)
	if err != nil {
		return err
	}
	screen := newScreen(os.Stdout)
	screen.intro(assets, spec)
	result := &lab.Result{Links: spec.Links(), QEMU: assets.Version, Accelerator: assets.Accelerator}
	var errs []error
	for _, m := range methods {
		run, err := lab.Run(ctx, assets, spec, m, screen.update)
		result.Runs = append(result.Runs, *run)
		errs = append(errs, err)
		if ctx.Err() != nil {
			return errors.Join(errs...)
		}
	}
	screen.summary(result)
	return errors.Join(errors.Join(errs...), writeResults(out, result))
}
