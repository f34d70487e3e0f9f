// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
	"scattergather.io/scattergather/internal/wire"
)

// wrapPing is the PING that ends the package made of a pre-copy tail; stock QEMU uses
// the same value there (migration/migration.c, postcopy_start).
const wrapPing = 3

// readSource accepts the source QEMU and reads its main stream to the end.
func (e *Engine) readSource() {
	src, err := e.acceptMain()
	if err != nil {
		e.fail(err)
		return
	}
	e.mu.Lock()
	e.source = src
	e.mu.Unlock()
	stop := context.AfterFunc(e.ctx, func() { src.halt(context.Cause(e.ctx)) })
	defer stop()
	if err = e.readMain(src); err != nil {
		e.sourceFailed(err)
	}
}

// sourceFailed ends a migration whose source broke, unless its device state was handed
// over: then there is nothing to do but to say so.
func (e *Engine) sourceFailed(err error) {
	e.mu.Lock()
	handed := e.handed
	e.mu.Unlock()
	switch {
	case e.ctx.Err() != nil:
	case handed:
		e.stall(fmt.Sprintf("the source QEMU's stream broke, pages that only it has are out of reach: %v", err))
	default:
		e.fail(err)
	}
}

// reader is the state of reading the main stream.
type reader struct {
	e    *Engine
	src  *source
	dec  *qemu.Decoder
	feed *feeder
}

func (e *Engine) readMain(src *source) error {
	feed := &feeder{e: e}
	r := &reader{e: e, src: src, feed: feed, dec: qemu.NewDecoder(&tap{src: src, feed: feed},
		qemu.DecoderOptions{Multifd: e.cfg.MultifdChannels > 0})}
	var ev qemu.Event
	for {
		if err := r.dec.Next(&ev); err != nil {
			return fmt.Errorf("reading the source QEMU: %w", err)
		}
		if err := r.event(&ev); err != nil {
			return err
		}
		if ev.Kind == qemu.EventEnd {
			return r.end()
		}
	}
}

// event acts on one event of the stream.
func (r *reader) event(ev *qemu.Event) error {
	switch ev.Kind {
	case qemu.EventPage, qemu.EventZero:
		i, err := r.e.layout.Index(ev.Block, ev.Offset)
		if err != nil {
			return fmt.Errorf("page of the source QEMU: %w", err)
		}
		if ev.Kind == qemu.EventZero {
			return r.feed.zero(i)
		}
		return r.feed.page(i, ev.Data)
	case qemu.EventCommand:
		return r.command(ev)
	case qemu.EventRAMStart:
		return r.begin()
	case qemu.EventSync:
		if err := r.prepare(); err != nil {
			return err
		}
		return r.e.barrier.Main(r.e.ctx)
	case qemu.EventPackage:
		pings, err := qemu.PackagePings(ev.Payload)
		if err != nil {
			return err
		}
		return r.handOver(slices.Clone(ev.Payload), pings)
	case qemu.EventTail:
		return r.handOver(qemu.WrapTail(ev.Payload, wrapPing), nil)
	}
	return nil
}

func (r *reader) command(ev *qemu.Event) error {
	switch ev.Command {
	case qemu.CommandOpenReturnPath:
		r.src.mu.Lock()
		r.src.returnPath = true
		r.src.mu.Unlock()
	case qemu.CommandPing:
		// A stream that is broken tells so to its reader, too, and may still have pages.
		if err := r.src.pong(ev.Ping); err != nil {
			r.e.log.Error(err, "Answering a PING")
		}
	case qemu.CommandPostcopyDiscard:
		for _, g := range ev.Ranges {
			first, err := r.e.layout.Index(ev.Block, g.Start)
			if err != nil {
				return fmt.Errorf("discard of the source QEMU: %w", err)
			}
			if err := r.e.discard(first, g.Length/pageBytes); err != nil {
				return err
			}
		}
	case qemu.CommandEnableCOLO, qemu.CommandPostcopyResume, qemu.CommandRecvBitmap:
		return fmt.Errorf("%v from the source QEMU: %w", ev.Command, qemu.ErrUnsupported)
	}
	// ADVISE is in Decoder.Setup; SWITCHOVER_START tells nothing that the package
	// does not tell, and a destination of an older QEMU would reject it.
	return nil
}

