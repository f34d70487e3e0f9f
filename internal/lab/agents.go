// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"scattergather.io/scattergather/internal/agent"
	"scattergather.io/scattergather/internal/wire"
)

// agentPort is the TCP port of every agent's data plane.
const agentPort = 7470

// certificateTTL outlives any run.
const certificateTTL = 24 * time.Hour

// AgentOptions say how the agents of a scene are started.
type AgentOptions struct {
	// Binary is the path of the agent's program.
	Binary string
	// PoolMiB is what each intermediary lends; 0 means twice the memory of all VMs.
	PoolMiB int
	// Lanes is the number of bulk connections between two agents; 0 means 2.
	Lanes int
	// Verbosity is the detail of the agents' logs.
	Verbosity int
}

// Agents are the node agents of a scene, one process a node.
type Agents struct {
	opts  AgentOptions
	scene *Scene
	state string // on tmpfs
	ca    *wire.CA

	mu    sync.Mutex
	procs map[string]*Process
	runs  int // how often agents were started, for the names of their logs
}

// StartAgents starts an agent on every node and waits until all of them serve.
func StartAgents(ctx context.Context, s *Scene, o AgentOptions) (_ *Agents, err error) {
	a := &Agents{opts: o, scene: s, procs: map[string]*Process{}}
	if a.ca, err = wire.NewCA("lab", certificateTTL); err != nil {
		return nil, fmt.Errorf("making the lab's certificate authority: %w", err)
	}
	// The state has to lie on tmpfs, and /run often is a small one.
	if a.state, err = s.Run.Shared("agents"); err != nil {
		return nil, err
	}
	if err := a.ca.WriteFiles(a.file("ca.crt"), a.file("ca.key")); err != nil {
		return nil, err
	}
	for _, n := range s.Net.Nodes {
		if err := a.Start(ctx, n); err != nil {
			return nil, errors.Join(err, a.Close())
		}
	}
	return a, nil
}

func (a *Agents) file(name string) string { return filepath.Join(a.scene.Run.Path, name) }

// Control is the path of a node's control socket.
func (a *Agents) Control(n *Node) string { return a.file(n.Name + ".ctl") }

// Client talks to a node's agent.
func (a *Agents) Client(n *Node) *agent.Client { return agent.NewClient(a.Control(n)) }

// Address is where a node's agent serves its peers.
func (a *Agents) Address(n *Node) string { return fmt.Sprintf("%s:%d", n.Addr, agentPort) }

// Process is a node's agent, for tests that kill it.
func (a *Agents) Process(n *Node) *Process {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.procs[n.Name]
}

// dead says which agents have ended by themselves, with the ends of their logs.
func (a *Agents) dead() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var errs []error
	for _, p := range a.procs {
		errs = append(errs, p.Err())
	}
	return errors.Join(errs...)
}

// Start starts a node's agent, for the first time or again after it was killed.
func (a *Agents) Start(ctx context.Context, n *Node) error {
	cert, key := a.file(n.Name+".crt"), a.file(n.Name+".key")
	if _, err := os.Stat(cert); err != nil {
		creds, err := a.ca.Issue(wire.Identity(n.Name), certificateTTL)
		if err != nil {
			return fmt.Errorf("issuing the certificate of %s: %w", n.Name, err)
		}
		if err := creds.WriteFiles(cert, key); err != nil {
			return err
		}
	}
	return a.StartAs(ctx, n, cert, key)
}

// StartAs starts a node's agent with the given certificate and key.
func (a *Agents) StartAs(ctx context.Context, n *Node, cert, key string) error {
	pool := a.opts.PoolMiB
	if pool == 0 {
		pool = 2 * a.scene.Spec.VMs * a.scene.Spec.MemoryMiB
	}
	a.mu.Lock()
	a.runs++
	name := fmt.Sprintf("agent-%s-%d", n.Name, a.runs)
	a.mu.Unlock()
	cmd := exec.Command(a.opts.Binary, "run", "--node", n.Name, "--listen", a.Address(n),
		"--state-dir", filepath.Join(a.state, n.Name), "--control", a.Control(n),
		"--cert", cert, "--key", key, "--ca", a.file("ca.crt"),
		"--pool-mib", fmt.Sprint(pool), "--reserve-mib", "256",
		"--lanes", fmt.Sprint(max(2, a.opts.Lanes)), "--verbosity", fmt.Sprint(a.opts.Verbosity))
	p, err := n.Start(name, cmd)
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.procs[n.Name] = p
	a.mu.Unlock()
	client := a.Client(n)
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if err := p.waitFor(ctx, "its control socket", func() bool { return client.Healthy(ctx) == nil }); err != nil {
		p.Kill()
		return fmt.Errorf("starting the agent of %s: %w", n.Name, err)
	}
	return nil
}

// Close stops all agents and removes their state.
func (a *Agents) Close() error {
	var stopping sync.WaitGroup
	for _, p := range a.procs {
		stopping.Go(p.Stop)
	}
	stopping.Wait()
	return os.RemoveAll(a.state)
}
