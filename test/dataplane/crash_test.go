// SPDX-License-Identifier: Apache-2.0

package dataplane_test

import (
	"context"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/agent"
	"scattergather.io/scattergather/internal/gather"
	"scattergather.io/scattergather/internal/lab"
	"scattergather.io/scattergather/internal/qemu/qmp"
	"scattergather.io/scattergather/internal/scatter"
)

// crawl is a link's speed, in bits per second, at which nothing is over before a test
// has done what it has to do in between.
const crawl = 100e6

// stillness is how long a test watches that nothing happens which must not.
const stillness = 1500 * time.Millisecond

// beginPrecopy starts a migration whose first pass takes seconds, and waits until much
// of the guest has left while it runs at the source.
func (s *stage) beginPrecopy(t *testing.T, ctx context.Context) *move {
	t.Helper()
	m := s.prepare(t, s.guest, plan{strategy: "hybrid", intermediaries: 1, change: func(source, _ *agent.Spec) {
		source.Parameters = map[string]any{"max-bandwidth": 20 << 20, "max-postcopy-bandwidth": 0}
	}})
	if err := m.start(ctx); err != nil {
		t.Fatal(err)
	}
	awaitPhase(t, ctx, m.fromAgent(), m.source.ID, "the first pass runs", func(st agent.Status) bool {
		return st.Scatter != nil && st.Scatter.Phase == scatter.Precopy && st.Scatter.Pages.Safe > 2000
	})
	return m
}

// beginPostcopy starts a migration and waits until the guest runs at the destination,
// with much of its memory still at the source. That sends it at a rate of bytes a
// second, 0 being as fast as it can.
//
// A QEMU is lost when its stream breaks between its device state and its first step:
// QEMU has no way back from there. So the guest itself must be heard.
func (s *stage) beginPostcopy(t *testing.T, ctx context.Context, intermediaries int, rate int64) *move {
	t.Helper()
	s.links(t, crawl)
	m := s.prepare(t, s.guest, plan{intermediaries: intermediaries, change: func(source, _ *agent.Spec) {
		source.Parameters = map[string]any{"max-postcopy-bandwidth": rate}
	}})
	if err := m.start(ctx); err != nil {
		t.Fatal(err)
	}
	select {
	case <-m.g.Guest.Resumed():
	case <-ctx.Done():
		t.Fatalf("the guest was not heard from the destination: %v", m.finish(ctx))
	}
	return m
}

// postcopyRate is a rate, in bytes a second, at which the source is not done before a
// test has done what it has to do in between.
const postcopyRate = 16 << 20

// scattering waits until the source is in the middle of sending.
func (m *move) scattering(t *testing.T, ctx context.Context) {
	t.Helper()
	awaitPhase(t, ctx, m.fromAgent(), m.source.ID, "the source scatters", func(st agent.Status) bool {
		return st.Scatter != nil && st.Scatter.Phase == scatter.Scattering && st.Scatter.Pages.Safe > 2000
	})
}

func TestCancelBeforeTheSwitch(t *testing.T) {
	s := onStage(t)
	ctx := deadline(t, movePatience)
	m := s.beginPrecopy(t, ctx)
	if code, text := m.delete(t, ctx, s.Source); code != http.StatusAccepted {
		t.Fatalf("DELETE before the switch was answered by %d: %s", code, text)
	}
	m.assertRefused(t, m.finish(ctx), "cancel")
	s.links(t, 0)
	s.move(t, plan{intermediaries: 1})
}

func TestCancelAfterTheSwitchIsRefused(t *testing.T) {
	s := onStage(t)
	ctx := deadline(t, movePatience)
	m := s.beginPostcopy(t, ctx, 1, postcopyRate)
	for _, n := range []*lab.Node{s.Source, s.Destination} {
		if code, text := m.delete(t, ctx, n); code != http.StatusConflict {
			t.Errorf("DELETE at %s after the switch was answered by %d: %s", n.Name, code, text)
		}
	}
	if err := m.finish(ctx); err != nil {
		t.Fatal(err)
	}
	m.assertMoved(t)
	m.arrive(t)
}

