// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"bytes"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

var zeroPage [pages.Size]byte

// feeder turns the pages of one stream into batches. It belongs to the goroutine that
// reads the stream; with multifd there is one for each channel. The only copy of a
// page that it makes is the sealed one.
type feeder struct {
	e *Engine
	// open is the batch that is being filled, nil when there is none; limit is how
	// many pages it shall have.
	open  *flight
	limit int
}

// page takes a page in; data belongs to the decoder.
func (d *feeder) page(i pages.Index, data []byte) error {
	if bytes.Equal(data, zeroPage[:]) {
		return d.zero(i)
	}
	e := d.e
	e.mu.Lock()
	v, fresh, err := e.version(i)
	if err != nil || !fresh {
		e.mu.Unlock()
		return err
	}
	e.counts.Data++
	if e.wanted.Count() > 0 && e.wanted.Test(i) {
		urgent := e.express(i, v, data)
		e.mu.Unlock()
		if urgent {
			return nil
		}
		return d.add(i, v, data)
	}
	e.mu.Unlock()
	return d.add(i, v, data)
}

// zero takes in a page of zeros, which is a record and nothing else.
func (d *feeder) zero(i pages.Index) error {
	e := d.e
	e.mu.Lock()
	defer e.mu.Unlock()
	v, fresh, err := e.version(i)
	if err != nil || !fresh {
		return err
	}
	e.counts.Zero++
	e.safe.Set(i)
	e.wanted.Clear(i)
	e.tell(pages.Record{First: i, Count: 1, Holder: pages.Zero, Version: v})
	for e.congested() {
		if err := e.stopped(); err != nil {
			return err
		}
		e.room.Wait()
	}
	return nil
}

// version gives a page of the stream its version; fresh is false when it must be
// dropped. A page sent again before the switch is told to be absent until its new
// version is safe, or the destination would take the old one for the newest. The
// caller holds e.mu.
func (e *Engine) version(i pages.Index) (v pages.Version, fresh bool, err error) {
	if e.handed {
		if v, fresh = e.ledger.Postcopy(i); !fresh {
			e.counts.Duplicate++
		}
		return v, fresh, nil
	}
	before := e.ledger.Sent()
	if v, err = e.ledger.Precopy(i); err != nil {
		return 0, false, err
	}
	again := e.ledger.Sent() == before
	if again {
		e.safe.Clear(i)
		e.tell(pages.Record{First: i, Count: 1, Holder: pages.Absent, Version: v})
	}
	if e.cfg.Strategy == Hybrid && e.phase == Precopy && (again || e.ledger.Sent() == e.layout.Pages()) {
		e.switchOver()
	}
	return v, true, nil
}

// add seals a page into the open batch and gives the batch away when it is full.
func (d *feeder) add(i pages.Index, v pages.Version, data []byte) error {
	e := d.e
	if d.open == nil {
		e.mu.Lock()
		f, err := e.acquire()
		d.limit = e.batchPages()
		e.mu.Unlock()
		if err != nil {
			return err
		}
		d.open = f
	}
	d.open.batch.Append(e.sealer, i, v, wire.EncodingRaw, data)
	d.open.add(i, v, len(data)+wire.Overhead)
	if d.open.n < d.limit {
		return nil
	}
	return d.flush(true)
}

// flush gives the open batch away. With patience it waits until holders have taken
// it: see Engine.place.
func (d *feeder) flush(patience bool) error {
	if d.open == nil {
		return nil
	}
	f := d.open
	d.open = nil
	return d.e.place(f, patience)
}

// discard notes that the source discarded n pages from first: their old versions
// count no more. The records go ahead of the package, which is posted later.
func (e *Engine) discard(first pages.Index, n uint64) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.ledger.Discard(first, n, func(r pages.Record) {
		e.counts.Discarded += uint64(r.Count)
		e.safe.ClearRange(r.First, uint64(r.Count))
		e.tell(r)
	})
}

// unsentStep bounds the pages that are marked under one hold of the lock.
const unsentStep = 1 << 16

// finishUnsent makes zero pages of those that QEMU never sent, or discarded and did not
// send again: memory that is unplugged or that the guest gave back. QEMU's own
// destination would read zeros there too.
func (e *Engine) finishUnsent() error {
	for at := pages.Index(0); ; {
		e.mu.Lock()
		if e.surplus != nil {
			e.mu.Unlock()
			return e.surplus
		}
		for range unsentStep {
			i, ok := e.ledger.NextUnsent(at)
			if !ok {
				e.mu.Unlock()
				return nil
			}
			v, _ := e.ledger.Postcopy(i)
			e.safe.Set(i)
			e.wanted.Clear(i)
			e.counts.Unsent++
			e.tell(pages.Record{First: i, Count: 1, Holder: pages.Zero, Version: v})
			at = i + 1
		}
		for e.congested() && e.stopped() == nil {
			e.room.Wait()
		}
		err := e.stopped()
		e.mu.Unlock()
		if err != nil {
			return err
		}
	}
}
