// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

const (
	// maxReads bounds the Reads of prepaging that are under way or wait for the
	// writer, at all intermediaries together: some 16 MiB of memory.
	maxReads = 64
	// maxUrgentReads bounds the demand Reads under way at one intermediary.
	maxUrgentReads = 64
	// minRead and readTime say how large a Read of prepaging is: as much as arrives in
	// readTime, so that an urgent answer never waits long behind one.
	minRead  = 4
	readTime = time.Millisecond
	// minWindow and maxWindow bound what may be under way by prepaging, in bytes. The
	// least is what every demand fault waits for on a slow link, 4 ms at 100 Mbit/s.
	minWindow = 3 * minRead * wire.MaxSealed
	maxWindow = 32 << 20
	// quietTime is how long no direct page must have come for prepaging to begin
	// before the source has sent everything.
	quietTime = 10 * time.Millisecond
	// freeEvery is how often an intermediary is told what it may forget.
	freeEvery = 20 * time.Millisecond
)

// send sends Reads and what the intermediary may forget, whenever there is something.
// Reads are small, so that they never wait for room in a socket.
func (l *link) send(ctx context.Context) error {
	if err := l.attach(ctx); err != nil {
		return err
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		for {
			lane, seq, m := l.next(time.Now())
			if m == nil {
				break
			}
			if err := lane.Send(seq, m); err != nil {
				return err
			}
		}
		timer.Reset(freeEvery)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-l.h.wake:
		case <-timer.C:
		}
	}
}

// next decides what to send to the intermediary now: demand Reads, prepaging as far as
// the windows allow, and pages it may forget. m is nil if there is nothing.
func (l *link) next(now time.Time) (lane *wire.Lane, seq uint64, m wire.Message) {
	h, e := l.h, l.h.e
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.book.shelves[h.k]
	if s.urgent.len() > 0 && l.urgentReads < maxUrgentReads {
		r := e.newReply(h.k, true)
		if r.refs = e.book.nextUrgent(h.k, wire.MaxBatch, r.refs); len(r.refs) > 0 {
			l.urgentReads++
			return l.conn.Urgent(), l.register(r, now), wire.Read(r.refs)
		}
		e.release(r)
	}
	if r := l.prepage(now); r != nil {
		l.lane = (l.lane + 1) % l.conn.Lanes()
		return l.conn.Bulk(l.lane), l.register(r, now), wire.Read(r.refs)
	}
	if e.dissolving && !l.asked && len(l.reads) == 0 {
		l.asked = true
		l.seq++
		return l.conn.Control(), l.seq, wire.Dissolve{}
	}
	if len(s.freed.list) > 0 && (now.Sub(l.freedAt) >= freeEvery || len(s.freed.list) > wire.MaxRuns/2) && !e.dissolving {
		l.freedAt = now
		n := min(len(s.freed.list), wire.MaxRuns)
		l.free = append(l.free[:0], s.freed.list[:n]...)
		s.freed.list = s.freed.list[:copy(s.freed.list, s.freed.list[n:])]
		l.seq++
		return l.conn.Control(), l.seq, wire.Free(l.free)
	}
	return nil, 0, nil
}

// prepage makes the next Read of prepaging, nil if none may be sent now. The caller
// holds e.mu.
func (l *link) prepage(now time.Time) *reply {
	h, e := l.h, l.h.e
	if e.backlog >= maxReads || e.book.shelves[h.k].ready.Count() == 0 {
		return nil
	}
	n := min(max(int(e.shared.Rate()*readTime.Seconds())/wire.MaxSealed, minRead), wire.MaxBatch)
	free := e.mayPrepage(now)
	if !free && (e.near < minRead || !e.pumping) {
		return nil
	}
	// Both windows have room for more than minRead when nothing is under way.
	if n = min(n, min(e.shared.Room(), h.window.Room())/wire.MaxSealed); n < minRead {
		return nil
	}
	r := e.newReply(h.k, false)
	if r.refs = e.book.nextRead(h.k, n, r.refs); len(r.refs) == 0 {
		e.backlog++
		e.release(r)
		return nil
	}
	if !free {
		e.near -= min(e.near, len(r.refs))
	}
	e.backlog++
	r.bytes = len(r.refs) * wire.MaxSealed
	h.window.Sent(r.bytes, now)
	e.shared.Sent(r.bytes, now)
	return r
}

// nearPages is how many pages each fault lets prepaging fetch even while the source
// sends pages directly, and nearMost how many may be saved up. The order takes them from
// around the last faults, where the guest is likely to go next.
const (
	nearPages = 8
	nearMost  = 64
)

// mayPrepage tells whether prepaging may use the destination's link. As long as the
// source sends pages directly, the link is theirs: that is what frees the source.
func (e *Engine) mayPrepage(now time.Time) bool {
	return e.stage >= stageDelivering && !e.dissolving &&
		(e.book.committed || now.Sub(e.stats.directAt) >= quietTime)
}

// newReply returns an empty Read; the caller holds e.mu.
func (e *Engine) newReply(holder int, urgent bool) *reply {
	r := &reply{}
	if n := len(e.spare); n > 0 {
		r = e.spare[n-1]
		e.spare = e.spare[:n-1]
	} else {
		r.refs = make([]wire.PageRef, 0, wire.MaxBatch)
	}
	r.holder, r.urgent, r.bytes, r.missing = holder, urgent, 0, 0
	return r
}

