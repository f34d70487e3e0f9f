// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"context"
	"errors"
	"fmt"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// errBad is wrapped by errors about a source that speaks the protocol but makes no
// sense.
var errBad = errors.New("the source contradicts itself")

// onSetup takes the description of the VM and makes the state for it.
func (e *Engine) onSetup(f *wire.Frame) error {
	if e.isDescribed() {
		return fmt.Errorf("%w: the VM is described twice", wire.ErrProtocol)
	}
	su, err := wire.ParseSetup(f.Body)
	if err != nil {
		return err
	}
	l, err := pages.NewLayout(su.Blocks)
	if err != nil {
		return fmt.Errorf("%w: %w", errBad, err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	m := meta{Migration: e.cfg.Migration.String(), Source: e.source, Setup: su}
	if err := e.state.begin(m, l); err != nil {
		return fmt.Errorf("%w: %w", errLocal, err)
	}
	if err := e.describe(l); err != nil {
		return err
	}
	e.setupSeq = f.Seq
	close(e.described)
	return nil
}

// onHolders adds intermediaries to the table.
func (e *Engine) onHolders(f *wire.Frame) error {
	h, err := wire.ParseHolders(f.Body)
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	setup := e.state.meta.Setup
	if int(h.First) > len(setup.Holders) {
		return fmt.Errorf("%w: intermediaries are added at place %d of a table of %d", wire.ErrProtocol, h.First, len(setup.Holders))
	}
	known := len(setup.Holders) - int(h.First)
	if known >= len(h.Holders) {
		return nil
	}
	added := h.Holders[known:]
	setup.Holders = append(setup.Holders, added...)
	if err := e.state.save(); err != nil {
		return fmt.Errorf("%w: %w", errLocal, err)
	}
	return e.addHolders(added)
}

// onRecords takes page map records.
func (s *session) onRecords(f *wire.Frame) error {
	e := s.e
	list, err := wire.ParseRecords(s.records[:0], f.Body)
	if err != nil {
		return err
	}
	s.records = list
	for len(list) > 0 {
		e.mu.Lock()
		for pagesLeft := 16 << 10; len(list) > 0 && pagesLeft > 0; list = list[1:] {
			if err = e.book.apply(list[0]); err != nil {
				break
			}
			pagesLeft -= int(list[0].Count)
		}
		e.wakeAll()
		e.mu.Unlock()
		if err != nil {
			return e.contradiction(err)
		}
	}
	return nil
}

// contradiction turns an error of the book into one that ends the connection.
func (e *Engine) contradiction(err error) error {
	err = fmt.Errorf("%w: %w", errBad, err)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stage > stageOpening {
		e.stall(stallPages, err.Error())
	}
	return err
}

// onPackage collects the device state.
func (e *Engine) onPackage(f *wire.Frame) error {
	p, err := wire.ParsePackage(f.Body)
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	have := uint64(len(e.pkg))
	switch {
	case e.cancelled:
		return ErrCancelled
	case p.Total > e.cfg.PackageBytes:
		return fmt.Errorf("%w: device state of %d bytes, at most %d are taken", errBad, p.Total, e.cfg.PackageBytes)
	case have > 0 && p.Total != e.pkgTotal:
		return fmt.Errorf("%w: the device state is said to have %d and %d bytes", wire.ErrProtocol, e.pkgTotal, p.Total)
	case p.Offset != have || have+uint64(len(p.Data)) > p.Total || len(p.Data) == 0:
		return fmt.Errorf("%w: %d bytes of device state at %d follow %d of %d", wire.ErrProtocol, len(p.Data), p.Offset, have, p.Total)
	}
	e.pkgTotal = p.Total
	e.pkg = append(e.pkg, p.Data...)
	if uint64(len(e.pkg)) == p.Total {
		e.phase = max(e.phase, wire.PhaseSwitched)
		e.stats.switched = time.Now()
		close(e.packaged)
	}
	return nil
}

// onState notes how far the source is.
func (e *Engine) onState(f *wire.Frame) error {
	st, err := wire.ParseState(f.Body)
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.phase = max(e.phase, st.Phase)
	if e.phase >= wire.PhaseReleased && !e.state.meta.Released {
		e.state.meta.Released = true
		if err := e.state.save(); err != nil {
			e.log.Error(err, "The release of the source was not kept")
		}
	}
	return nil
}

// onCommit takes the VM over, or says what is missing.
func (e *Engine) onCommit(f *wire.Frame) error {
	c, err := wire.ParseCommit(f.Body)
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.commitErr = e.takeOver(c.Pages)
	e.commitSeq = f.Seq
	if e.commitErr != nil {
		e.log.Error(e.commitErr, "The source cannot be released yet")
	}
	e.wakeAll()
	return nil
}

// takeOver commits; the caller holds e.mu.
func (e *Engine) takeOver(claimed uint64) error {
	if reason := e.stalls[stallPages]; reason != "" && !e.book.committed {
		return errors.New(reason)
	}
	if e.stage < stageFeeding {
		return errors.New("the destination QEMU has not loaded the device state yet")
	}
	if e.book.committed {
		if claimed != e.state.meta.Claimed {
			return fmt.Errorf("%d pages were committed before, not %d", e.state.meta.Claimed, claimed)
		}
		return nil
	}
	if err := e.book.commit(claimed); err != nil {
		return err
	}
	e.state.meta.Committed, e.state.meta.Claimed = true, claimed
	if err := e.state.save(); err != nil {
		return err
	}
	e.stats.committed = time.Now()
	return nil
}

// onAbort ends the gather, unless the guest runs here already.
func (e *Engine) onAbort(f *wire.Frame) error {
	a, err := wire.ParseAbort(f.Body)
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stage > stageOpening {
		return fmt.Errorf("%w: it aborts a migration whose guest runs at the destination: %s", errBad, a.Reason)
	}
	return fmt.Errorf("%w: %s", ErrAborted, a.Reason)
}

// errLocal is wrapped by errors of this node that end a gather before the switch.
var errLocal = errors.New("the destination cannot keep the gather's state")

// wakeAll wakes every goroutine that decides by the book; the caller holds e.mu.
func (e *Engine) wakeAll() {
	e.book.units.assemble()
	e.wakeWriter.raise()
	if e.session != nil {
		e.session.wakeTell.raise()
		if len(e.book.wants) > 0 {
			e.session.wakeWant.raise()
		}
	}
	e.wakeHolders()
}

// wait waits until one of the channels is closed or ctx ends.
func wait(ctx context.Context, c <-chan struct{}) error {
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
