// SPDX-License-Identifier: Apache-2.0

package dataplane_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/lab"
	"scattergather.io/scattergather/internal/lab/guest"
)

// intermediaries is how many nodes lend memory.
const intermediaries = 3

// bootPatience bounds the boot of a guest and the filling of its memory.
const bootPatience = 3 * time.Minute

// Memory of the guests, in MiB, and what of it the guest's kernel and program keep.
const (
	guestMiB  = 192
	kernelMiB = 114
)

// Links of the nodes in bits per second. A host's link carries more out than in, so
// that a source is never the bottleneck and a destination always is: pages must go
// to intermediaries.
const (
	hostUp         = 1600e6
	hostDown       = 240e6
	intermediaryUp = 800e6
)

// hardware says what a guest's QEMU is made of, where it is not the default.
type hardware struct {
	machine   string // type and properties; empty means q35
	memoryMiB int    // 0 means guestMiB
	memory    lab.Memory
	extra     []string
}

// stage is a lab with two hosts and some intermediaries, an agent on each, and one
// guest that lives at Source. A move takes it to Destination; then the two change
// their roles, so that the next test moves it back.
type stage struct {
	*lab.Scene
	agents *lab.Agents
	guest  *tenant
	names  int // makes names of QEMUs unique
}

// tenant is a guest and what is known of its life so far.
type tenant struct {
	*lab.VM
	hw   hardware
	seed uint64
	// pages is how many pages the guest verifies.
	pages uint32
	// seq is the last number of the guest's counter that an earlier watcher heard.
	seq uint32
}

// current is the stage that tests share. A test that fails leaves it in doubt, so the
// next one gets a new one.
var current *stage

// onStage gives a test the stage, with slow links to the hosts and a healthy guest.
func onStage(t *testing.T) *stage {
	t.Helper()
	if current == nil {
		began := time.Now()
		s, err := newStage(deadline(t, bootPatience))
		if err != nil {
			t.Fatalf("setting the stage: %v", err)
		}
		current = s
		t.Logf("a guest of %d MiB booted in %.1f s", guestMiB, time.Since(began).Seconds())
	}
	s := current
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		s.explain(t)
		if err := strike(); err != nil {
			t.Errorf("clearing the stage: %v", err)
		}
	})
	s.links(t, hostDown)
	return s
}

// strike removes the stage, if there is one.
func strike() error {
	if current == nil {
		return nil
	}
	s := current
	current = nil
	return s.close()
}

// deadline is a context for a part of a test.
func deadline(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, fmt.Errorf("%s: not done within %v", t.Name(), d))
	t.Cleanup(cancel)
	return ctx
}

func newStage(ctx context.Context) (_ *stage, err error) {
	s := &stage{Scene: &lab.Scene{Assets: assets, Spec: lab.DefaultSpec()}}
	s.Spec.MemoryMiB = guestMiB
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.Run, err = lab.NewRunDir(); err != nil {
		return nil, err
	}
	host := lab.Rates{Up: hostUp, Down: hostDown}
	nodes := []lab.NodeSpec{{Name: "host-a", Rates: host}, {Name: "host-b", Rates: host}}
	for i := range intermediaries {
		nodes = append(nodes, lab.NodeSpec{
			Name: lab.IntermediaryNode(i + 1), Rates: lab.Rates{Up: intermediaryUp, Down: intermediaryUp},
		})
	}
	if s.Net, err = lab.NewNetwork(s.Run, nodes, s.Spec.Queue); err != nil {
		return nil, err
	}
	s.Source, s.Destination, s.Intermediaries = s.Net.Nodes[0], s.Net.Nodes[1], s.Net.Nodes[2:]
	if s.agents, err = lab.StartAgents(ctx, s.Scene, lab.AgentOptions{Binary: agentBinary, Verbosity: 1}); err != nil {
		return nil, err
	}
	if s.guest, err = s.boot(ctx, "vm1", hardware{}, 1); err != nil {
		return nil, err
	}
	return s, nil
}