// delete asks an agent to cancel and returns the status code of its answer.
func (m *move) delete(t *testing.T, ctx context.Context, n *lab.Node) (int, string) {
	t.Helper()
	c := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", m.s.agents.Control(n))
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodDelete, "http://agent/v1/migrations/"+m.source.ID, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text := make([]byte, 300)
	k, _ := resp.Body.Read(text)
	return resp.StatusCode, string(text[:k])
}

// TestSourceAgentKilledBeforeTheSwitch kills the process that QEMU streams into. The
// guest goes on at the source; what lies elsewhere is dropped by those who lend it.
func TestSourceAgentKilledBeforeTheSwitch(t *testing.T) {
	s := onStage(t)
	ctx := deadline(t, movePatience)
	m := s.beginPrecopy(t, ctx)
	s.kill(t, s.Source)
	m.assertStayed(t)
	s.restart(t, s.Source)
	// The destination would wait for its source to come back. Whoever plans the
	// migrations knows better.
	m.stop(t)
	if _, err := await(ctx, m.toAgent(), m.source.ID, func(st agent.Status) bool { return st.State == agent.StateFailed }); err != nil {
		t.Fatalf("the destination's half does not end: %v", err)
	}
	m.assertLeased(t, s.Intermediaries[0])
	s.forget(t, s.Intermediaries[0])
	s.links(t, 0)
	s.move(t, plan{intermediaries: 1})
}

// assertLeased asserts that an intermediary will drop what it holds of a migration by
// itself, if it holds anything.
func (m *move) assertLeased(t *testing.T, n *lab.Node) {
	t.Helper()
	st, err := m.s.agents.Client(n).Node(deadline(t, monitorPatience))
	if err != nil {
		t.Fatal(err)
	}
	for _, session := range st.Pool.Sessions {
		if session.Migration.String() == m.source.ID && session.Expires.IsZero() {
			t.Errorf("%s keeps %d pages for ever", n.Name, session.Pages)
		}
	}
}

// TestDestinationAgentKilledBeforeTheSwitch kills the process that would have taken the
// guest over.
func TestDestinationAgentKilledBeforeTheSwitch(t *testing.T) {
	s := onStage(t)
	ctx := deadline(t, movePatience)
	m := s.beginPrecopy(t, ctx)
	s.kill(t, s.Destination)
	st, err := await(ctx, m.fromAgent(), m.source.ID, func(st agent.Status) bool { return st.State != agent.StateRunning })
	if err != nil {
		t.Fatal(err)
	}
	m.assertStayed(t)
	s.restart(t, s.Destination)
	m.assertRefused(t, ended(st), "destination", "lost")
	s.links(t, 0)
	s.move(t, plan{intermediaries: 1})
}

// TestDestinationAgentKilledWhileTheSourceScatters kills the destination's agent when
// it has the guest and the source still has memory. The source must wait for it.
func TestDestinationAgentKilledWhileTheSourceScatters(t *testing.T) {
	s := onStage(t)
	ctx := deadline(t, movePatience)
	m := s.beginPostcopy(t, ctx, 1, postcopyRate)
	m.scattering(t, ctx)
	s.kill(t, s.Destination)
	m.assertHeld(t, stillness)
	s.restart(t, s.Destination)
	if err := m.finish(ctx); err != nil {
		t.Fatal(err)
	}
	m.assertMoved(t)
	if r := m.from.ScatterResult; r.Reconnects == 0 {
		t.Error("the source never lost the destination")
	}
	m.assertRecoveries(t, true)
	m.arrive(t)
}

// assertHeld asserts that the source is not released for a while.
func (m *move) assertHeld(t *testing.T, d time.Duration) {
	t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		mig, err := m.g.Source.QMP.QueryMigrate(deadline(t, monitorPatience))
		if err != nil {
			t.Fatal(err)
		}
		if mig.Status.Ended() {
			t.Fatalf("the source's migration is %s while the destination's agent is dead", mig.Status)
		}
	}
}