// register makes a Read known to the receivers; the caller holds e.mu.
func (l *link) register(r *reply, now time.Time) uint64 {
	l.seq++
	r.sent = now
	l.reads[l.seq] = r
	return l.seq
}

// receive takes the answers of one lane.
func (l *link) receive(ctx context.Context, lane *wire.Lane, pool *wire.Pool[wire.Frame]) error {
	in := &inbox{l: l, buf: make([]byte, 0, pages.Size)}
	in.each = in.page
	for {
		f, err := pool.Get(ctx)
		if err != nil {
			return err
		}
		if err := lane.Receive(f); err != nil {
			pool.Put(f)
			if errors.Is(err, io.EOF) {
				return errors.New("it closed the connection")
			}
			return err
		}
		if f.Type != wire.TypePages {
			defer pool.Put(f)
			if f.Type == wire.TypeError {
				return peerError(f.Body)
			}
			return fmt.Errorf("%w: frame of type %d on the %s lane of an intermediary", wire.ErrProtocol, f.Type, lane.Kind())
		}
		if err := in.take(f, lane.Kind() == wire.LaneUrgent); err != nil {
			pool.Put(f)
			return err
		}
	}
}

// inbox checks the answers of one lane.
type inbox struct {
	l    *link
	r    *reply
	at   int
	buf  []byte
	each func(wire.Desc, []byte) error

	missing uint64
	kept    uint64 // parts of large host pages that are in the store
	wrong   uint64 // such that could not be
	why     error
}

// take checks an answer against its Read and queues it for the writer, which owns the
// frame then. Parts of large host pages are stored right here.
func (in *inbox) take(f *wire.Frame, urgent bool) error {
	l := in.l
	h, e := l.h, l.h.e
	now := time.Now()
	p, err := f.Pages()
	if err != nil {
		return err
	}
	e.mu.Lock()
	r := l.reads[f.Seq]
	if r == nil || r.urgent != urgent || p.Len() != len(r.refs) {
		e.mu.Unlock()
		return fmt.Errorf("%w: answer %d with %d pages to no such Read", wire.ErrProtocol, f.Seq, p.Len())
	}
	e.mu.Unlock()
	in.r, in.at, in.missing, in.kept, in.wrong, in.why = r, 0, 0, 0, 0, nil
	if err := p.Each(in.each); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if l.reads[f.Seq] != r {
		return fmt.Errorf("%w: two answers to Read %d", wire.ErrProtocol, f.Seq)
	}
	delete(l.reads, f.Seq)
	if urgent {
		l.urgentReads--
		h.stats.urgent += uint64(len(r.refs))
	} else {
		h.window.Acked(r.bytes, now.Sub(r.sent), now)
		e.shared.Acked(r.bytes, now.Sub(r.sent), now)
	}
	h.stats.in.Add(len(f.Body), now)
	e.stats.gatheredIn.Add(len(f.Body), now)
	in.file(r)
	r.frame, r.pages = f, p
	e.book.arrive(r)
	e.wakeWriter.raise()
	h.wake.raise()
	return nil
}

// page checks one page of an answer.
func (in *inbox) page(d wire.Desc, sealed []byte) error {
	k := in.at
	in.at++
	if ref := in.r.refs[k]; d.Index != ref.Index || d.Version != ref.Version {
		return fmt.Errorf("%w: page %d version %d in place of page %d version %d",
			wire.ErrProtocol, d.Index, d.Version, ref.Index, ref.Version)
	}
	if d.Missing {
		in.missing |= 1 << k
		return nil
	}
	e := in.l.h.e
	if !e.book.units.has(d.Index) {
		return nil
	}
	data, err := openPage(e.sealer, in.buf[:0], &d, sealed)
	if err == nil {
		err = e.storeWrite(d.Index, data)
	}
	if err != nil {
		in.wrong |= 1 << k
		in.why = err
		return nil //nolint:nilerr // a bad page is its holder's fault, not the connection's: it is read again
	}
	in.kept |= 1 << k
	return nil
}

// file notes what the writer has nothing to do with; the caller holds e.mu.
func (in *inbox) file(r *reply) {
	e := in.l.h.e
	r.missing = in.missing
	for k, ref := range r.refs {
		switch bit := uint64(1) << k; {
		case in.missing&bit != 0 && e.book.sent.Test(ref.Index):
			// The other answer to a hedged demand came first, and the intermediary was
			// told to forget the page.
			in.missing &^= bit
			e.book.requested.Clear(ref.Index)
		case in.missing&bit != 0 || in.wrong&bit != 0:
			e.book.setAside(ref.Index)
		case in.kept&bit != 0:
			e.book.units.fetch(ref.Index)
		}
	}
	if in.missing != 0 {
		e.blame(r, bits.OnesCount64(in.missing), errMissing)
	}
	if in.wrong != 0 {
		e.blame(r, bits.OnesCount64(in.wrong), in.why)
	}
}

// errMissing is why pages of an intermediary cannot be had.
var errMissing = errors.New("it does not have them any more")

// blame reports pages that an intermediary should have and cannot give. They are not
// written; they are asked for again after a while. The caller holds e.mu.
func (e *Engine) blame(r *reply, n int, why error) {
	h := e.holders[r.holder]
	first := r.refs[0].Index
	reason := fmt.Sprintf("intermediary %s: %d pages near page %d: %v", h.info.Name, n, first, why)
	e.log.Error(why, "Pages of an intermediary cannot be had; they are asked for again", "intermediary", h.info.Name, "pages", n, "near", uint64(first))
	e.stall(stallMissing, reason)
}