// guestConfig is what a guest is told; guests with different seeds hold different data.
func guestConfig(memoryMiB int, seed uint64) guest.Config {
	return guest.Config{
		Seed: seed, FillMiB: memoryMiB - kernelMiB, Mix: guest.DefaultMix, WorkingSet: 16,
		DirtyRate: 1000, VerifyRate: 1000, Requests: 400, Touches: 4, CPUs: 1,
	}
}

func (h hardware) config(s *stage, name string, seed uint64) lab.QEMUConfig {
	if h.memoryMiB == 0 {
		h.memoryMiB = guestMiB
	}
	s.names++
	return lab.QEMUConfig{
		Name: fmt.Sprintf("%s-%d", name, s.names), Assets: s.Assets, Machine: h.machine,
		MemoryMiB: h.memoryMiB, Memory: h.memory, Guest: guestConfig(h.memoryMiB, seed), Extra: h.extra,
	}
}

// boot starts a guest at Source and waits until its memory is filled.
func (s *stage) boot(ctx context.Context, name string, hw hardware, seed uint64) (_ *tenant, err error) {
	g := &tenant{VM: &lab.VM{Name: name, Guest: lab.NewGuest(name)}, hw: hw, seed: seed}
	config := hw.config(s, name, seed)
	if g.Source, err = lab.StartQEMU(ctx, s.Source, config); err != nil {
		return nil, err
	}
	if err := g.Guest.Attach(ctx, lab.AtSource, g.Source.Telemetry); err != nil {
		return nil, err
	}
	filled, err := g.Guest.WaitFilled(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w\nthe guest's console ended with:\n%s", err, g.Source.Console())
	}
	g.pages = filled.Pages
	if want := uint32(config.Guest.FillMiB) << 20 / guest.PageSize; filled.Pages != want {
		return nil, fmt.Errorf("guest %s filled %d pages, want %d", name, filled.Pages, want)
	}
	return g, nil
}

// dismiss ends a guest that a test booted for itself.
func (s *stage) dismiss(g *tenant) {
	g.Guest.Close()
	for _, q := range []*lab.QEMU{g.Source, g.Destination} {
		if q != nil {
			q.Close()
		}
	}
}

// links makes the way to both hosts as slow as asked, in bits per second; 0 lifts all
// limits.
func (s *stage) links(t *testing.T, down int64) {
	t.Helper()
	r := lab.Rates{Up: hostUp, Down: down}
	if down == 0 {
		r = lab.Rates{}
	}
	for _, n := range []*lab.Node{s.Source, s.Destination} {
		if n.Rates() == r {
			continue
		}
		if err := n.SetRates(r); err != nil {
			t.Fatal(err)
		}
	}
}

// state is the folder on tmpfs where a node's agent keeps pool and gathers.
func (s *stage) state(t *testing.T, n *lab.Node) string {
	t.Helper()
	dir, err := s.Run.Shared("agents")
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, n.Name)
}

// close strikes the stage and makes sure that nothing of it is left on the machine.
func (s *stage) close() error {
	var err error
	var processes []*lab.Process
	if s.agents != nil {
		for _, n := range s.Net.Nodes {
			if p := s.agents.Process(n); p != nil {
				processes = append(processes, p)
			}
		}
		err = s.agents.Close()
	}
	if s.guest != nil {
		processes = append(processes, s.guest.Source.Process)
		s.dismiss(s.guest)
	}
	err = errors.Join(err, s.Close())
	for _, p := range processes {
		select {
		case <-p.Done():
		default:
			err = errors.Join(err, fmt.Errorf("process %d (%s) outlived its stage", p.Pid(), p.Name))
		}
	}
	if s.Run == nil {
		return err
	}
	left, _ := filepath.Glob("/run/netns/*" + s.Run.ID + "*")
	for _, path := range []string{s.Run.Path, "/dev/shm/sglab-" + s.Run.ID} {
		if _, e := os.Stat(path); e == nil {
			left = append(left, path)
		}
	}
	if len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("left behind: %q", left))
	}
	return err
}
