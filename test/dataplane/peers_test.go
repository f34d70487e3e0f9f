// SPDX-License-Identifier: Apache-2.0

package dataplane_test

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/agent"
	"scattergather.io/scattergather/internal/lab"
	"scattergather.io/scattergather/internal/scatter"
	"scattergather.io/scattergather/internal/wire"
)

// TestDestinationThatKnowsNoSuchMigration asks only the source for its half.
func TestDestinationThatKnowsNoSuchMigration(t *testing.T) {
	s := onStage(t)
	s.links(t, 0)
	m := s.prepare(t, s.guest, plan{intermediaries: 1})
	if _, err := m.fromAgent().Start(deadline(t, monitorPatience), m.source); err != nil {
		t.Fatal(err)
	}
	st, err := await(deadline(t, movePatience), m.fromAgent(), m.source.ID, func(st agent.Status) bool {
		return st.State != agent.StateRunning
	})
	if err != nil {
		t.Fatal(err)
	}
	m.assertRefused(t, ended(st), "expects no migration", m.source.ID)
	s.move(t, plan{intermediaries: 1})
}

// ended is the error of a half that is over, nil when that was a success.
func ended(st agent.Status) error {
	if st.State == agent.StateDone {
		return nil
	}
	return &endedError{st.Error}
}

type endedError struct{ text string }

func (e *endedError) Error() string { return e.text }