// assertRecoveries asserts whether QEMU's stream broke and was restored.
func (m *move) assertRecoveries(t *testing.T, want bool) {
	t.Helper()
	if got := m.to.GatherResult.Recoveries; (got > 0) != want {
		t.Errorf("the stream into the destination's QEMU was restored %d times, want some: %v", got, want)
	}
}

// TestDestinationAgentKilledInMidGather kills the destination's agent when the source is
// gone and an intermediary has much of the guest, and stops the next one in order.
func TestDestinationAgentKilledInMidGather(t *testing.T) {
	s := onStage(t)
	ctx := deadline(t, movePatience)
	m := s.beginPostcopy(t, ctx, 2, 0)
	for _, end := range []func(*lab.Process){(*lab.Process).Kill, (*lab.Process).Stop} {
		awaitPhase(t, ctx, m.toAgent(), m.source.ID, "only intermediaries hold pages", func(st agent.Status) bool {
			return st.Gather != nil && st.Gather.Phase == gather.Released && st.Gather.Stalled == "" &&
				st.Gather.Pages.Remote > 1000 && st.Gather.PlaceRate > 0
		})
		end(s.agents.Process(s.Destination))
		s.restart(t, s.Destination)
	}
	if err := m.finish(ctx); err != nil {
		t.Fatal(err)
	}
	m.assertMoved(t)
	m.assertRecoveries(t, true)
	m.arrive(t)
}

// TestIntermediaryKilledInMidGather kills an intermediary's agent when it has the only
// copy of much of the guest. Its pool outlives it; the guest waits and goes on, and
// QEMU never notices.
func TestIntermediaryKilledInMidGather(t *testing.T) {
	s := onStage(t)
	ctx := deadline(t, movePatience)
	m := s.beginPostcopy(t, ctx, 1, 0)
	remote := awaitPhase(t, ctx, m.toAgent(), m.source.ID, "only the intermediary holds pages", func(st agent.Status) bool {
		return st.Gather != nil && st.Gather.Phase == gather.Released && st.Gather.Pages.Remote > 2000
	}).Gather.Pages.Remote
	s.kill(t, s.Intermediaries[0])
	stalled := awaitPhase(t, ctx, m.toAgent(), m.source.ID, "the gather is stalled", func(st agent.Status) bool {
		return st.Gather.Stalled != ""
	})
	t.Logf("with %d pages at the dead intermediary the gather says: %s", remote, stalled.Gather.Stalled)
	for end := time.Now().Add(stillness); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		st, err := m.toAgent().Get(ctx, m.source.ID)
		if err != nil || st.State != agent.StateRunning {
			t.Fatalf("the gather is %s: %s, %v", st.State, st.Error, err)
		}
	}
	if mig, err := m.g.Destination.QMP.QueryMigrate(deadline(t, 2*time.Second)); err == nil && mig.Status != qmp.StatusPostcopyActive {
		// A QEMU whose main loop waits for a page may not answer; then it has not
		// lost its stream either.
		t.Errorf("the destination's QEMU says %q: its stream was not left alone", mig.Status)
	}
	s.restart(t, s.Intermediaries[0])
	if err := m.finish(ctx); err != nil {
		t.Fatal(err)
	}
	m.assertMoved(t)
	m.assertRecoveries(t, false)
	m.arrive(t)
}

// kill ends a node's agent as a crash would.
func (s *stage) kill(t *testing.T, n *lab.Node) {
	t.Helper()
	s.agents.Process(n).Kill()
}

// agentPatience bounds the start of an agent.
const agentPatience = 30 * time.Second

// restart starts a node's agent again. It finds the state of the one before.
func (s *stage) restart(t *testing.T, n *lab.Node) {
	t.Helper()
	if err := s.agents.Start(deadline(t, agentPatience), n); err != nil {
		t.Fatal(err)
	}
}

// forget restarts a node's agent without its state, as a reboot of the node would.
func (s *stage) forget(t *testing.T, n *lab.Node) {
	t.Helper()
	s.agents.Process(n).Stop()
	if err := os.RemoveAll(s.state(t, n)); err != nil {
		t.Fatal(err)
	}
	s.restart(t, n)
}
