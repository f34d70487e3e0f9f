// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// newFlight returns an empty batch with the next PING; the caller holds e.mu.
func (e *Engine) newFlight() *flight {
	f := &flight{}
	if n := len(e.spareFlights); n > 0 {
		f = e.spareFlights[n-1]
		e.spareFlights = e.spareFlights[:n-1]
	}
	f.ping = e.ping
	e.ping++
	return f
}

// launch notes that a batch with these pages is about to be written.
func (e *Engine) launch(f *flight, wrote *runs) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f.runs.list = append(f.runs.list, wrote.list...)
	f.runs.pages = wrote.pages
	e.flights.push(f)
}

// written notes that these pages are in QEMU's stream.
func (e *Engine) written(wrote *runs) {
	now := time.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stats.into.Add(int(wrote.pages)*pages.Size, now)
	for _, r := range wrote.list {
		e.book.served(r.First, uint64(r.Count), now, e.stats.fault)
	}
}

// landed notes that QEMU answered a PING: the batch before it and all earlier ones are
// placed. Answers to other PINGs are of no interest. The caller holds e.mu.
func (e *Engine) landed(ping uint32) {
	if e.flights.len() == 0 || ping-e.flights.at(0).ping >= uint32(e.flights.len()) {
		return
	}
	for e.flights.len() > 0 && ping-e.flights.at(0).ping < 1<<31 {
		e.land(e.flights.pop())
	}
	e.wakeWriter.raise()
	if e.punches.pages >= punchPages {
		e.wakeTend.raise()
	}
	if e.session != nil {
		e.session.wakeTell.raise() // there may be credit to give
	}
}

// landAll notes that QEMU has everything; the caller holds e.mu.
func (e *Engine) landAll() {
	for e.flights.len() > 0 {
		e.land(e.flights.pop())
	}
}

func (e *Engine) land(f *flight) {
	for _, r := range f.runs.list {
		for i := r.First; i < r.First+pages.Index(r.Count); i++ {
			if e.book.placed(i) {
				e.punches.add(i)
			}
		}
	}
	for _, p := range f.parcels {
		e.landParcel(p)
	}
	e.unplaced -= int(f.runs.pages)
	e.stats.placed += f.runs.pages
	e.spareFlight(f)
}

// spareFlight makes a batch usable again.
func (e *Engine) spareFlight(f *flight) {
	f.runs.reset()
	clear(f.parcels)
	f.parcels = f.parcels[:0]
	e.spareFlights = append(e.spareFlights, f)
}

// repass gives a parcel back to the writer that was not written.
func (e *Engine) repass(p *parcel) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.book.pass(p)
}

// zerosOf tells which of up to 64 pages of a large host page hold zeros; the others
// are in the store. Pages that were never sent are zero.
func (e *Engine) zerosOf(first pages.Index, n int) (zeros uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for k := range n {
		h, _ := e.book.where.At(first + pages.Index(k))
		if h == pages.Zero || h == pages.Absent {
			zeros |= 1 << k
		}
	}
	return zeros
}

// recycle ends a Read whose pages are written, except the bad ones.
func (e *Engine) recycle(r *reply, bad []wire.PageRef, why error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, ref := range bad {
		e.book.unclaim(ref.Index)
	}
	e.unplaced -= len(bad)
	if len(bad) > 0 {
		e.blame(r, len(bad), why)
	}
	e.release(r)
}

// release makes a Read's buffers usable again; the caller holds e.mu.
func (e *Engine) release(r *reply) {
	if r.frame != nil {
		if r.urgent {
			e.urgentFrames.Put(r.frame)
		} else {
			e.bulkFrames.Put(r.frame)
		}
	}
	if !r.urgent {
		e.backlog--
		e.wakeHolders()
	}
	r.frame, r.pages, r.refs = nil, wire.PageFrame{}, r.refs[:0]
	e.spare = append(e.spare, r)
}
