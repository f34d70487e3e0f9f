// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"time"

	"scattergather.io/scattergather/internal/lab"
)

// scenario is one measured migration.
type scenario struct {
	name   string // unique in a plan
	method string // as the lab names it
	spec   lab.Spec

	// once says that the scenario is run in the first round only: it takes long
	// and hardly varies.
	once bool

	// open says that the destination's link is opened to the source's rate as soon
	// as the source is free. What the scenario is for has been measured by then, and
	// the rest of the run only verifies the guest.
	open bool

	// steps change the destination's link while memory leaves the source.
	steps []step
}

// step is a change of the destination's link at a time after the migration's start.
type step struct {
	after time.Duration
	rates lab.Rates
}

// poll is how often the script looks whether the source is free.
const poll = 10 * time.Millisecond

// scripted is a method that changes links while a VM moves.
type scripted struct {
	lab.Method
	open  bool
	steps []step
}

// Migrate moves the VM and plays the script beside it.
func (m *scripted) Migrate(ctx context.Context, s *lab.Scene, v *lab.VM) error {
	playing, stop := context.WithCancel(ctx)
	played := make(chan error, 1)
	go func() { played <- m.play(playing, s, v) }()
	err := m.Method.Migrate(ctx, s, v)
	stop()
	return errors.Join(err, <-played)
}

func (m *scripted) play(ctx context.Context, s *lab.Scene, v *lab.VM) error {
	started := func(t lab.Milestones) bool { return !t.Started.IsZero() }
	if !until(ctx, v, started) {
		return nil
	}
	begin := v.Milestones().Started
	for _, st := range m.steps {
		due := begin.Add(st.after)
		late := func(t lab.Milestones) bool { return !t.Released.IsZero() || !time.Now().Before(due) }
		if !until(ctx, v, late) {
			return nil
		}
		if time.Now().Before(due) {
			break // the source is free already
		}
		if err := s.Destination.SetRates(st.rates); err != nil {
			return fmt.Errorf("changing the destination's link %v after the start: %w", st.after, err)
		}
	}
	released := func(t lab.Milestones) bool { return !t.Released.IsZero() }
	if !m.open || !until(ctx, v, released) {
		return nil
	}
	if err := s.Destination.SetRates(s.Spec.Source); err != nil {
		return fmt.Errorf("opening the destination's link: %w", err)
	}
	return nil
}

// until waits for a milestone and says whether it came.
func until(ctx context.Context, v *lab.VM, reached func(lab.Milestones) bool) bool {
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for !reached(v.Milestones()) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
	return true
}
