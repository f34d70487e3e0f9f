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
	buf  []byte // decrypted pages of one frame

	descs   [wire.MaxBatch]wire.Desc
	sealed  [wire.MaxBatch][]byte
	n       int
	collect func(wire.Desc, []byte) error
}

// receivePages stores what a lane brings and acknowledges it.
func (s *session) receivePages(ctx context.Context, lane *wire.Lane) error {
	in := &intake{s: s, lane: lane, buf: make([]byte, 0, wire.MaxBatch*pages.Size)}
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

// store takes one frame: all its pages are in the store and in the map before it is
// acknowledged, so that a restarted agent has them too.
func (in *intake) store(f *wire.Frame) error {
	p, err := f.Pages()
	if err != nil {
		return err
	}
	in.n = 0
	if err := p.Each(in.collect); err != nil {
		return err
	}
	err = in.keep()
	if errors.Is(err, syscall.ENOSPC) {
		in.s.e.log.Error(err, "The state directory is full, pages of the source are refused")
		return in.lane.Send(f.Seq, &wire.Nack{Code: wire.CodeFull})
	}
	if err != nil {
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
// with busy pages stores its other pages first, and holds none while it waits.
func (in *intake) keep() error {
	todo := ^uint64(0) >> (wire.MaxBatch - in.n)
	counted := false
	for todo != 0 {
		take, later := in.claim(todo, &counted)
		if take == 0 && later == 0 {
			return nil
		}
		stored, err := in.write(take)
		if e := in.enter(take, stored); err == nil {
			err = e
		}
		if err != nil {
			return err
		}
		todo = later
	}
	return nil
}

// claim chooses among the pages of todo those to store now, and those that are busy.
func (in *intake) claim(todo uint64, counted *bool) (take, later uint64) {
	e := in.s.e
	e.mu.Lock()
	defer e.mu.Unlock()
	if !*counted {
		*counted = true
		now := time.Now()
		for k := range in.n {
			in.s.received += uint64(in.descs[k].Length)
			e.stats.direct.Add(int(in.descs[k].Length), now)
		}
		e.stats.directAt = now
	}
	for {
		take, later = 0, 0
		for k := range in.n {
			d := &in.descs[k]
			switch {
			case todo>>k&1 == 0 || !e.book.wantsVersion(d.Index, d.Version):
			case e.busy.Test(d.Index):
				later |= 1 << k
			default:
				e.busy.Set(d.Index)
				take |= 1 << k
			}
		}
		if take != 0 || later == 0 {
			return take, later
		}
		e.settled.Wait() // for another lane, which ends
	}
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
		e.busy.Clear(d.Index)
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
