// SPDX-License-Identifier: Apache-2.0

package dataplane_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/agent"
	"scattergather.io/scattergather/internal/lab"
	"scattergather.io/scattergather/internal/qemu/qmp"
)

// movePatience bounds one migration: the slowest here takes about 10 s on an idle
// machine.
const movePatience = 90 * time.Second

// pollEvery is how often agents and QEMUs are asked how they stand.
const pollEvery = 20 * time.Millisecond

// plan says how a guest shall be moved.
type plan struct {
	strategy string // empty means immediate
	// intermediaries that are offered.
	intermediaries int
	// hw is the hardware of the destination; nil means that of the guest.
	hw *hardware
	// change alters the requests before the agents get them.
	change func(source, destination *agent.Spec)
}

// move is one migration of a guest, from its preparation to what is asserted of its
// end.
type move struct {
	s                   *stage
	g                   *tenant
	source, destination agent.Spec
	// What the two halves said last.
	from, to agent.Status
}

// prepare starts an empty QEMU at the destination and begins to watch both ends.
func (s *stage) prepare(t *testing.T, g *tenant, p plan) *move {
	t.Helper()
	ctx := deadline(t, 30*time.Second)
	if g.Destination != nil {
		g.Destination.Close() // of a migration that was refused
	}
	hw := g.hw
	if p.hw != nil {
		hw = *p.hw
	}
	config := hw.config(s, g.Name+"-incoming", g.seed)
	config.Incoming = true
	var err error
	if g.Destination, err = lab.StartQEMU(ctx, s.Destination, config); err != nil {
		t.Fatal(err)
	}
	if c := g.Guest.Counter(); c.Last > g.seq {
		g.seq = c.Last
	}
	g.Guest.Close()
	g.Guest = lab.NewGuest(g.Name)
	for side, q := range []*lab.QEMU{lab.AtSource: g.Source, lab.AtDestination: g.Destination} {
		if err := g.Guest.Attach(ctx, lab.Side(side), q.Telemetry); err != nil {
			t.Fatal(err)
		}
	}
	s.awaitHeartbeat(t, g, lab.AtSource)
	m := &move{s: s, g: g}
	m.source, m.destination = s.agents.Specs(g.VM, p.strategy)
	m.source.Intermediaries = m.source.Intermediaries[:p.intermediaries]
	if p.change != nil {
		p.change(&m.source, &m.destination)
	}
	return m
}

func (m *move) fromAgent() *agent.Client { return m.s.agents.Client(m.s.Source) }
func (m *move) toAgent() *agent.Client   { return m.s.agents.Client(m.s.Destination) }

// start asks both agents for their half, the destination's first.
func (m *move) start(ctx context.Context) error {
	if _, err := m.toAgent().Start(ctx, m.destination); err != nil {
		return fmt.Errorf("the destination's agent: %w", err)
	}
	if _, err := m.fromAgent().Start(ctx, m.source); err != nil {
		return fmt.Errorf("the source's agent: %w", err)
	}
	return nil
}

// halfPatience bounds how long a half may go on after the other one failed.
const halfPatience = 3 * time.Second

// finish waits until both halves have ended. It returns an error when one of them
// failed, with what both said.
func (m *move) finish(ctx context.Context) error {
	var errs []error
	over := func(st agent.Status) bool { return st.State != agent.StateRunning }
	for _, half := range []struct {
		side   string
		client *agent.Client
		last   *agent.Status
	}{{"source", m.fromAgent(), &m.from}, {"destination", m.toAgent(), &m.to}} {
		st, err := await(ctx, half.client, m.source.ID, over)
		*half.last = st
		if err == nil && st.State == agent.StateFailed {
			err = errors.New(st.Error)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("the %s's half: %w", half.side, err))
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeoutCause(ctx, halfPatience, errors.New("it goes on"))
			defer cancel()
		}
	}
	return errors.Join(errs...)
}

// run is start and finish.
func (m *move) run(ctx context.Context) error {
	if err := m.start(ctx); err != nil {
		return err
	}
	return m.finish(ctx)
}

