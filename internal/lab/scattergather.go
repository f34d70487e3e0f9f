// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"time"

	"scattergather.io/scattergather/internal/agent"
	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/scatter"
	"scattergather.io/scattergather/internal/wire"
)

// scatterGather moves VMs through our agents.
type scatterGather struct {
	name     string
	strategy string
	opts     AgentOptions
	agents   *Agents
}

// NewScatterGather is the method under test, in one of its two strategies.
func NewScatterGather(strategy scatter.Strategy, o AgentOptions) Method {
	name := ScatterGather
	if strategy == scatter.Hybrid {
		name = ScatterGatherHybrid
	}
	return &scatterGather{name: name, strategy: strategy.String(), opts: o}
}

func (m *scatterGather) Name() string { return m.name }

func (m *scatterGather) Prepare(ctx context.Context, s *Scene) (err error) {
	m.agents, err = StartAgents(ctx, s, m.opts)
	return err
}

func (m *scatterGather) Close() error {
	if m.agents == nil {
		return nil
	}
	return m.agents.Close()
}

// Specs are the two halves of one VM's migration. A test may change them before it
// hands them to the agents.
func (a *Agents) Specs(v *VM, strategy string) (source, destination agent.Spec) {
	id := wire.NewMigrationID().String()
	s := a.scene
	destination = agent.Spec{
		ID: id, Role: agent.RoleDestination, QMP: v.Destination.Monitor, Stream: a.file(v.Name + ".in"),
	}
	source = agent.Spec{
		ID: id, Role: agent.RoleSource, QMP: v.Source.Monitor, Stream: a.file(v.Name + ".out"), Strategy: strategy,
		Destination: agent.Peer{Name: s.Destination.Name, Address: a.Address(s.Destination)},
	}
	for _, n := range s.Intermediaries {
		source.Intermediaries = append(source.Intermediaries, agent.Peer{
			Name: n.Name, Address: a.Address(n), Bytes: uint64(s.Spec.MemoryMiB) << 20,
		})
	}
	return source, destination
}

func (m *scatterGather) Migrate(ctx context.Context, s *Scene, v *VM) error {
	source, destination := m.agents.Specs(v, m.strategy)
	return m.agents.Migrate(ctx, v, source, destination)
}

// Migrate asks both agents for their half and waits until the destination holds
// every page.
func (a *Agents) Migrate(ctx context.Context, v *VM, source, destination agent.Spec) error {
	from, to := a.Client(a.scene.Source), a.Client(a.scene.Destination)
	if _, err := to.Start(ctx, destination); err != nil {
		return fmt.Errorf("%s: the destination's agent: %w", v.Name, err)
	}
	v.Mark(func(t *Milestones) { t.Started = time.Now() })
	if _, err := from.Start(ctx, source); err != nil {
		return fmt.Errorf("%s: the source's agent: %w", v.Name, err)
	}
	gathered := make(chan error, 1)
	go func() { gathered <- a.wait(ctx, to, v, "destination", destination.ID, nil) }()
	err := a.wait(ctx, from, v, "source", source.ID, func(st agent.Status) {
		distinct := st.ScatterResult.Pages.Data - min(st.ScatterResult.Pages.Discarded, st.ScatterResult.Pages.Data)
		v.Mark(func(t *Milestones) {
			t.Released = time.Now()
			t.MustLeave = int64(distinct) * pages.Size
		})
	})
	if err != nil {
		// The destination's half ends by itself, or never will.
		select {
		case other := <-gathered:
			return errors.Join(err, other)
		case <-time.After(3 * time.Second):
			return err
		}
	}
	if err := <-gathered; err != nil {
		return err
	}
	v.Mark(func(t *Milestones) { t.Completed = time.Now() })
	return nil
}

// wait watches one half to its end, and calls done when that was a success.
func (a *Agents) wait(ctx context.Context, c *agent.Client, v *VM, side, id string, done func(agent.Status)) error {
	st, err := c.Watch(ctx, id, nil)
	if err != nil {
		return errors.Join(fmt.Errorf("%s: watching the %s: %w", v.Name, side, err), a.dead())
	}
	if st.State != agent.StateDone {
		return fmt.Errorf("%s: the %s's half failed: %s", v.Name, side, st.Error)
	}
	if done != nil {
		done(st)
	}
	return nil
}
