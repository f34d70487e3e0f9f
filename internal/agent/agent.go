// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/go-logr/logr"

	"scattergather.io/scattergather/internal/pool"
	"scattergather.io/scattergather/internal/wire"
)

// ErrExists is returned by Start for a migration that the agent already has.
var ErrExists = errors.New("the migration exists already")

var errNotServing = errors.New("the agent is not serving: it is starting or stopping")

// maxMigrations bounds the halves that one agent serves at a time; those that
// have ended are forgotten, oldest first, to make room.
const maxMigrations = 1024

// Config is what an agent needs to know of its node.
type Config struct {
	// Node is the node's name, as in the agent's certificate.
	Node string
	// Listen is the host:port of the data plane.
	Listen string
	// StateDir must lie on tmpfs: it holds the pool, and for each gather the page
	// map and the direct pages. It survives the agent's process, not the node.
	StateDir string
	// Wire holds credentials and limits of the data plane.
	Wire wire.Options
	// PoolBytes is the memory lent to other nodes' migrations, in bytes; 0 lends none.
	PoolBytes uint64
	// PoolReserveBytes of the node's available memory are never lent.
	PoolReserveBytes uint64
	Log              logr.Logger
}

// Agent is one node's agent: intermediary for any peer that is entitled to it,
// source and destination for the migrations it is asked to do.
type Agent struct {
	cfg      Config
	pool     *pool.Pool
	listener *wire.Listener

	// halves counts goroutines that Run must wait for.
	halves sync.WaitGroup

	mu         sync.Mutex
	run        context.Context // set by Run; engines live in it, not in a request
	migrations map[wire.MigrationID]*migration
	order      []wire.MigrationID
}

// New opens the agent's pool and starts to listen on its data plane. What an
// earlier process of the same agent left in the state directory is taken up by Run.
func New(cfg Config) (*Agent, error) {
	if cfg.Node == "" || !filepath.IsAbs(cfg.StateDir) {
		return nil, fmt.Errorf("an agent needs its node's name (%q) and an absolute state directory (%q)",
			cfg.Node, cfg.StateDir)
	}
	for _, dir := range []string{poolDir(cfg.StateDir), gatherDir(cfg.StateDir)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("making the state directory: %w", err)
		}
	}
	p, err := pool.Open(pool.Config{
		Dir: poolDir(cfg.StateDir), BudgetBytes: cfg.PoolBytes, KeepFree: cfg.PoolReserveBytes, Log: cfg.Log,
	})
	if err != nil {
		return nil, fmt.Errorf("opening the pool: %w", err)
	}
	ln, err := wire.Listen(cfg.Listen, cfg.Wire)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listening on the data plane: %w", err), p.Close())
	}
	return &Agent{cfg: cfg, pool: p, listener: ln, migrations: map[wire.MigrationID]*migration{}}, nil
}

func poolDir(state string) string   { return filepath.Join(state, "pool") }
func gatherDir(state string) string { return filepath.Join(state, "gather") }

// Address is where the agent's data plane listens, as host:port.
func (a *Agent) Address() string { return a.listener.Addr().String() }

// Run serves peers and engines until ctx ends, and then waits for all of them.
// Sources that have not passed the switch are rolled back by that; gathers keep
// their state for the next process.
func (a *Agent) Run(ctx context.Context) error {
	a.mu.Lock()
	a.run = ctx
	a.mu.Unlock()
	if err := a.reopen(); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { a.listener.Close() })
	defer stop()
	var err error
	for {
		var conn *wire.Conn
		if conn, err = a.listener.Accept(ctx); err != nil {
			break
		}
		a.halves.Go(func() { a.serve(ctx, conn) })
	}
	a.listener.Close()
	a.halves.Wait()
	err = errors.Join(err, a.pool.Close())
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// serve owns conn until the peer leaves or hands it to an engine.
func (a *Agent) serve(ctx context.Context, conn *wire.Conn) {
	log := a.cfg.Log.WithValues("migration", conn.Migration().String(), "peer", string(conn.Peer()))
	switch conn.Role() {
	case wire.SourceToDestination:
		a.mu.Lock()
		m := a.migrations[conn.Migration()]
		a.mu.Unlock()
		if m == nil || m.gather == nil {
			conn.Fail(&wire.Error{Code: wire.CodeUnknown, Text: fmt.Sprintf(
				"node %s expects no migration %s: ask its agent for the destination's half first", a.cfg.Node, conn.Migration())})
			return
		}
		if err := m.gather.Attach(conn); err != nil {
			log.Error(err, "The source was refused")
			conn.Fail(&wire.Error{Code: wire.CodeForbidden, Text: err.Error()})
		}
	case wire.SourceToIntermediary, wire.DestinationToIntermediary:
		defer conn.Close()
		if err := a.pool.Serve(ctx, conn); err != nil && ctx.Err() == nil {
			log.Error(err, "A pool session's connection ended")
		}
	default:
		conn.Fail(&wire.Error{Code: wire.CodeForbidden, Text: "this agent knows no such role"})
	}
}

