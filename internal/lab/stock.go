// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"fmt"
	"time"

	"scattergather.io/scattergather/internal/qemu/qmp"
)

// Names of the methods, as result.json has them.
const (
	StockPrecopy         = "stock-precopy"
	StockPostcopy        = "stock-postcopy"
	StockPostcopyPreempt = "stock-postcopy-preempt"
	ScatterGather        = "scatter-gather"
	ScatterGatherHybrid  = "scatter-gather-hybrid"
)

// Method is a way to move the VMs of a scene from the source to the
// destination.
type Method interface {
	// Name is the method's name in results.
	Name() string

	// Prepare readies the nodes before the guests' last quiet moment: it
	// starts what has to run on them. What it starts on a node ends with it.
	Prepare(ctx context.Context, s *Scene) error

	// Migrate moves one VM and sets its milestones. It is called for all VMs
	// at once and returns when the VM's destination holds every page.
	Migrate(ctx context.Context, s *Scene, v *VM) error

	// Close ends what Prepare began.
	Close() error
}

// stock is QEMU's own migration from one QEMU straight to the other.
type stock struct {
	name     string
	postcopy bool
	preempt  bool
}

// Stock gives the three ways of stock QEMU.
func Stock() []Method {
	return []Method{
		stock{name: StockPrecopy},
		stock{name: StockPostcopy, postcopy: true},
		stock{name: StockPostcopyPreempt, postcopy: true, preempt: true},
	}
}

func (m stock) Name() string                          { return m.name }
func (m stock) Prepare(context.Context, *Scene) error { return nil }
func (m stock) Close() error                          { return nil }

// unlimited is a bandwidth limit that no link here reaches, in bytes per
// second: the lab's links are the limit, not QEMU's 1 Gbit/s default.
const unlimited = 100 << 30

// stockPort is the TCP port where the destination of the VM with index 0 waits.
const stockPort = 4400

func (m stock) Migrate(ctx context.Context, s *Scene, v *VM) error {
	if err := m.configure(ctx, v); err != nil {
		return err
	}
	uri := ""
	for i := range s.VMs {
		if s.VMs[i] == v {
			uri = fmt.Sprintf("tcp:%s:%d", s.Destination.Addr, stockPort+i)
		}
	}
	if err := v.Destination.QMP.MigrateIncoming(ctx, uri); err != nil {
		return fmt.Errorf("%s: opening the destination: %w", v.Name, err)
	}
	v.Mark(func(t *Milestones) { t.Started = time.Now() })
	if err := v.Source.QMP.Migrate(ctx, uri); err != nil {
		return fmt.Errorf("%s: starting the migration: %w", v.Name, err)
	}
	if m.postcopy {
		if err := v.Source.QMP.StartPostcopy(ctx); err != nil {
			return fmt.Errorf("%s: switching to post-copy: %w", v.Name, err)
		}
	}
	firstPass := int64(0)
	end, err := v.Source.QMP.WaitMigration(ctx, func(now *qmp.Migration) bool {
		if now.RAM.DirtySyncCount <= 1 || m.postcopy {
			firstPass = now.RAM.NormalBytes
		}
		return now.Status == qmp.StatusCompleted
	})
	if err != nil {
		return fmt.Errorf("%s at the source: %w", v.Name, err)
	}
	v.Mark(func(t *Milestones) {
		t.Released = time.Now()
		t.MustLeave = firstPass
		if firstPass == 0 {
			t.MustLeave = end.RAM.NormalBytes
		}
	})
	_, err = v.Destination.QMP.WaitMigration(ctx, func(now *qmp.Migration) bool { return now.Status == qmp.StatusCompleted })
	if err != nil {
		return fmt.Errorf("%s at the destination: %w", v.Name, err)
	}
	v.Mark(func(t *Milestones) { t.Completed = time.Now() })
	return nil
}

func (m stock) configure(ctx context.Context, v *VM) error {
	caps := map[string]bool{"postcopy-ram": m.postcopy}
	if m.preempt {
		caps["postcopy-preempt"] = true
	}
	for _, q := range []*QEMU{v.Source, v.Destination} {
		if err := q.QMP.SetCapabilities(ctx, caps); err != nil {
			return fmt.Errorf("%s: setting the capabilities of %s: %w", v.Name, m.name, err)
		}
	}
	if err := v.Source.QMP.SetParameters(ctx, map[string]any{"max-bandwidth": int64(unlimited)}); err != nil {
		return fmt.Errorf("%s: lifting QEMU's bandwidth limit: %w", v.Name, err)
	}
	return nil
}
