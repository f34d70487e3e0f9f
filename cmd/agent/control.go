// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"scattergather.io/scattergather/internal/agent"
)

// maxSpec bounds a request that is read from a file, in bytes.
const maxSpec = 1 << 20

// clientCommand is a command that talks to the agent at --control.
func clientCommand(cmd *cobra.Command, do func(cmd *cobra.Command, c *agent.Client, args []string) error) *cobra.Command {
	path := cmd.Flags().String("control", "/run/scatter-gather.sock", "path of the agent's control socket")
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return do(cmd, agent.NewClient(*path), args) }
	return cmd
}

func statusCommand() *cobra.Command {
	return clientCommand(&cobra.Command{
		Use: "status", Short: "Print the agent's pool and migrations as JSON", Args: cobra.NoArgs,
		Example: "  agent status --control /run/sg.sock",
	}, func(cmd *cobra.Command, c *agent.Client, _ []string) error {
		st, err := c.Node(cmd.Context())
		if err != nil {
			return err
		}
		return print(cmd.OutOrStdout(), st, "  ")
	})
}

func startCommand() *cobra.Command {
	return clientCommand(&cobra.Command{
		Use: "start FILE", Short: "Ask for one half of a migration, as a JSON file describes it", Args: cobra.ExactArgs(1),
		Example: `  # The destination first: its QEMU was started with -incoming defer.
  agent start destination.json --control /run/sg-b.sock
  # Then the source.
  agent start source.json --control /run/sg-a.sock`,
	}, func(cmd *cobra.Command, c *agent.Client, args []string) error {
		f, err := os.Open(args[0])
		if err != nil {
			return err
		}
		defer f.Close()
		var spec agent.Spec
		dec := json.NewDecoder(io.LimitReader(f, maxSpec))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&spec); err != nil {
			return fmt.Errorf("reading %s: %w", args[0], err)
		}
		st, err := c.Start(cmd.Context(), spec)
		if err != nil {
			return err
		}
		return print(cmd.OutOrStdout(), st, "  ")
	})
}

func watchCommand() *cobra.Command {
	return clientCommand(&cobra.Command{
		Use: "watch ID", Short: "Print how a migration stands, a JSON object a line, until it has ended", Args: cobra.ExactArgs(1),
		Example: "  agent watch 3f0a8a52-7d38-4a8e-9a51-6c1f2f9b4a77 --control /run/sg.sock",
	}, func(cmd *cobra.Command, c *agent.Client, args []string) error {
		last, err := c.Watch(cmd.Context(), args[0], func(st agent.Status) {
			_ = print(cmd.OutOrStdout(), st, "") // a closed pipe ends the command by its signal
		})
		if err == nil && last.State == agent.StateFailed {
			err = fmt.Errorf("migration %s failed: %s", args[0], last.Error)
		}
		return err
	})
}

func cancelCommand() *cobra.Command {
	return clientCommand(&cobra.Command{
		Use: "cancel ID", Short: "End a migration that has not moved the CPU yet; the VM goes on at its source", Args: cobra.ExactArgs(1),
		Example: "  agent cancel 3f0a8a52-7d38-4a8e-9a51-6c1f2f9b4a77 --control /run/sg.sock",
	}, func(cmd *cobra.Command, c *agent.Client, args []string) error {
		return c.Cancel(cmd.Context(), args[0])
	})
}

func print(w io.Writer, v any, indent string) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", indent)
	return enc.Encode(v)
}
