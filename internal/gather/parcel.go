// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"fmt"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// parcel is a frame of the source whose pages go straight into QEMU, past the store:
// writing a page to a file and reading it back costs more than all else that is done
// for it here. It is acknowledged when QEMU has placed it, so that the source keeps it
// until then, as it does with what it has sent and the store does not have yet. Its
// pages are busy all the time.
//
// It belongs in turn to its lane's goroutine, the book's queues, the writer, and the
// flight that carries it.
type parcel struct {
	s    *session
	lane *wire.Lane
	seq  uint64
	refs []wire.PageRef
	buf  []byte // the pages, in the order of refs
}

// maxParcels bounds the parcels under way, and so their memory and the time that an
// acknowledgement takes when QEMU is slower than the source. What comes beyond goes
// into the store.
const maxParcels = 6

// parcel returns an empty parcel for pages of a frame, or nil if they must go into the
// store: because the guest does not run here yet, or QEMU does not take pages fast
// enough, or one of them is part of a large host page or newer than what was announced.
// The caller holds e.mu.
func (in *intake) parcel(take uint64, seq uint64) *parcel {
	e := in.s.e
	if !e.pumping || e.parcels >= maxParcels {
		return nil
	}
	for k := range in.n {
		if d := &in.descs[k]; take>>k&1 == 1 {
			if _, v := e.book.where.At(d.Index); v != d.Version || e.book.units.has(d.Index) {
				return nil
			}
		}
	}
	e.parcels++
	var p *parcel
	if n := len(e.spareParcels); n > 0 {
		p = e.spareParcels[n-1]
		e.spareParcels = e.spareParcels[:n-1]
	} else {
		p = &parcel{refs: make([]wire.PageRef, 0, wire.MaxBatch), buf: make([]byte, 0, wire.MaxBatch*pages.Size)}
	}
	p.s, p.lane, p.seq = in.s, in.lane, seq
	return p
}

// pass opens the pages of take into a parcel and gives it to the writer.
func (in *intake) pass(p *parcel, take uint64) error {
	e := in.s.e
	var err error
	for k := 0; k < in.n && err == nil; k++ {
		if take>>k&1 == 0 {
			continue
		}
		d := &in.descs[k]
		if p.buf, err = openPage(e.sealer, p.buf, d, in.sealed[k]); err == nil {
			p.refs = append(p.refs, wire.PageRef{Index: d.Index, Version: d.Version})
		} else {
			err = e.contradiction(fmt.Errorf("page %d, version %d: %w", d.Index, d.Version, err))
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil {
		for k := range in.n {
			if take>>k&1 == 1 {
				e.book.settle(in.descs[k].Index)
			}
		}
		e.settled.Broadcast()
		e.dropParcel(p)
		return err
	}
	e.book.pass(p)
	e.wakeWriter.raise()
	return nil
}

// dropParcel ends a parcel; the caller holds e.mu.
func (e *Engine) dropParcel(p *parcel) {
	p.s, p.lane, p.refs, p.buf = nil, nil, p.refs[:0], p.buf[:0]
	e.parcels--
	e.spareParcels = append(e.spareParcels, p)
}

// landParcel acknowledges a parcel that QEMU has placed. The caller holds e.mu.
func (e *Engine) landParcel(p *parcel) {
	for _, r := range p.refs {
		e.book.settle(r.Index)
	}
	e.settled.Broadcast()
	if p.s == e.session && p.s != nil {
		p.s.acks.push(ack{p.lane, p.seq})
		p.s.wakeAck.raise()
	}
	e.dropParcel(p)
}

// pass queues a parcel for the writer; if a guest waits for one of its pages, in front.
func (b *book) pass(p *parcel) {
	if len(b.faults) > 0 {
		for _, r := range p.refs {
			if _, ok := b.faults[r.Index]; ok {
				b.express.push(p)
				return
			}
		}
	}
	b.passing.push(p)
}

// hasten moves the parcel with page i to the front.
func (b *book) hasten(i pages.Index) {
	for k := range b.passing.len() {
		for _, r := range b.passing.at(k).refs {
			if r.Index == i {
				b.express.push(b.passing.remove(k))
				return
			}
		}
	}
}

// claimParcel claims those pages of a parcel that QEMU does not have.
func (b *book) claimParcel(p *parcel) segment {
	s := segment{kind: fromParcel, parcel: p}
	for k, ref := range p.refs {
		if _, v := b.where.At(ref.Index); v != ref.Version || b.sent.Test(ref.Index) {
			continue
		}
		b.sent.Set(ref.Index)
		b.unready(ref.Index)
		s.mask |= 1 << k
		s.n++
	}
	return s
}

// settle ends a page's being brought in.
func (b *book) settle(i pages.Index) {
	b.busy.Clear(i)
	b.refile(i)
}