// Start takes on one half of a migration. A destination is returned once its QEMU
// listens, so that the source may start at once; ErrExists is returned for a
// migration that the agent has already.
func (a *Agent) Start(ctx context.Context, spec Spec) (*migration, error) {
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	id, err := wire.ParseMigrationID(spec.ID)
	if err != nil {
		return nil, err
	}
	m := &migration{spec: spec, id: id, since: time.Now(), state: StateRunning, done: make(chan struct{})}
	if err := a.add(m); err != nil {
		return nil, err
	}
	if err := a.launch(ctx, m); err != nil {
		a.forget(id)
		return nil, err
	}
	return m, nil
}

// launch prepares QEMU within the request's ctx and runs the engine in the agent's.
func (a *Agent) launch(ctx context.Context, m *migration) error {
	var work func(context.Context) error
	var err error
	switch m.spec.Role {
	case RoleSource:
		work, err = a.prepareSource(ctx, m)
	case RoleDestination:
		work, err = a.prepareDestination(ctx, m)
	}
	if err != nil {
		return err
	}
	a.begin(m, work)
	return nil
}

// begin runs work in the agent's own context and records how it ends.
func (a *Agent) begin(m *migration, work func(context.Context) error) {
	a.mu.Lock()
	run := a.run
	a.mu.Unlock()
	ctx, cancel := context.WithCancel(run)
	m.cancel = cancel
	a.halves.Go(func() {
		defer cancel()
		m.finish(work(ctx))
	})
}

// serving tells whether the agent takes requests.
func (a *Agent) serving() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.run != nil && a.run.Err() == nil
}

func (a *Agent) add(m *migration) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.run == nil || a.run.Err() != nil {
		return errNotServing
	}
	if old := a.migrations[m.id]; old != nil {
		return fmt.Errorf("%w: %s, %s since %s", ErrExists, m.id, old.status().State, old.since.Format(time.RFC3339))
	}
	if len(a.order) >= maxMigrations && !a.forgetEnded() {
		return fmt.Errorf("the agent serves %d migrations, its bound: wait until one has ended", maxMigrations)
	}
	a.migrations[m.id] = m
	a.order = append(a.order, m.id)
	return nil
}

// forgetEnded drops the oldest half that has ended; the caller holds a.mu.
func (a *Agent) forgetEnded() bool {
	for i, id := range a.order {
		if a.migrations[id].status().State != StateRunning {
			delete(a.migrations, id)
			a.order = append(a.order[:i], a.order[i+1:]...)
			return true
		}
	}
	return false
}

func (a *Agent) forget(id wire.MigrationID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.migrations, id)
	for i := range a.order {
		if a.order[i] == id {
			a.order = append(a.order[:i], a.order[i+1:]...)
			return
		}
	}
}

func (a *Agent) find(id string) *migration {
	parsed, err := wire.ParseMigrationID(id)
	if err != nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.migrations[parsed]
}

// Status returns how the agent and all its migrations stand.
func (a *Agent) Status() NodeStatus {
	a.mu.Lock()
	halves := make([]*migration, 0, len(a.order))
	for _, id := range a.order {
		halves = append(halves, a.migrations[id])
	}
	a.mu.Unlock()
	st := NodeStatus{Node: a.cfg.Node, Address: a.Address(), Pool: a.pool.Stats()}
	for _, m := range halves {
		st.Migrations = append(st.Migrations, m.status())
	}
	return st
}
