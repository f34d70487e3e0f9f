// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// pageBytes is pages.Size as a plain number of bytes.
const pageBytes = uint64(pages.Size)

const (
	// spill is how many pages may wait in the backlog without their reader waiting,
	// while something urgent lies behind them in QEMU's stream: a page that the
	// destination's guest waits for, or, from the request to switch on, the package,
	// before whose arrival the guest runs nowhere. It is a multiple of what QEMU, the
	// socket and the decoder can hold.
	spill = 2048
	// maxFlights bounds the batches that exist. Their buffers hold MaxBatch pages, but
	// take memory only as far as they were ever filled.
	maxFlights = 1024
	// urgentFlights is how many batches more the urgent lane may have.
	urgentFlights = 32
)

// pageRef names a page of a batch.
type pageRef struct {
	index   pages.Index
	version pages.Version
}

// flight is a batch from its first page to its acknowledgement. Whoever fills it owns
// it; then it belongs to the backlog, a holder's queue or a lane's list, in this
// order, all guarded by Engine.mu. Its batch is never changed on that way except for
// the number that its lane gives it.
type flight struct {
	batch *wire.Batch
	n     int
	refs  [wire.MaxBatch]pageRef
	// sealed is the bytes of sealed pages, which credit and reservations count.
	sealed int
	placed time.Time
	// verdict is set when the answer came before the sender was done with the batch,
	// which may be when it has just written the last byte: the sender then acts on it.
	verdict verdict
}

// verdict is a holder's answer to a batch.
type verdict uint8

const (
	unanswered verdict = iota
	stored
	refused
)

// add appends a page that the caller seals into f.batch.
func (f *flight) add(i pages.Index, v pages.Version, sealed int) {
	f.refs[f.n] = pageRef{i, v}
	f.n++
	f.sealed += sealed
}

func (f *flight) pages() []pageRef { return f.refs[:f.n] }

// flights recycles flights, so that a page costs no allocation. It is guarded by
// Engine.mu.
type flights struct {
	free []*flight
	live int
	// bytes of sealed pages in flights that were placed.
	bytes int
}

// take returns an empty flight, or nil when that many exist already.
func (p *flights) take(limit int) *flight {
	if p.live >= limit {
		return nil
	}
	p.live++
	if n := len(p.free); n > 0 {
		f := p.free[n-1]
		p.free = p.free[:n-1]
		return f
	}
	return &flight{batch: wire.NewBatch()}
}

// put ends a flight that was placed.
func (p *flights) put(f *flight) {
	p.bytes -= f.sealed
	p.live--
	f.n, f.sealed, f.verdict = 0, 0, unanswered
	f.batch.Reset(0)
	p.free = append(p.free, f)
}

// slack is how many pages may wait in the backlog without their reader waiting.
func (e *Engine) slack() int {
	if e.phase < Precopy {
		return maxFlights * wire.MaxBatch
	}
	if e.switched && !e.handed || e.wanted.Count() > 0 {
		return spill
	}
	return 0
}

// acquire returns an empty flight for a reader of the source's stream, which waits
// while too much is under way. The caller holds e.mu.
func (e *Engine) acquire() (*flight, error) {
	for {
		if err := e.stopped(); err != nil {
			return nil, err
		}
		if e.pool.bytes < e.cfg.FlightBytes+e.slack()*wire.MaxSealed {
			if f := e.pool.take(maxFlights); f != nil {
				return f, nil
			}
		}
		e.room.Wait()
	}
}

// place gives a filled flight away. With patience it returns only when the backlog
// has been taken by holders and the control lane keeps up, which is how the source
// QEMU learns to wait.
func (e *Engine) place(f *flight, patience bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.catchWanted(f)
	e.pool.bytes += f.sealed
	e.backlog.add(f)
	e.waiting += f.n
	e.drain(time.Now())
	for patience && (e.waiting > e.slack() || e.congested()) {
		if err := e.stopped(); err != nil {
			return err
		}
		e.room.Wait()
	}
	return e.stopped()
}

// drain places what waits in the backlog as far as there is room. It is called
// whenever room may have appeared; the caller holds e.mu.
func (e *Engine) drain(now time.Time) {
	if e.phase < Precopy {
		return // the destination has not accepted the VM yet
	}
	for e.backlog.len() > 0 {
		f := e.backlog.all()[0]
		to := choose(e.candidates(f.batch.Bytes(), f.sealed), f.batch.Bytes())
		if to == nowhere {
			return
		}
		e.waiting -= f.n
		e.holders[to].assign(e.backlog.take(), now)
	}
}

// candidates looks at all holders with the eyes of choose; the slice is reused.
func (e *Engine) candidates(size, sealed int) []candidate {
	e.looks = e.looks[:0]
	for _, h := range e.holders {
		e.looks = append(e.looks, h.candidate(size, sealed))
	}
	return e.looks
}

// replace puts flights that no holder will acknowledge in front of the backlog. Their
// sealed bytes stay as they are. The caller holds e.mu.
func (e *Engine) replace(lost []*flight) {
	for _, f := range lost {
		f.verdict = unanswered
		e.waiting += f.n
		e.counts.Replaced += uint64(f.n)
	}
	e.backlog.first(lost)
	e.drain(time.Now())
	e.room.Broadcast()
}

// landed notes that a holder acknowledged a flight; pages whose newest version that
// is are safe now. Who is not the destination becomes known to it by records. The
// caller holds e.mu.
func (e *Engine) landed(f *flight, by pages.Holder) {
	for _, p := range f.pages() {
		if !e.ledger.Current(p.index, p.version) || e.safe.Test(p.index) {
			continue
		}
		e.safe.Set(p.index)
		if by != pages.Local {
			e.tell(pages.Record{First: p.index, Count: 1, Holder: by, Version: p.version})
		}
	}
	if e.settled() {
		e.changed.Broadcast()
	}
	e.room.Broadcast()
}

// batchPages is how many pages the next batch should have. One that the destination has
// room for is as large as it takes in 2 ms, so that an urgent page never waits long
// behind a batch. The others, for intermediaries, are as large as leaves in 1 ms: each
// batch and its acknowledgement cost a dozen system calls on the way, and with smaller
// ones the processors are busy before the links.
func (e *Engine) batchPages() int {
	if e.phase < Precopy {
		return wire.MaxBatch // nothing is on the way, and little memory shall hold much
	}
	var total float64
	for _, h := range e.holders {
		total += h.window.Rate()
	}
	direct := e.holders[0]
	n := batchOf(direct.window.Rate() * 0.002)
	if look := direct.candidate(n*wire.MaxSealed, n*wire.MaxSealed); look.takes(n * wire.MaxSealed) {
		return n
	}
	return max(n, batchOf(total*0.001))
}

// batchOf is the number of pages that so many bytes are, within a batch's bounds.
func batchOf(bytes float64) int {
	return min(max(int(bytes)/pages.Size, 4), wire.MaxBatch)
}
