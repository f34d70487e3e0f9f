// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// The quiet times before and after a migration that the timeline shows, and the
// width of its steps.
const (
	lead         = time.Second
	timelineStep = 100 * time.Millisecond
)

// verifyPatience bounds the full verification after a run.
const verifyPatience = 2 * time.Minute

// Phase is a part of a run.
type Phase string

// The phases of a run, in their order.
const (
	PhaseBoot    Phase = "booting and filling the guest"
	PhaseMigrate Phase = "migrating"
	PhaseVerify  Phase = "verifying every page"
	PhaseDone    Phase = "done"
)

// Update is the state of a run for a screen.
type Update struct {
	Method  string
	Phase   Phase
	Elapsed time.Duration // of the phase
	// Rates over the last half second, in bits per second.
	SourceOut, DestinationIn float64
	Sent                     uint64 // bytes that left the source since the start
	Switched, Released       bool   // for all VMs
	Result                   *RunResult
}

// Run moves the scene's guests by a method and measures it. Watch, when not
// nil, is called a few times a second. The result is returned with an error,
// too, as far as it got.
func Run(ctx context.Context, assets *Assets, spec Spec, m Method, watch func(Update)) (*RunResult, error) {
	if watch == nil {
		watch = func(Update) {}
	}
	r := &runner{method: m, watch: watch, result: &RunResult{Method: m.Name(), BytesByIntermediary: map[string]uint64{}}}
	err := r.run(ctx, assets, spec)
	if err != nil {
		r.result.Error = err.Error()
		err = fmt.Errorf("%s: %w", m.Name(), err)
	}
	r.enter(PhaseDone)
	return r.result, err
}

// runner is one run under way.
type runner struct {
	method   Method
	scene    *Scene
	recorder *Recorder
	result   *RunResult
	watch    func(Update)

	mu    sync.Mutex
	phase Phase
	since time.Time
	base  uint64 // the source's counter at the start
}

func (r *runner) run(ctx context.Context, assets *Assets, spec Spec) (err error) {
	watching, stop := context.WithCancel(ctx)
	var watcher sync.WaitGroup
	watcher.Go(func() { r.keepWatch(watching) })
	defer watcher.Wait()
	defer stop()

	r.enter(PhaseBoot)
	if r.scene, err = NewScene(ctx, assets, spec); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.scene.Close()) }()
	defer func() { err = errors.Join(err, r.method.Close()) }()
	if err := r.method.Prepare(ctx, r.scene); err != nil {
		return fmt.Errorf("preparing the nodes: %w", err)
	}
	recorder := NewRecorder(r.scene.Net)
	r.mu.Lock()
	r.recorder = recorder
	r.mu.Unlock()
	if err := pause(ctx, lead); err != nil {
		return errors.Join(err, stopRecorder(recorder))
	}
	r.enter(PhaseMigrate)
	err = r.migrate(ctx, spec.Timeout)
	tail := pause(ctx, lead)
	samples, sampleErr := recorder.Stop()
	if err = errors.Join(err, tail, sampleErr); err != nil {
		return err
	}
	r.measure(samples)
	r.enter(PhaseVerify)
	return r.verify(ctx)
}

func stopRecorder(r *Recorder) error {
	_, err := r.Stop()
	return err
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// migrate moves all VMs at once. The death of a QEMU ends it.
func (r *runner) migrate(ctx context.Context, timeout time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("the migration took longer than %v", timeout))
	defer cancel()
	errs := make([]error, len(r.scene.VMs))
	var moving sync.WaitGroup
	for i, v := range r.scene.VMs {
		moving.Go(func() {
			errs[i] = r.method.Migrate(ctx, r.scene, v)
			if errs[i] != nil {
				errs[i] = errors.Join(errs[i], v.watchdog())
				return
			}
			select {
			case <-v.Guest.Resumed():
			case <-ctx.Done():
				errs[i] = fmt.Errorf("%s: the guest was not heard from the destination: %w", v.Name, context.Cause(ctx))
			}
		})
	}
	moving.Wait()
	return errors.Join(errs...)
}

// verify makes every guest verify every page once more, now that all of them
// are at the destination.
func (r *runner) verify(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, verifyPatience, fmt.Errorf("the verification took longer than %v", verifyPatience))
	defer cancel()
	var errs []error
	for _, v := range r.scene.VMs {
		verified, err := v.Guest.Verify(ctx)
		r.result.PagesVerified += uint64(verified.Pages)
		r.result.PagesWrong += uint64(verified.Wrong)
		if err != nil {
			errs = append(errs, err, v.watchdog())
			continue
		}
		faults, err := v.Guest.Faults(ctx, v.Milestones().Completed)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		r.result.FaultCount += uint64(faults.Count)
		r.result.FaultP50Us = max(r.result.FaultP50Us, uint64(faults.P50))
		r.result.FaultP99Us = max(r.result.FaultP99Us, uint64(faults.P99))
	}
	return errors.Join(errs...)
}

func (r *runner) enter(p Phase) {
	r.mu.Lock()
	r.phase, r.since = p, time.Now()
	if r.recorder != nil && p == PhaseMigrate {
		if _, now, ok := r.recorder.Last(); ok {
			r.base = now.Nodes[0].Out
		}
	}
	r.mu.Unlock()
	r.watch(r.update())
}

func (r *runner) keepWatch(ctx context.Context) {
	for pause(ctx, 250*time.Millisecond) == nil {
		r.watch(r.update())
	}
}

func (r *runner) update() Update {
	r.mu.Lock()
	defer r.mu.Unlock()
	u := Update{Method: r.method.Name(), Phase: r.phase, Elapsed: time.Since(r.since)}
	if r.phase == PhaseDone {
		u.Result = r.result
	}
	if r.recorder == nil || r.phase != PhaseMigrate {
		return u
	}
	if before, now, ok := r.recorder.Last(); ok {
		span := now.At.Sub(before.At).Seconds()
		u.SourceOut = float64(now.Nodes[0].Out-before.Nodes[0].Out) * 8 / span
		u.DestinationIn = float64(now.Nodes[1].In-before.Nodes[1].In) * 8 / span
		u.Sent = now.Nodes[0].Out - r.base
	}
	u.Switched, u.Released = true, true
	for _, v := range r.scene.VMs {
		select {
		case <-v.Guest.Resumed():
		default:
			u.Switched = false
		}
		u.Released = u.Released && !v.Milestones().Released.IsZero()
	}
	return u
}
