// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"scattergather.io/scattergather/internal/lab/guest"
)

// bootPatience bounds the boot and the filling of a guest. Under TCG on a busy
// machine that takes tens of seconds.
const bootPatience = 3 * time.Minute

// Scene is a run's stage: the nodes with their links, and the guests running at
// the source with an empty QEMU waiting at the destination.
type Scene struct {
	Spec   Spec
	Assets *Assets
	Run    *RunDir
	Net    *Network
	VMs    []*VM

	Source, Destination *Node
	Intermediaries      []*Node
}

// VM is a guest and its two QEMUs, with the moments that a method fills in.
type VM struct {
	Name        string
	Source      *QEMU
	Destination *QEMU
	Guest       *Guest
	Filled      guest.Filled

	mu sync.Mutex
	m  Milestones
}

// Milestones are the moments of one VM's migration.
type Milestones struct {
	// Started is when the migration was asked for: the first byte leaves.
	Started time.Time
	// Released is when nothing was needed from the source any more.
	Released time.Time
	// Completed is when the destination held every page.
	Completed time.Time
	// MustLeave is the bytes of the pages that had to leave the source: every
	// page that was not zero, once.
	MustLeave int64
}

// Milestones gives the moments reached so far.
func (v *VM) Milestones() Milestones {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.m
}

// Mark changes the milestones under their lock; methods call it.
func (v *VM) Mark(f func(*Milestones)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	f(&v.m)
}

// Watchdog is what a context of a run ends with when a QEMU dies under it.
func (v *VM) watchdog() error {
	return errors.Join(v.Source.Err(), v.Destination.Err())
}

// NewScene sets the stage and waits until every guest has filled its memory.
func NewScene(ctx context.Context, assets *Assets, spec Spec) (_ *Scene, err error) {
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	s := &Scene{Spec: spec, Assets: assets}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.Run, err = NewRunDir(); err != nil {
		return nil, err
	}
	if s.Net, err = NewNetwork(s.Run, spec.nodes(), spec.Queue); err != nil {
		return nil, err
	}
	s.Source, s.Destination, s.Intermediaries = s.Net.Nodes[0], s.Net.Nodes[1], s.Net.Nodes[2:]
	ctx, cancel := context.WithTimeout(ctx, bootPatience)
	defer cancel()
	for i := range spec.VMs {
		v := &VM{Name: fmt.Sprintf("vm%d", i+1)}
		v.Guest = NewGuest(v.Name)
		s.VMs = append(s.VMs, v)
		if err := s.boot(ctx, v, spec.guestConfig(i)); err != nil {
			return nil, err
		}
	}
	for _, v := range s.VMs {
		if v.Filled, err = v.Guest.WaitFilled(ctx); err != nil {
			return nil, errors.Join(err, v.watchdog(), errors.New("the guest's console ended with:\n"+v.Source.Console()))
		}
	}
	return s, nil
}

// boot starts both QEMUs of a VM and listens to the guest.
func (s *Scene) boot(ctx context.Context, v *VM, config guest.Config) (err error) {
	c := QEMUConfig{Name: v.Name + "-source", Assets: s.Assets, MemoryMiB: s.Spec.MemoryMiB, Guest: config}
	if v.Source, err = StartQEMU(ctx, s.Source, c); err != nil {
		return err
	}
	if err := v.Guest.Attach(ctx, AtSource, v.Source.Telemetry); err != nil {
		return err
	}
	c.Name, c.Incoming = v.Name+"-destination", true
	if v.Destination, err = StartQEMU(ctx, s.Destination, c); err != nil {
		return err
	}
	return v.Guest.Attach(ctx, AtDestination, v.Destination.Telemetry)
}

// Close strikes the stage: nothing of the run is left.
func (s *Scene) Close() error {
	for _, v := range s.VMs {
		v.Guest.Close()
		for _, q := range []*QEMU{v.Source, v.Destination} {
			if q != nil {
				q.Close()
			}
		}
	}
	var err error
	if s.Net != nil {
		err = s.Net.Close()
	}
	if s.Run != nil {
		err = errors.Join(err, s.Run.Close())
	}
	return err
}
