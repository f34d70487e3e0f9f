// SPDX-License-Identifier: Apache-2.0

package dataplane_test

import (
	"fmt"
	"testing"

	"scattergather.io/scattergather/internal/agent"
	"scattergather.io/scattergather/internal/lab"
	"scattergather.io/scattergather/internal/scatter"
)

// TestStrategies moves the guest in both ways, with and without intermediaries, over
// links that leave the destination far behind the source.
func TestStrategies(t *testing.T) {
	for _, strategy := range []scatter.Strategy{scatter.Immediate, scatter.Hybrid} {
		for _, n := range []int{0, 1, intermediaries} {
			t.Run(fmt.Sprintf("%s/%d-intermediaries", strategy, n), func(t *testing.T) {
				s := onStage(t)
				m := s.prepare(t, s.guest, plan{strategy: strategy.String(), intermediaries: n})
				ctx := deadline(t, movePatience)
				if err := m.start(ctx); err != nil {
					t.Fatal(err)
				}
				if n == intermediaries {
					m.whileHeld(t, func() { s.assertCiphertext(t) })
				}
				if err := m.finish(ctx); err != nil {
					t.Fatal(err)
				}
				m.assertMoved(t)
				m.assertShares(t, n)
				m.arrive(t)
			})
		}
	}
}

// whileHeld calls f when the source is free and intermediaries still hold pages.
func (m *move) whileHeld(t *testing.T, f func()) {
	t.Helper()
	awaitPhase(t, deadline(t, movePatience), m.toAgent(), m.source.ID, "only intermediaries hold pages", func(st agent.Status) bool {
		return st.Gather != nil && st.Gather.Committed && st.Gather.Pages.Remote > 0
	})
	f()
}

// assertShares asserts that intermediaries took a good part of the guest.
func (m *move) assertShares(t *testing.T, n int) {
	t.Helper()
	sent, got := m.from.ScatterResult, m.to.GatherResult
	if len(sent.IntermediaryBytes) != n {
		t.Errorf("the source used %d intermediaries, want %d", len(sent.IntermediaryBytes), n)
	}
	total := uint64(0)
	for name, bytes := range sent.IntermediaryBytes {
		total += bytes
		if bytes == 0 {
			t.Errorf("intermediary %s got nothing", name)
		}
		if got.IntermediaryBytes[name] == 0 {
			t.Errorf("nothing was gathered from intermediary %s, which got %d bytes", name, bytes)
		}
	}
	if n > 0 && total < sent.DirectBytes/4 {
		t.Errorf("%d bytes went to intermediaries and %d to the slow destination", total, sent.DirectBytes)
	}
	if sent.DirectBytes == 0 {
		t.Error("nothing went to the destination directly")
	}
}

// TestMultifdSource moves guests whose QEMU sends over several connections. Up to 10.0
// that excludes post-copy, so they move when QEMU's pre-copy has converged.
func TestMultifdSource(t *testing.T) {
	for _, channels := range []int{0, 4} {
		name := "default channels"
		if channels > 0 {
			name = fmt.Sprintf("%d channels", channels)
		}
		t.Run(name, func(t *testing.T) {
			s := onStage(t)
			m := s.move(t, plan{strategy: "hybrid", intermediaries: 1, change: func(source, _ *agent.Spec) {
				source.Capabilities = map[string]bool{"multifd": true, "postcopy-ram": false}
				if channels > 0 {
					source.Parameters = map[string]any{"multifd-channels": channels}
				}
			}})
			if r := m.from.ScatterResult; r.IntermediaryBytes[lab.IntermediaryNode(1)] == 0 {
				t.Error("nothing went to the intermediary")
			}
		})
	}
}

// TestSourceWithoutPostcopy moves guests whose QEMU does not do post-copy: the device
// state comes at the end of the stream and is wrapped for the destination.
func TestSourceWithoutPostcopy(t *testing.T) {
	for _, returnPath := range []bool{true, false} {
		t.Run(fmt.Sprintf("return-path=%v", returnPath), func(t *testing.T) {
			s := onStage(t)
			m := s.move(t, plan{intermediaries: 1, change: func(source, _ *agent.Spec) {
				source.Capabilities = map[string]bool{"postcopy-ram": false, "return-path": returnPath}
			}})
			if r := m.from.ScatterResult; r.Pages.Data == 0 || r.PackageBytes == 0 {
				t.Errorf("pages and device state of the source: %+v", r)
			}
		})
	}
}

// TestTwoGuestsAtOnce moves two guests at the same time through the same agents.
func TestTwoGuestsAtOnce(t *testing.T) {
	s := onStage(t)
	second, err := s.boot(deadline(t, bootPatience), "vm2", hardware{}, 2)
	if err != nil {
		t.Fatal(err)
	}
	defer s.dismiss(second)
	moves := []*move{
		s.prepare(t, s.guest, plan{strategy: "immediate", intermediaries: 2}),
		s.prepare(t, second, plan{strategy: "hybrid", intermediaries: 2}),
	}
	ctx := deadline(t, movePatience)
	for _, m := range moves {
		if err := m.start(ctx); err != nil {
			t.Fatal(err)
		}
	}
	for i, m := range moves {
		if err := m.finish(ctx); err != nil {
			t.Errorf("guest %d: %v", i+1, err)
		}
	}
	if t.Failed() {
		return
	}
	first, last := moves[0].from.ScatterResult, moves[1].from.ScatterResult
	if first.Released.Before(last.Started) || last.Released.Before(first.Started) {
		t.Error("the two migrations did not overlap")
	}
	for _, m := range moves {
		m.assertMoved(t)
	}
	moves[1].settle()
	moves[0].arrive(t)
}