// prepare opens the books once the block table was read. The pages of multifd channels
// may come from now on: a stock QEMU with multifd keeps the bytes behind the table,
// which tell that the setup is over, in its buffer while the channels already carry
// pages. They wait in the backlog.
func (r *reader) prepare() error {
	e, s := r.e, r.dec.Setup()
	if e.layout != nil {
		return nil
	}
	blocks := slices.Clone(s.RAM.Blocks)
	for i := range blocks {
		if size := e.cfg.PageSizes[blocks[i].Name]; size != 0 && !s.Postcopy {
			blocks[i].PageSize = size
		}
	}
	layout, err := pages.NewLayout(blocks)
	if err != nil {
		return fmt.Errorf("RAM of the source QEMU: %w", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.layout, e.ledger = layout, pages.NewLedger(layout)
	e.safe, e.wanted = pages.NewBitmap(layout.Pages()), pages.NewBitmap(layout.Pages())
	e.changed.Broadcast()
	return nil
}

// begin offers the VM to the destination and waits for its QEMU to accept it. Nothing
// but the setup leaves before that.
func (r *reader) begin() error {
	if err := r.prepare(); err != nil {
		return err
	}
	e, s := r.e, r.dec.Setup()
	e.mu.Lock()
	e.result.Started = time.Now()
	e.enter(Preparing)
	e.lead(e.setup(s))
	e.mu.Unlock()

	ctx, cancel := context.WithTimeoutCause(e.ctx, e.cfg.ReadyTimeout,
		fmt.Errorf("the destination's QEMU was not ready within %v", e.cfg.ReadyTimeout))
	defer cancel()
	if err := e.wait(ctx, func() bool { return e.ready }); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.enter(Precopy)
	e.post(&wire.State{Phase: wire.PhasePrecopy})
	e.drain(time.Now())
	e.room.Broadcast()
	if !s.Postcopy {
		e.log.Info("The source QEMU has postcopy-ram off: the guest moves when QEMU's pre-copy has converged")
		e.converges = true
	} else if e.cfg.Strategy == Immediate {
		e.switchOver()
	}
	return nil
}

// setup is what the destination must know before the first page.
func (e *Engine) setup(s *qemu.Setup) *wire.Setup {
	m := &wire.Setup{
		Key: e.key, Strategy: e.cfg.Strategy.String(), Machine: s.Machine,
		Config: slices.Clone(s.Config), Early: slices.Clone(s.Early),
		Section: s.RAM.Section, Instance: s.RAM.Instance, Version: s.RAM.Version,
		Postcopy: s.Postcopy, Blocks: e.layout.Blocks(),
	}
	for _, h := range e.holders[1:] {
		m.Holders = append(m.Holders, wire.Holder{
			Name: h.peer.Name, Addr: h.peer.Address, Identity: h.peer.Identity, Session: h.session,
		})
	}
	return m
}

// switchOver asks the hypervisor for the switch, once. The caller holds e.mu.
func (e *Engine) switchOver() {
	if e.switched || e.converges {
		return
	}
	e.switched = true
	e.enter(Switching)
	e.room.Broadcast() // the backlog may be longer now
	e.wg.Go(func() {
		if err := e.cfg.Switch(e.ctx); err != nil {
			e.notSwitched(fmt.Errorf("asking the hypervisor to switch to post-copy: %w", err))
		}
	})
}

// notSwitched ends a migration whose switch was refused, unless QEMU was about to end
// in pre-copy by itself: then the device state is on its way.
func (e *Engine) notSwitched(err error) {
	ctx, cancel := context.WithTimeout(e.ctx, settleTimeout)
	defer cancel()
	if e.wait(ctx, func() bool { return e.handed }) != nil {
		e.fail(err)
	}
}

// handOver gives the device state to the destination. Until now every failure was
// rolled back; from now on there is no way back.
func (r *reader) handOver(pkg []byte, pings []uint32) error {
	if err := r.feed.flush(false); err != nil {
		return err
	}
	e := r.e
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.failure != nil {
		return e.failure
	}
	e.handed, e.pings = true, pings
	e.result.Switched, e.result.PackageBytes = time.Now(), len(pkg)
	e.enter(Scattering)
	e.post(&wire.State{Phase: wire.PhaseSwitched})
	for at := 0; at < len(pkg); at += wire.MaxPackageChunk {
		e.post(&wire.Package{
			Total: uint64(len(pkg)), Offset: uint64(at),
			Data: pkg[at:min(at+wire.MaxPackageChunk, len(pkg))],
		})
	}
	return nil
}

// end closes the books when QEMU has sent everything.
func (r *reader) end() error {
	e := r.e
	if !e.handed {
		return errors.New("the source QEMU's stream ended without device state")
	}
	if err := r.feed.flush(true); err != nil {
		return err
	}
	if err := e.finishUnsent(); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.drained = true
	e.result.StreamBytes = r.dec.Offset()
	e.enter(Draining)
	e.post(&wire.State{Phase: wire.PhaseDrained})
	return nil
}
