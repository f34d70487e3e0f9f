// SPDX-License-Identifier: Apache-2.0

// Command agent is the node agent of Scatter-Gather: intermediary for its peers,
// source and destination for the migrations it is asked to do.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	if err := execute(); err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
		os.Exit(1)
	}
}

// execute runs the command line until it is done or a signal stops it.
func execute() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := &cobra.Command{
		Use:   "agent",
		Short: "Scatter-Gather's node agent",
		Long: `The agent ends and begins QEMU's migration stream on its node, so that a VM's
memory can be scattered to its destination and to the spare RAM of other nodes,
and gathered from there while the VM already runs.

One process plays all three roles: source, destination and intermediary. It is
driven through a control socket that only its own user can open.`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(runCommand(), statusCommand(), startCommand(), watchCommand(), cancelCommand())
	return root.ExecuteContext(ctx)
}
