// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"context"
	"errors"
	"fmt"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
	"scattergather.io/scattergather/internal/wire"
)

const (
	// batchPages is how many pages go into the stream between two PINGs when nobody
	// waits for one. A demand fault that comes just then waits behind them.
	batchPages = 16
	// maxUnplaced bounds the pages that were written and not answered for: what a
	// demand fault has to queue behind in the socket and in QEMU.
	maxUnplaced = 128
	// maxBatchPages is what one batch holds at most unless it is a large host page:
	// an answer of an intermediary goes in whole.
	maxBatchPages = batchPages + wire.MaxBatch
	// recordBytes is the largest page record.
	recordBytes = 8 + 1 + pages.MaxName + pages.Size
	// flushBytes is when a large host page is written out in between.
	flushBytes = 32 * recordBytes
)

// errBroken is wrapped when writing to QEMU failed; the return path knows more.
var errBroken = errors.New("the stream into the destination QEMU broke")

// flight is a batch that was written and is not known to be placed yet.
type flight struct {
	ping    uint32
	runs    runs
	parcels []*parcel
}

// writer is the only goroutine that writes pages into QEMU's stream, and so the one
// that sees to it that each is written once.
type writer struct {
	e     *Engine
	f     *feed
	ctx   context.Context
	state qemu.PageState
	out   []byte
	segs  []segment
	// flight is the batch being written, wrote its pages.
	flight *flight
	wrote  runs
	// For appendSealed: the segment it works on, the place in it, and pages that did
	// not open.
	reply segment
	at    int
	bad   []wire.PageRef
	why   error
	into  func(wire.Desc, []byte) error
	bufs  [][]byte
}

func newWriter(e *Engine, f *feed) *writer {
	w := &writer{e: e, f: f, out: make([]byte, 0, flushBytes+maxBatchPages*recordBytes)}
	w.into = w.appendSealed
	return w
}

