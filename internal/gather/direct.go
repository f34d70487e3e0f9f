// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// intake stores the pages of one lane of the source. It belongs to that lane's
// goroutine.
type intake struct {
	s    *session
	lane *wire.Lane
	ctx  context.Context
	buf  []byte // decrypted pages of one frame

	descs  [wire.MaxBatch]wire.Desc
	sealed [wire.MaxBatch][]byte
	n      int
	// counted is true when the frame's bytes were noted.
	counted bool
	collect func(wire.Desc, []byte) error
}

// receivePages stores what a lane brings and acknowledges it.
func (s *session) receivePages(ctx context.Context, lane *wire.Lane) error {
	in := &intake{s: s, lane: lane, ctx: ctx, buf: make([]byte, 0, wire.MaxBatch*pages.Size)}
	stop := context.AfterFunc(ctx, func() {
		s.e.mu.Lock()
		defer s.e.mu.Unlock()
		s.e.settled.Broadcast()
	})
	defer stop()
	in.collect = in.note
	var f wire.Frame
	for {
		if err := lane.Receive(&f); err != nil {
			if errors.Is(err, io.EOF) {
				return errors.New("the source closed its connection")
			}
			return err
		}
		if f.Type != wire.TypePages {
			return fmt.Errorf("%w: frame of type %d on the %s lane of a destination", wire.ErrProtocol, f.Type, lane.Kind())
		}
		// The description travels on another lane and may be behind.
		if err := wait(ctx, s.e.described); err != nil {
			return err
		}
		if err := in.store(&f); err != nil {
			return err
		}
	}
}

// store takes one frame: all its pages are in QEMU, or in the store and the map, before
// it is acknowledged, so that a restarted agent has them too.
func (in *intake) store(f *wire.Frame) error {
	p, err := f.Pages()
	if err != nil {
		return err
	}
	in.n, in.counted = 0, false
	if err := p.Each(in.collect); err != nil {
		return err
	}
	passed, err := in.keep(f.Seq)
	if errors.Is(err, syscall.ENOSPC) {
		in.s.e.log.Error(err, "The state directory is full, pages of the source are refused")
		return in.lane.Send(f.Seq, &wire.Nack{Code: wire.CodeFull})
	}
	if err != nil || passed {
		return err
	}
	return in.lane.Send(f.Seq, wire.Ack{})
}

func (in *intake) note(d wire.Desc, sealed []byte) error {
	if uint64(d.Index) >= in.s.e.layout.Pages() {
		return fmt.Errorf("%w: page %d of %d", wire.ErrProtocol, d.Index, in.s.e.layout.Pages())
	}
	if d.Missing {
		return fmt.Errorf("%w: the source marks page %d as missing", wire.ErrProtocol, d.Index)
	}
	in.descs[in.n], in.sealed[in.n] = d, sealed
	in.n++
	return nil
}

// keep stores the noted pages that are new. Two lanes may bring two versions of one
// page, or the same after a reconnect, so a page is busy while it is stored; a frame
// with busy pages stores its other pages first, and holds none while it waits. passed
// is true if the pages are on their way into QEMU, past the store; the frame is
// acknowledged later then.
func (in *intake) keep(seq uint64) (passed bool, err error) {
	todo := ^uint64(0) >> (wire.MaxBatch - in.n)
	for todo != 0 {
		take, later, p, err := in.claim(todo, seq)
		if err != nil || take == 0 && later == 0 {
			return false, err
		}
		if p != nil {
			return true, in.pass(p, take)
		}
		stored, err := in.write(take)
		if e := in.enter(take, stored); err == nil {
			err = e
		}
		if err != nil {
			return false, err
		}
		todo = later
	}
	return false, nil
}

// claim chooses among the pages of todo those to take now, and those that are busy. It
// returns a parcel if they may go past the store.
func (in *intake) claim(todo uint64, seq uint64) (take, later uint64, p *parcel, err error) {
	e := in.s.e
	e.mu.Lock()
	defer e.mu.Unlock()
	if !in.counted {
		in.count(time.Now())
	}
	for {
		take, later = 0, 0
		for k := range in.n {
			d := &in.descs[k]
			switch {
			case todo>>k&1 == 0 || !e.book.wantsVersion(d.Index, d.Version):
			case e.book.busy.Test(d.Index):
				later |= 1 << k
			default:
				e.book.busy.Set(d.Index)
				take |= 1 << k
			}
		}
		if later == 0 && take != 0 {
			p = in.parcel(take, seq)
		}
		if take != 0 || later == 0 {
			return take, later, p, nil
		}
		if in.ctx.Err() != nil {
			return 0, 0, nil, context.Cause(in.ctx)
		}
		e.settled.Wait() // for another lane, or for QEMU
	}
}

// count notes that a frame has come; the caller holds e.mu.
func (in *intake) count(now time.Time) {
	in.counted = true
	e := in.s.e
	for k := range in.n {
		in.s.received += uint64(in.descs[k].Length)
		e.stats.direct.Add(int(in.descs[k].Length), now)
	}
	e.stats.directAt = now
}

// write decrypts pages and writes them, each run by one call. It returns those that
// were written.
func (in *intake) write(take uint64) (stored uint64, err error) {
	e := in.s.e
	for k := 0; k < in.n; k++ {
		if take>>k&1 == 0 {
			continue
		}
		from, first := k, in.descs[k].Index
		buf := in.buf[:0]
		for ; k < in.n && take>>k&1 == 1 && in.descs[k].Index == first+pages.Index(k-from); k++ {
			d := &in.descs[k]
			if buf, err = openPage(e.sealer, buf, d, in.sealed[k]); err != nil {
				err = e.contradiction(fmt.Errorf("page %d, version %d: %w", d.Index, d.Version, err))
				break
			}
		}
		k = from + len(buf)/pages.Size
		if werr := e.storeWrite(first, buf); werr != nil {
			return stored, werr
		}
		for j := from; j < k; j++ {
			stored |= 1 << j
		}
		if err != nil {
			return stored, err
		}
		k--
	}
	return stored, nil
}

// storeWrite stores pages, if there are any.
func (e *Engine) storeWrite(first pages.Index, data []byte) error {
	if len(data) == 0 {
		return nil
	}
	return e.state.store.write(first, data)
}

// openPage appends the page to dst, which is left as it was if that fails.
func openPage(s *wire.Sealer, dst []byte, d *wire.Desc, sealed []byte) ([]byte, error) {
	if d.Encoding != wire.EncodingRaw {
		return dst, fmt.Errorf("encoding %d is not known", d.Encoding)
	}
	if len(sealed) != wire.MaxSealed {
		return dst, fmt.Errorf("%d sealed bytes, want %d", len(sealed), wire.MaxSealed)
	}
	return s.Open(dst, sealed, d.Index, d.Version, d.Encoding)
}

// enter notes stored pages in the book; the others of take are only released.
func (in *intake) enter(take, stored uint64) error {
	e := in.s.e
	e.mu.Lock()
	defer e.mu.Unlock()
	var err error
	for k := range in.n {
		if take>>k&1 == 0 {
			continue
		}
		d := &in.descs[k]
		e.book.settle(d.Index)
		if stored>>k&1 == 1 {
			if _, e := e.book.stored(d.Index, d.Version); e != nil && err == nil {
				err = e
			}
		}
	}
	e.settled.Broadcast()
	e.wakeAll()
	if err != nil {
		err = fmt.Errorf("%w: %w", errBad, err)
		if e.stage > stageOpening {
			e.stall(stallPages, err.Error())
		}
	}
	return err
}