// forged are certificates that nobody may accept.
var forged = []struct {
	name  string
	issue func(t *testing.T, s *stage, node string) *wire.Credentials
	wants []string
}{
	{"of another authority", func(t *testing.T, _ *stage, node string) *wire.Credentials {
		ca, err := wire.NewCA("somebody else", time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return issue(t, ca, node, time.Hour)
	}, []string{"certificate", "not among the trusted authorities"}},
	{"expired", func(t *testing.T, s *stage, node string) *wire.Credentials {
		ca, err := wire.LoadCA(filepath.Join(s.Run.Path, "ca.crt"), filepath.Join(s.Run.Path, "ca.key"))
		if err != nil {
			t.Fatal(err)
		}
		return issue(t, ca, node, time.Millisecond)
	}, []string{"certificate", "is valid from"}},
}

func issue(t *testing.T, ca *wire.CA, node string, ttl time.Duration) *wire.Credentials {
	t.Helper()
	creds, err := ca.Issue(wire.Identity(node), ttl)
	if err != nil {
		t.Fatal(err)
	}
	return creds
}

// masquerade restarts the agent of a node with another certificate, until the test
// calls the function that it returns.
func (s *stage) masquerade(t *testing.T, n *lab.Node, creds *wire.Credentials) (restore func()) {
	t.Helper()
	cert, key := filepath.Join(s.Run.Path, "forged.crt"), filepath.Join(s.Run.Path, "forged.key")
	if err := creds.WriteFiles(cert, key); err != nil {
		t.Fatal(err)
	}
	s.agents.Process(n).Stop()
	if err := s.agents.StartAs(deadline(t, agentPatience), n, cert, key); err != nil {
		t.Fatal(err)
	}
	return func() {
		s.agents.Process(n).Stop()
		s.restart(t, n)
	}
}

// TestPeersWithBadCertificates gives one agent a certificate that nobody may accept. A
// destination or a source that has one is refused; an intermediary is left out.
func TestPeersWithBadCertificates(t *testing.T) {
	for _, f := range forged {
		t.Run("destination "+f.name, func(t *testing.T) {
			s := onStage(t)
			s.links(t, 0)
			restore := s.masquerade(t, s.Destination, f.issue(t, s, s.Destination.Name))
			m := s.prepare(t, s.guest, plan{intermediaries: 1})
			m.assertRefused(t, m.run(deadline(t, movePatience)), f.wants...)
			restore()
			s.move(t, plan{intermediaries: 1})
		})
		t.Run("source "+f.name, func(t *testing.T) {
			s := onStage(t)
			s.links(t, 0)
			restore := s.masquerade(t, s.Source, f.issue(t, s, s.Source.Name))
			m := s.prepare(t, s.guest, plan{intermediaries: 1})
			m.assertRefused(t, m.run(deadline(t, movePatience)), "certificate")
			restore()
			s.move(t, plan{intermediaries: 1})
		})
	}
	t.Run("intermediaries", func(t *testing.T) {
		s := onStage(t)
		for i, f := range forged {
			n := s.Intermediaries[i]
			defer s.masquerade(t, n, f.issue(t, s, n.Name))()
		}
		m := s.prepare(t, s.guest, plan{intermediaries: intermediaries})
		ctx := deadline(t, movePatience)
		if err := m.start(ctx); err != nil {
			t.Fatal(err)
		}
		st := awaitPhase(t, ctx, m.fromAgent(), m.source.ID, "the memory leaves", func(st agent.Status) bool {
			return st.Scatter != nil && st.Scatter.Phase >= scatter.Precopy
		})
		for i, f := range forged {
			assertLeftOut(t, st, s.Intermediaries[i].Name, f.wants...)
		}
		if err := m.finish(ctx); err != nil {
			t.Fatal(err)
		}
		m.assertMoved(t)
		if n := len(m.from.ScatterResult.IntermediaryBytes); n != intermediaries-len(forged) {
			t.Errorf("%d intermediaries were used: %v", n, m.from.ScatterResult.IntermediaryBytes)
		}
		m.arrive(t)
	})
}

// assertLeftOut asserts that an intermediary is not used, and that the status says why.
func assertLeftOut(t *testing.T, st agent.Status, name string, wants ...string) {
	t.Helper()
	for _, leg := range st.Scatter.Intermediaries {
		if leg.Name != name {
			continue
		}
		if leg.Connected || leg.Bytes > 0 {
			t.Errorf("intermediary %s is used: %+v", name, leg)
		}
		for _, want := range wants {
			if !strings.Contains(leg.Reason, want) {
				t.Errorf("intermediary %s is left out because of %q, which does not name %q", name, leg.Reason, want)
			}
		}
		return
	}
	t.Errorf("the status does not name intermediary %s: %+v", name, st.Scatter.Intermediaries)
}

// TestIntermediariesWithoutRoom offers one intermediary that has no room at all and one
// that has too little. The pages go elsewhere.
func TestIntermediariesWithoutRoom(t *testing.T) {
	const little = 8 << 20
	s := onStage(t)
	defer s.shrink(t, s.Intermediaries[0], 1)()
	m := s.prepare(t, s.guest, plan{strategy: "hybrid", intermediaries: intermediaries, change: func(source, _ *agent.Spec) {
		source.Intermediaries[1].Bytes = little
	}})
	ctx := deadline(t, movePatience)
	if err := m.start(ctx); err != nil {
		t.Fatal(err)
	}
	st := awaitPhase(t, ctx, m.fromAgent(), m.source.ID, "the memory leaves", func(st agent.Status) bool {
		return st.Scatter != nil && st.Scatter.Phase >= scatter.Precopy
	})
	assertLeftOut(t, st, s.Intermediaries[0].Name, "budget")
	if err := m.finish(ctx); err != nil {
		t.Fatal(err)
	}
	m.assertMoved(t)
	sent := m.from.ScatterResult.IntermediaryBytes
	if got := sent[s.Intermediaries[1].Name]; got == 0 || got > 2*little {
		t.Errorf("%d bytes went to an intermediary that lends %d", got, little)
	}
	if sent[s.Intermediaries[2].Name] < 2*little {
		t.Errorf("only %d bytes went to the intermediary with room: %v", sent[s.Intermediaries[2].Name], sent)
	}
	m.arrive(t)
}

// shrink restarts the agent of an intermediary with next to nothing to lend, until the
// test calls the function that it returns.
func (s *stage) shrink(t *testing.T, n *lab.Node, mebibytes int) (restore func()) {
	t.Helper()
	s.agents.Process(n).Stop()
	file := func(name string) string { return filepath.Join(s.Run.Path, name) }
	s.names++
	p, err := n.Start(fmt.Sprintf("agent-%s-small-%d", n.Name, s.names), exec.Command(agentBinary, "run",
		"--node", n.Name, "--listen", s.agents.Address(n), "--state-dir", s.state(t, n), "--control", s.agents.Control(n),
		"--cert", file(n.Name+".crt"), "--key", file(n.Name+".key"), "--ca", file("ca.crt"), "--pool-mib", fmt.Sprint(mebibytes)))
	if err != nil {
		t.Fatal(err)
	}
	ctx := deadline(t, agentPatience)
	for s.agents.Client(n).Healthy(ctx) != nil {
		if ctx.Err() != nil {
			t.Fatalf("the agent of %s does not start: %v", n.Name, p.Err())
		}
		time.Sleep(pollEvery)
	}
	return func() {
		p.Stop()
		s.restart(t, n)
	}
}