// run writes batches until QEMU has been given every page and the end of the stream.
func (w *writer) run(ctx context.Context) error {
	w.ctx = ctx
	stop := context.AfterFunc(ctx, func() { _ = w.f.conn.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		end, err := w.choose(ctx)
		if err != nil {
			return err
		}
		if end {
			return w.end()
		}
		if err := w.write(); err != nil {
			return fmt.Errorf("%w: %w", errBroken, err)
		}
	}
}

// choose waits until there is something to write and claims it.
func (w *writer) choose(ctx context.Context) (end bool, err error) {
	e := w.e
	for {
		e.mu.Lock()
		w.fill()
		switch {
		case len(w.segs) > 0:
			w.flight = e.newFlight()
			e.mu.Unlock()
			return false, nil
		case e.book.finished() && e.stage >= stageFeeding:
			e.mu.Unlock()
			return true, nil
		}
		e.mu.Unlock()
		select {
		case <-ctx.Done():
			return false, context.Cause(ctx)
		case <-e.wakeWriter:
		}
	}
}

// fill claims the next batch. One with pages that a guest waits for has no others.
// The caller holds e.mu.
func (w *writer) fill() {
	e := w.e
	w.segs = w.segs[:0]
	demand := false
	for left := batchPages; left > 0; {
		background := !demand && e.unplaced < maxUnplaced
		s, urgent, ok := e.book.next(left, background)
		if !ok {
			return
		}
		demand = demand || urgent
		w.segs = append(w.segs, s)
		left -= max(1, s.n)
		e.unplaced += s.n
	}
}

// write writes the claimed segments as one section, and a PING behind it.
func (w *writer) write() error {
	defer w.drop()
	w.wrote.reset()
	w.out = qemu.AppendPartStart(w.out[:0], w.e.opening.RAM.Section)
	for k := range w.segs {
		s := &w.segs[k]
		var err error
		switch s.kind {
		case fromStore:
			err = w.appendStored(s.first, s.n, 0)
		case fromZero:
			w.appendZeros(s.first, s.n)
		case fromReply:
			err = w.appendReply(s)
		case fromUnit:
			err = w.appendUnit(s)
		case fromParcel:
			w.appendParcel(s)
		}
		if err != nil {
			return err
		}
	}
	w.out = qemu.AppendPartEnd(w.out, w.e.opening.RAM.Section)
	w.out = qemu.AppendPing(w.out, w.flight.ping)
	w.e.launch(w.flight, &w.wrote)
	w.flight = nil
	if _, err := w.f.conn.Write(w.out); err != nil {
		return err
	}
	w.e.written(&w.wrote)
	return nil
}

// drop gives answers and parcels back that were not reached because writing failed.
func (w *writer) drop() {
	for k := range w.segs {
		s := &w.segs[k]
		if s.reply != nil {
			w.e.recycle(s.reply, nil, nil)
		}
		if s.parcel != nil {
			w.e.repass(s.parcel)
		}
	}
	if w.flight != nil {
		for _, p := range w.flight.parcels {
			w.e.repass(p)
		}
		w.flight = nil
	}
}

// appendParcel appends the pages that came straight from the source.
func (w *writer) appendParcel(s *segment) {
	for k, ref := range s.parcel.refs {
		if s.mask>>k&1 == 1 {
			name, block, offset := w.locate(ref.Index)
			w.out = qemu.AppendPage(w.out, &w.state, name, block, offset, s.parcel.buf[k*pages.Size:])
			w.wrote.add(ref.Index)
		}
	}
	w.flight.parcels = append(w.flight.parcels, s.parcel)
	s.parcel = nil
}

// locate returns what a record says of page i.
func (w *writer) locate(i pages.Index) (name string, block int, offset uint64) {
	block, offset = w.e.layout.Locate(i)
	return w.e.layout.Blocks()[block].Name, block, offset
}

func (w *writer) appendZeros(first pages.Index, n int) {
	for i := first; i < first+pages.Index(n); i++ {
		name, block, offset := w.locate(i)
		w.out = qemu.AppendZero(w.out, &w.state, name, block, offset)
	}
	w.wrote.addRun(first, uint64(n))
}

// appendStored appends n pages from the store, except those in zeros, whose bit k
// stands for page first+k; these are zero. n is at most 64 then.
func (w *writer) appendStored(first pages.Index, n int, zeros uint64) error {
	for k := 0; k < n; {
		if zeros>>k&1 == 1 {
			w.appendZeros(first+pages.Index(k), 1)
			k++
			continue
		}
		from := k
		w.bufs = w.bufs[:0]
		for ; k < n && zeros>>k&1 == 0; k++ {
			name, block, offset := w.locate(first + pages.Index(k))
			w.out = qemu.AppendPageHeader(w.out, &w.state, name, block, offset)
			at := len(w.out)
			w.out = w.out[:at+pages.Size]
			w.bufs = append(w.bufs, w.out[at:at+pages.Size:at+pages.Size])
		}
		if err := w.read(first+pages.Index(from), w.bufs); err != nil {
			return err
		}
		w.wrote.addRun(first+pages.Index(from), uint64(k-from))
	}
	return nil
}

// read reads pages from the store. A store that cannot be read stalls the gather; it
// does not break QEMU's stream.
func (w *writer) read(first pages.Index, bufs [][]byte) error {
	e := w.e
	for {
		err := e.state.store.read(first, bufs)
		e.mu.Lock()
		if err == nil {
			e.unstall(stallStore)
			e.mu.Unlock()
			return nil
		}
		e.stall(stallStore, err.Error())
		e.mu.Unlock()
		if !pause(w.ctx, time.Second) {
			return context.Cause(w.ctx)
		}
	}
}

// appendReply opens the pages of an intermediary's answer straight into the stream.
func (w *writer) appendReply(s *segment) error {
	w.reply, w.at, w.bad = *s, 0, w.bad[:0]
	if s.mask != 0 {
		if err := s.reply.pages.Each(w.into); err != nil {
			return err
		}
	}
	w.e.recycle(s.reply, w.bad, w.why)
	s.reply = nil
	return nil
}

func (w *writer) appendSealed(d wire.Desc, sealed []byte) error {
	k := w.at
	w.at++
	if w.reply.mask>>k&1 == 0 {
		return nil
	}
	n, was := len(w.out), w.state
	name, block, offset := w.locate(d.Index)
	w.out = qemu.AppendPageHeader(w.out, &w.state, name, block, offset)
	out, err := openPage(w.e.sealer, w.out, &d, sealed)
	if err != nil {
		w.out, w.state, w.why = w.out[:n], was, err
		w.bad = append(w.bad, wire.PageRef{Index: d.Index, Version: d.Version})
		return nil //nolint:nilerr // a bad page is its holder's fault: recycle has it read again
	}
	w.out = out
	w.wrote.add(d.Index)
	return nil
}

// appendUnit appends a large host page, all of whose pages are zero or in the store.
func (w *writer) appendUnit(s *segment) error {
	for k := 0; k < s.n; k += 64 {
		n := min(64, s.n-k)
		first := s.first + pages.Index(k)
		if err := w.appendStored(first, n, w.e.zerosOf(first, n)); err != nil {
			return err
		}
		if len(w.out) < flushBytes {
			continue
		}
		if _, err := w.f.conn.Write(w.out); err != nil {
			return err
		}
		w.out = w.out[:0]
	}
	return nil
}

// end tells QEMU that it has been given everything.
func (w *writer) end() error {
	if err := w.e.enter(stageEnding); err != nil {
		return err
	}
	w.out = qemu.AppendRAMEnd(w.out[:0], w.e.opening.RAM.Section)
	w.out = qemu.AppendEOF(w.out)
	if _, err := w.f.conn.Write(w.out); err != nil {
		return fmt.Errorf("%w: %w", errBroken, err)
	}
	return nil
}
