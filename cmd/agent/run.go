// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"

	"scattergather.io/scattergather/internal/agent"
	"scattergather.io/scattergather/internal/wire"
)

type runOptions struct {
	node, listen, stateDir, control string
	cert, key, ca                   string
	poolMiB, reserveMiB             uint64
	lanes, verbosity                int
}

func runCommand() *cobra.Command {
	var o runOptions
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Serve as this node's agent",
		Example: `  agent run --node node-a --listen 10.0.0.1:7470 --state-dir /dev/shm/scatter-gather \
    --cert node-a.crt --key node-a.key --ca ca.crt --pool-mib 4096 --control /run/sg.sock`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), o) },
	}
	f := cmd.Flags()
	f.StringVar(&o.node, "node", "", "name of this node, as in its certificate")
	f.StringVar(&o.listen, "listen", ":7470", "host:port of the data plane")
	f.StringVar(&o.stateDir, "state-dir", "/dev/shm/scatter-gather", "folder on tmpfs for the pool and for gathers; it outlives the process")
	f.StringVar(&o.control, "control", "/run/scatter-gather.sock", "path of the control socket")
	f.StringVar(&o.cert, "cert", "", "PEM file with this node's certificate (read again when it changes)")
	f.StringVar(&o.key, "key", "", "PEM file with its private key")
	f.StringVar(&o.ca, "ca", "", "PEM file with the authorities of peers' certificates")
	f.Uint64Var(&o.poolMiB, "pool-mib", 0, "memory lent to other nodes' migrations, in MiB; 0 lends none")
	f.Uint64Var(&o.reserveMiB, "reserve-mib", 512, "memory of this node that is never lent, in MiB")
	f.IntVar(&o.lanes, "lanes", 2, "bulk connections to each peer")
	f.IntVarP(&o.verbosity, "verbosity", "v", 0, "log detail: 0, 1 or 2")
	for _, name := range []string{"node", "cert", "key", "ca"} {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic(err) // a flag that this function has not defined
		}
	}
	return cmd
}

func run(ctx context.Context, o runOptions) error {
	log := logr.FromSlogHandler(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.Level(-o.verbosity)})).
		WithValues("node", o.node)
	creds, err := wire.FileCredentials(o.cert, o.key, o.ca)
	if err != nil {
		return fmt.Errorf("loading credentials: %w", err)
	}
	own, err := creds()
	if err != nil {
		return fmt.Errorf("loading credentials: %w", err)
	}
	id, err := own.Identity()
	if err != nil {
		return fmt.Errorf("certificate %s names no node, so peers would refuse this agent: %w", o.cert, err)
	}
	if string(id) != o.node {
		return fmt.Errorf("certificate %s is for node %q, not for %q: peers would refuse this agent", o.cert, id, o.node)
	}
	a, err := agent.New(agent.Config{
		Node: o.node, Listen: o.listen, StateDir: o.stateDir,
		Wire:      wire.Options{Credentials: creds, Lanes: o.lanes, Log: log, Software: "agent"},
		PoolBytes: o.poolMiB << 20, PoolReserveBytes: o.reserveMiB << 20, Log: log,
	})
	if err != nil {
		return err
	}
	log.Info("Serving", "dataPlane", a.Address(), "control", o.control)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	control := make(chan error, 1)
	go func() {
		defer cancel() // without its control socket an agent is of no use
		control <- a.ServeControl(ctx, o.control)
	}()
	err = a.Run(ctx)
	cancel()
	return errors.Join(err, <-control)
}
