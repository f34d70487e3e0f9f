// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"scattergather.io/scattergather/internal/gather"
	"scattergather.io/scattergather/internal/scatter"
	"scattergather.io/scattergather/internal/wire"
)

// specSuffix names the file that holds a destination's Spec beside the state of
// its gather, so that the next process knows which QEMU to drive.
const specSuffix = ".spec.json"

// migration is one half of a migration at this agent. Exactly one of scatter and
// gather is set before it is launched, and never changes.
type migration struct {
	id      wire.MigrationID
	spec    Spec
	since   time.Time
	scatter *scatter.Engine
	gather  *gather.Engine
	cancel  context.CancelFunc
	done    chan struct{}

	mu            sync.Mutex
	state         State
	err           error
	scatterResult *scatter.Result
	gatherResult  *gather.Result
}

func (m *migration) status() Status {
	st := Status{Spec: m.spec, Since: m.since}
	if m.scatter != nil {
		p := m.scatter.Progress()
		st.Scatter = &p
	}
	if m.gather != nil {
		p := m.gather.Progress()
		st.Gather = &p
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	st.State, st.ScatterResult, st.GatherResult = m.state, m.scatterResult, m.gatherResult
	if m.err != nil {
		st.Error = m.err.Error()
	}
	return st
}

// finish records how the half ended and wakes its watchers.
func (m *migration) finish(err error) {
	m.mu.Lock()
	m.state, m.err = StateDone, err
	if err != nil {
		m.state = StateFailed
	}
	m.mu.Unlock()
	close(m.done)
}

// requestCancel ends a half that has not passed the switch. Afterwards there is no
// way back: the guest runs at the destination, and ending either half would lose it.
func (m *migration) requestCancel() error {
	if m.gather != nil {
		return m.gather.Cancel()
	}
	if phase := m.scatter.Progress().Phase; phase >= scatter.Scattering && phase != scatter.Failed {
		return gather.ErrSwitched
	}
	// A source that switches right now goes on whatever its context says.
	m.cancel()
	return nil
}

func (a *Agent) prepareSource(ctx context.Context, m *migration) (func(context.Context) error, error) {
	strategy := scatter.Immediate
	if m.spec.Strategy != "" {
		var err error
		if strategy, err = scatter.ParseStrategy(m.spec.Strategy); err != nil {
			return nil, err
		}
	}
	h, err := openSource(ctx, m.spec)
	if err != nil {
		return nil, err
	}
	cfg := scatter.Config{
		Migration: m.id, Strategy: strategy, Wire: a.cfg.Wire, Accept: h.accept, Switch: h.startPostcopy,
		Destination: scatterPeer(m.spec.Destination), MultifdChannels: m.spec.multifdChannels(),
		Log: a.cfg.Log.WithValues("migration", m.id.String(), "role", RoleSource),
	}
	for _, p := range m.spec.Intermediaries {
		cfg.Intermediaries = append(cfg.Intermediaries, scatterPeer(p))
	}
	if m.scatter, err = scatter.New(cfg); err != nil {
		return nil, errors.Join(err, h.close())
	}
	return func(ctx context.Context) error {
		defer func() { _ = h.close() }() // QEMU is told all it must know before
		res, err := m.scatter.Run(ctx)
		if err != nil {
			err = h.explain(err)
			if errors.Is(err, scatter.ErrRolledBack) {
				err = errors.Join(err, h.keepGuest())
			}
			return err
		}
		m.mu.Lock()
		m.scatterResult = &res
		m.mu.Unlock()
		return nil
	}, nil
}

func scatterPeer(p Peer) scatter.Peer {
	return scatter.Peer{Name: p.Name, Identity: wire.Identity(p.Name), Address: p.Address, Bytes: p.Bytes}
}

func (a *Agent) prepareDestination(ctx context.Context, m *migration) (func(context.Context) error, error) {
	h, err := openDestination(ctx, m.spec)
	if err != nil {
		return nil, err
	}
	if m.gather, err = gather.New(a.gatherConfig(m, h)); err != nil {
		return nil, errors.Join(err, h.close())
	}
	if err := a.saveSpec(m); err != nil {
		return nil, errors.Join(err, h.close())
	}
	return a.gatherWork(m, h), nil
}

func (a *Agent) gatherConfig(m *migration, h *hypervisor) gather.Config {
	return gather.Config{
		Migration: m.id, StateDir: filepath.Join(gatherDir(a.cfg.StateDir), m.id.String()), Wire: a.cfg.Wire,
		Connect: h.connect, Recover: func(ctx context.Context) (net.Conn, error) { return h.recoverStream(ctx) },
		Suits: h.suits, Explain: h.explain, StoreBytes: m.spec.StoreBytes, Log: a.cfg.Log.WithValues("migration", m.id.String(), "role", RoleDestination),
	}
}

func (a *Agent) gatherWork(m *migration, h *hypervisor) func(context.Context) error {
	return func(ctx context.Context) error {
		defer func() { _ = h.close() }() // QEMU is told all it must know before
		res, err := m.gather.Run(ctx)
		if errors.Is(err, gather.ErrInterrupted) {
			return err // the next process goes on from the state, and needs the request
		}
		if rmErr := os.Remove(a.specPath(m.id)); rmErr != nil {
			a.cfg.Log.Error(rmErr, "A finished gather's request stays behind", "migration", m.id.String())
		}
		if err != nil {
			return err
		}
		m.mu.Lock()
		m.gatherResult = &res
		m.mu.Unlock()
		return nil
	}
}

func (a *Agent) specPath(id wire.MigrationID) string {
	return filepath.Join(gatherDir(a.cfg.StateDir), id.String()+specSuffix)
}

// saveSpec writes the request beside the gather's state, in one step.
func (a *Agent) saveSpec(m *migration) error {
	data, err := json.Marshal(m.spec)
	if err != nil {
		return fmt.Errorf("encoding the request: %w", err)
	}
	tmp := a.specPath(m.id) + ".new"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return fmt.Errorf("keeping the request: %w", err)
	}
	if err := os.Rename(tmp, a.specPath(m.id)); err != nil {
		return fmt.Errorf("keeping the request: %w", err)
	}
	return nil
}

// reopen takes up the gathers that an earlier process of this agent left.
func (a *Agent) reopen() error {
	files, err := filepath.Glob(filepath.Join(gatherDir(a.cfg.StateDir), "*"+specSuffix))
	if err != nil {
		return fmt.Errorf("looking for gathers to go on with: %w", err)
	}
	for _, file := range files {
		if err := a.reopenOne(file); err != nil {
			// One gather that cannot go on must not keep the others from it.
			a.cfg.Log.Error(err, "A gather that an earlier process began cannot go on", "request", file)
		}
	}
	return nil
}

func (a *Agent) reopenOne(file string) error {
	id, err := wire.ParseMigrationID(strings.TrimSuffix(filepath.Base(file), specSuffix))
	if err != nil {
		return err
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("reading the request: %w", err)
	}
	m := &migration{id: id, since: time.Now(), state: StateRunning, done: make(chan struct{})}
	if err := decodeStrict(data, &m.spec); err != nil {
		return err
	}
	if err := m.spec.Validate(); err != nil {
		return err
	}
	h := &hypervisor{spec: m.spec}
	if m.gather, err = gather.Reopen(a.gatherConfig(m, h)); err != nil {
		if errors.Is(err, gather.ErrNotResumable) {
			err = errors.Join(err, os.Remove(file))
		}
		return err
	}
	if err := a.add(m); err != nil {
		return err
	}
	a.begin(m, a.gatherWork(m, h))
	return nil
}
