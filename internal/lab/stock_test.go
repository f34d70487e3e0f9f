// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"slices"
	"testing"
	"time"
)

// testSpec is a small, quick scene.
func testSpec() Spec {
	s := DefaultSpec()
	s.MemoryMiB, s.WorkingSet, s.Intermediaries = 192, 16, nil
	s.Source, s.Destination = Rates{Up: 800e6, Down: 800e6}, Rates{Up: 400e6, Down: 400e6}
	return s
}

func testAssets(t *testing.T) *Assets {
	t.Helper()
	assets, err := FindAssets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return assets
}

func TestStockMethodsMoveTheGuest(t *testing.T) {
	assets := testAssets(t)
	for i, m := range Stock() {
		t.Run(m.Name(), func(t *testing.T) {
			spec := testSpec()
			spec.VMs, spec.CPUs = 1+i%2, 1+i%2
			r, err := Run(t.Context(), assets, spec, m, nil)
			if err != nil {
				t.Fatal(err)
			}
			pages := uint64(spec.VMs) * uint64(spec.guestConfig(0).FillMiB) << 8
			if r.PagesVerified != pages || r.PagesWrong != 0 {
				t.Errorf("%d pages verified, %d wrong, want %d and 0", r.PagesVerified, r.PagesWrong, pages)
			}
			if r.LimitSeconds <= 0 || r.EvictionSeconds < r.LimitSeconds || r.TotalMigrationSeconds < r.EvictionSeconds {
				t.Errorf("limit %.2f s, eviction %.2f s, total %.2f s: want them in this order", r.LimitSeconds, r.EvictionSeconds, r.TotalMigrationSeconds)
			}
			if least := r.LimitSeconds * float64(spec.Source.Up) / 8; float64(r.BytesSourceOut) < least {
				t.Errorf("%d bytes left the source, but %.0f had to", r.BytesSourceOut, least)
			}
			if r.DowntimeMs <= 0 {
				t.Errorf("downtime %.1f ms: the guest has no gap at the switch", r.DowntimeMs)
			}
			served := 0.0
			for _, n := range r.Timeline.Served {
				served += n
			}
			if served == 0 {
				t.Error("the guest served no request")
			}
		})
	}
}

func TestARunThatIsCancelledLeavesNothing(t *testing.T) {
	assets := testAssets(t)
	ctx, cancel := context.WithCancel(t.Context())
	spec := testSpec()
	spec.Destination = Rates{Up: 1e6, Down: 1e6} // it would take an hour
	var scene *Scene
	watch := func(u Update) {
		if u.Phase == PhaseMigrate && u.Elapsed > time.Second {
			cancel()
		}
	}
	method := spy{Method: Stock()[1], see: func(s *Scene) { scene = s }}
	if _, err := Run(ctx, assets, spec, method, watch); err == nil {
		t.Fatal("a cancelled run came to its end")
	}
	for _, v := range scene.VMs {
		for _, q := range []*QEMU{v.Source, v.Destination} {
			select {
			case <-q.Done():
			default:
				t.Errorf("%s is still there", q.Name)
			}
		}
	}
	if _, err := startTime(scene.VMs[0].Source.Pid()); err == nil {
		t.Error("the source's QEMU still has a process")
	}
	if cleared, err := Clean(); err != nil || slices.Contains(cleared, scene.Run.ID) {
		t.Errorf("the run left a directory behind (%v, %v)", cleared, err)
	}
}

// spy shows a test the scene of a run.
type spy struct {
	Method
	see func(*Scene)
}

func (s spy) Prepare(ctx context.Context, scene *Scene) error {
	s.see(scene)
	return s.Method.Prepare(ctx, scene)
}
