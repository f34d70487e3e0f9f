// SPDX-License-Identifier: Apache-2.0

package dataplane_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/agent"
	"scattergather.io/scattergather/internal/lab"
	"scattergather.io/scattergather/internal/qemu/qmp"
)

// refusal is a migration that cannot be, and what its error must say.
type refusal struct {
	name string
	plan plan
	// ready is done to the QEMUs before the agents are asked.
	ready func(t *testing.T, m *move)
	// wants are parts of the error; every one must be there, in any case.
	wants []string
}

// TestRefusals asks for migrations that cannot be. Each must end in an error that
// names the cause, with the guest running on at the source, and with nothing in the
// way of the proper migration that follows.
func TestRefusals(t *testing.T) {
	for _, r := range refusals() {
		t.Run(r.name, func(t *testing.T) {
			s := onStage(t)
			s.links(t, 0)
			r.plan.intermediaries = 1
			m := s.prepare(t, s.guest, r.plan)
			if r.ready != nil {
				r.ready(t, m)
			}
			m.assertRefused(t, m.run(deadline(t, movePatience)), r.wants...)
			m.resetSource(t)
			s.move(t, plan{intermediaries: 1})
		})
	}
}

func refusals() []refusal {
	return append(destinationRefusals(), sourceRefusals()...)
}

// destinationRefusals are what the destination's QEMU does not accept.
func destinationRefusals() []refusal {
	return []refusal{
		{
			name: "destination with another machine type", wants: []string{"destination QEMU refused", "machine type", "pc-q35", "pc-i440fx"},
			plan: plan{hw: &hardware{machine: "pc"}},
		},
		{
			name: "destination with more memory", wants: []string{"destination QEMU refused", "size of its memory pc.ram"},
			plan: plan{hw: &hardware{memoryMiB: guestMiB + 64}},
		},
		{
			name: "destination without post-copy", wants: []string{"destination QEMU refused", "postcopy-ram is off"},
			plan: plan{change: func(_, destination *agent.Spec) {
				destination.Capabilities = map[string]bool{"postcopy-ram": false}
			}},
		},
	}
}

// slowly makes a QEMU without post-copy send the guest's working set many times.
func slowly(source *agent.Spec) {
	source.Parameters = map[string]any{"max-bandwidth": 40 << 20, "downtime-limit": 1}
}

// sourceRefusals are streams that no engine here understands.
func sourceRefusals() []refusal {
	return []refusal{
		{
			name: "source with xbzrle", wants: []string{"xbzrle"},
			plan: plan{change: func(source, _ *agent.Spec) {
				source.Capabilities = map[string]bool{"postcopy-ram": false, "xbzrle": true}
				slowly(source)
			}},
		},
		{
			name: "source with mapped-ram", wants: []string{"seekable"},
			plan: plan{change: func(source, _ *agent.Spec) {
				source.Capabilities = map[string]bool{"postcopy-ram": false, "return-path": false, "mapped-ram": true}
			}},
		},
		{
			name: "source with ignore-shared", wants: []string{"x-ignore-shared"},
			plan: plan{change: func(source, _ *agent.Spec) {
				source.Capabilities = map[string]bool{"postcopy-ram": false, "x-ignore-shared": true}
			}},
		},
		{
			name: "source with ignore-shared and post-copy", wants: []string{"postcopy", "ignore-shared"},
			plan: plan{change: func(source, _ *agent.Spec) {
				source.Capabilities = map[string]bool{"x-ignore-shared": true}
			}},
		},
		{
			name: "source with multifd that nobody was told of", wants: []string{"multifd"},
			plan: plan{change: func(source, _ *agent.Spec) {
				source.Capabilities = map[string]bool{"postcopy-ram": false}
			}},
			ready: func(t *testing.T, m *move) {
				m.setSource(t, map[string]bool{"postcopy-ram": false, "multifd": true})
			},
		},
		{
			name: "source with TLS", wants: []string{"TLS"},
			plan: plan{change: func(source, _ *agent.Spec) {
				source.Parameters = map[string]any{"tls-creds": "tls0", "tls-hostname": "localhost"}
			}},
			ready: func(t *testing.T, m *move) {
				err := m.g.Source.QMP.Execute(deadline(t, monitorPatience), "object-add",
					map[string]any{"qom-type": "tls-creds-anon", "id": "tls0", "endpoint": "client"}, nil)
				if err != nil {
					t.Fatalf("giving the source's QEMU credentials: %v", err)
				}
			},
		},
	}
}

// monitorPatience bounds one command to a QEMU.
const monitorPatience = 10 * time.Second

// assertRefused asserts that a migration failed with an error that names its cause,
// and that nothing else came of it.
func (m *move) assertRefused(t *testing.T, err error, wants ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("the migration went through")
	}
	t.Logf("the error: %v", err)
	for _, want := range wants {
		if !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(want)) {
			t.Errorf("the error does not name %q", want)
		}
	}
	m.assertStayed(t)
	m.stop(t)
	m.s.assertNothingLeft(t, m.source.ID)
}

// assertStayed asserts that the guest runs on at the source, with all of its memory.
func (m *move) assertStayed(t *testing.T) {
	t.Helper()
	state, err := m.g.Source.QMP.QueryStatus(deadline(t, monitorPatience))
	if err != nil || !state.Running {
		t.Fatalf("the guest does not run at the source: %+v, %v", state, err)
	}
	m.s.awaitHeartbeat(t, m.g, lab.AtSource)
	m.s.assertPages(t, m.g)
	m.assertCounter(t, lab.AtSource)
}

// stop cancels a half that waits for one that will never come: that of a destination
// whose source was refused before it connected.
func (m *move) stop(t *testing.T) {
	t.Helper()
	ctx := deadline(t, monitorPatience)
	st, err := m.toAgent().Get(ctx, m.source.ID)
	if err != nil || st.State != agent.StateRunning {
		return
	}
	if err := m.toAgent().Cancel(ctx, m.source.ID); err != nil {
		t.Errorf("cancelling the destination's half: %v", err)
	}
}

// setSource sets capabilities of the source's QEMU behind the agent's back.
func (m *move) setSource(t *testing.T, caps map[string]bool) {
	t.Helper()
	if err := m.g.Source.QMP.SetCapabilities(deadline(t, monitorPatience), caps); err != nil {
		t.Fatalf("setting capabilities of the source's QEMU: %v", err)
	}
}

// resetSource undoes what a test asked of the source's QEMU.
func (m *move) resetSource(t *testing.T) {
	t.Helper()
	ctx := deadline(t, monitorPatience)
	caps, err := m.g.Source.QMP.Capabilities(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for name, on := range caps {
		if on {
			// Some are fixed; one that is still on and matters makes the next move fail.
			var refused *qmp.Error
			err := m.g.Source.QMP.SetCapabilities(ctx, map[string]bool{name: false})
			if err != nil && !errors.As(err, &refused) {
				t.Fatal(err)
			}
		}
	}
	err = m.g.Source.QMP.SetParameters(ctx, map[string]any{"downtime-limit": 300, "tls-creds": "", "tls-hostname": ""})
	if err != nil {
		t.Fatal(err)
	}
}