// await asks an agent how a migration stands until that holds, or until it cannot any
// more. An agent that does not answer is asked again: tests kill agents.
func await(ctx context.Context, c *agent.Client, id string, holds func(agent.Status) bool) (agent.Status, error) {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	var last agent.Status
	for {
		st, err := c.Get(ctx, id)
		if err == nil {
			last = st
			if holds(st) {
				return st, nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			//nolint:errorlint // the last answer may be nil, and nobody looks for it
			return last, fmt.Errorf("%w; it was %s, %s (last answer: %v)", context.Cause(ctx), last.State, phases(last), err)
		}
	}
}

// awaitPhase is await for a half that must still run when it gets there.
func awaitPhase(t *testing.T, ctx context.Context, c *agent.Client, id, what string, holds func(agent.Status) bool) agent.Status {
	t.Helper()
	st, err := await(ctx, c, id, func(st agent.Status) bool { return st.State != agent.StateRunning || holds(st) })
	if err != nil {
		t.Fatalf("waiting until %s: %v", what, err)
	}
	if st.State != agent.StateRunning {
		t.Fatalf("waiting until %s: the half is %s: %s", what, st.State, st.Error)
	}
	return st
}

func phases(st agent.Status) string {
	switch {
	case st.Scatter != nil:
		return fmt.Sprintf("source %v %s", st.Scatter.Phase, st.Scatter.Stalled)
	case st.Gather != nil:
		return fmt.Sprintf("destination %v %s", st.Gather.Phase, st.Gather.Stalled)
	}
	return "unknown"
}

// move moves the stage's guest and asserts all that must be true afterwards.
func (s *stage) move(t *testing.T, p plan) *move {
	t.Helper()
	return s.moveGuest(t, s.guest, p)
}

// moveGuest is move for any guest that lives at Source.
func (s *stage) moveGuest(t *testing.T, g *tenant, p plan) *move {
	t.Helper()
	m := s.prepare(t, g, p)
	if err := m.run(deadline(t, movePatience)); err != nil {
		t.Fatalf("moving the guest: %v", err)
	}
	m.assertMoved(t)
	m.arrive(t)
	return m
}

// arrive makes the destination the place where the guest lives, and the source the
// place where it will go next.
func (m *move) arrive(t *testing.T) {
	t.Helper()
	m.settle()
	m.s.Source, m.s.Destination = m.s.Destination, m.s.Source
}

// settle ends the QEMU that the guest has left.
func (m *move) settle() {
	m.g.Source.Close()
	m.g.Source, m.g.Destination = m.g.Destination, nil
}

// assertMoved asserts that the guest lives at the destination with every page as it
// must be, that nothing else was needed for that, and that nothing is left over.
func (m *move) assertMoved(t *testing.T) {
	t.Helper()
	ctx := deadline(t, time.Minute)
	select {
	case <-m.g.Guest.Resumed():
	case <-ctx.Done():
		t.Fatal("the guest was not heard from the destination")
	}
	m.assertOrder(t)
	m.assertQEMU(t, ctx, m.g.Source, "source", false, qmp.StatusCompleted)
	m.assertQEMU(t, ctx, m.g.Destination, "destination", true, qmp.StatusCompleted)
	m.s.assertPages(t, m.g)
	m.assertCounter(t, lab.AtDestination)
	m.s.assertNothingLeft(t, m.source.ID)
	if r := m.from.ScatterResult; r != nil {
		t.Logf("source free after %.2f s, %d MiB direct, %v MiB to intermediaries, %d pages data, %d zero, %d discarded",
			r.EvictionSeconds, r.DirectBytes>>20, mebibytes(r.IntermediaryBytes), r.Pages.Data, r.Pages.Zero, r.Pages.Discarded)
	}
	if r := m.to.GatherResult; r != nil {
		t.Logf("gathered after %.2f s, %d faults, %d recoveries", r.GatherSeconds, r.Faults.Requests, r.Recoveries)
	}
}

func mebibytes(m map[string]uint64) map[string]uint64 {
	out := map[string]uint64{}
	for name, n := range m {
		out[name] = n >> 20
	}
	return out
}

// assertOrder asserts that the source was told to go only after the destination had
// taken everything over.
func (m *move) assertOrder(t *testing.T) {
	t.Helper()
	scattered, gathered := m.from.ScatterResult, m.to.GatherResult
	if scattered == nil || gathered == nil {
		t.Fatalf("a finished half has no result: source %v, destination %v", scattered, gathered)
	}
	// Committed is zero if that was in a process of the agent that was killed.
	if gathered.Committed.IsZero() && gathered.Recoveries == 0 {
		t.Error("the destination never took the guest over")
	}
	if scattered.Released.Before(gathered.Committed) {
		t.Errorf("the source was released %v before the destination took over", gathered.Committed.Sub(scattered.Released))
	}
	if p := gathered.Pages; p.Remote+p.Stored != 0 || p.Placed == 0 {
		t.Errorf("pages at the end of the gather: %+v, want all placed", p)
	}
}

func (m *move) assertQEMU(t *testing.T, ctx context.Context, q *lab.QEMU, side string, running bool, want qmp.Status) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	state, err := q.QMP.QueryStatus(ctx)
	if err != nil {
		t.Errorf("asking the %s's QEMU: %v", side, err)
		return
	}
	if state.Running != running {
		t.Errorf("the %s's QEMU is %q, want running=%v", side, state.Status, running)
	}
	mig, err := q.QMP.QueryMigrate(ctx)
	if err != nil {
		t.Errorf("asking the %s's QEMU: %v", side, err)
	} else if mig.Status != want {
		t.Errorf("the %s's QEMU says that its migration is %q (%s), want %q", side, mig.Status, mig.ErrorDesc, want)
	}
}

// assertCounter asserts that the guest counted on where it was.
func (m *move) assertCounter(t *testing.T, at lab.Side) {
	t.Helper()
	c := m.g.Guest.Counter()
	// A serial port holds 16 bytes and the guest drops what does not fit: more than a
	// few beats in a row are not lost that way.
	const tolerated = 25
	switch {
	case c.Back > 0:
		t.Errorf("the guest's counter went back %d times: %+v", c.Back, c)
	case c.First <= m.g.seq:
		t.Errorf("the guest's counter began at %d, and was %d before", c.First, m.g.seq)
	case c.Jump > tolerated:
		t.Errorf("%d numbers are missing at the switch: %+v", c.Jump, c)
	case at == lab.AtDestination && c.Heard[lab.AtDestination] == 0:
		t.Error("the guest was not heard from the destination")
	case at == lab.AtSource && c.Heard[lab.AtDestination] != 0:
		t.Errorf("the guest was heard %d times from the destination", c.Heard[lab.AtDestination])
	}
}

// assertPages makes the guest verify every page.
func (s *stage) assertPages(t *testing.T, g *tenant) {
	t.Helper()
	v, err := g.Guest.Verify(deadline(t, time.Minute))
	if err != nil {
		t.Fatalf("verifying every page: %v", err)
	}
	if v.Pages != g.pages || v.Wrong != 0 {
		t.Fatalf("%d pages verified, %d wrong, want %d and 0", v.Pages, v.Wrong, g.pages)
	}
}

// awaitHeartbeat waits until the guest has served some requests more.
func (s *stage) awaitHeartbeat(t *testing.T, g *tenant, want lab.Side) {
	t.Helper()
	ctx := deadline(t, 20*time.Second)
	_, before, _ := g.Guest.Progress()
	for {
		_, served, side := g.Guest.Progress()
		if served > before+40 && before > 0 {
			if side != want {
				t.Fatalf("the guest runs at side %d, want %d", side, want)
			}
			return
		}
		if before == 0 {
			before = served
		}
		select {
		case <-time.After(pollEvery):
		case <-ctx.Done():
			t.Fatalf("the guest stands still: %d requests served, %d before\n%s", served, before, strings.TrimSpace(g.Source.Console()))
		}
	}
}
