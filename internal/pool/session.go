// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// Page is one sealed page on its way into or out of a session.
type Page struct {
	Index    pages.Index
	Version  pages.Version
	Encoding wire.Encoding
	// Sealed is wire.Overhead+1 to wire.MaxSealed bytes. The caller of Put keeps the buffer; what
	// Get returns aliases the buffer that was given to it, and is nil for a page
	// that is not held in that version.
	Sealed []byte
}

// session is one migration's part of the pool. Its pages may be put, got and freed by
// any number of goroutines at once.
//
// Order of locks: Pool.mu, life, a table's mu, slots.mu.
type session struct {
	header
	pool  *Pool
	arena *arena
	index index
	slots slots
	turn  atomic.Uint32

	// life is held for reading by whoever uses the arena, and for writing to end
	// that; ended says why and is nil before.
	life  sync.RWMutex
	ended error

	lease lease // guarded by Pool.mu
}

func newSession(p *Pool, h header, a *arena) *session {
	s := &session{header: h, pool: p, arena: a}
	s.slots.grow = a.growExtent
	s.slots.drop = a.dropExtent
	return s
}

// use must be called before the arena is touched. Unless it fails, s.life.RUnlock
// must be called afterwards.
func (s *session) use() error {
	s.life.RLock()
	if s.ended != nil {
		s.life.RUnlock()
		return s.ended
	}
	return nil
}

// end makes use fail with err from now on, after everybody who uses the arena has
// left it. It reports whether it was the first to do so; that one closes the arena.
func (s *session) end(err error) bool {
	s.life.Lock()
	defer s.life.Unlock()
	first := s.ended == nil
	if first {
		s.ended = err
	}
	return first
}

func checkPages(ps []Page) error {
	if len(ps) > wire.MaxBatch {
		return fmt.Errorf("%w: %d pages at once, want at most %d", ErrInvalid, len(ps), wire.MaxBatch)
	}
	for i := range ps {
		if n := len(ps[i].Sealed); n < minSealed || n > wire.MaxSealed {
			return fmt.Errorf("%w: sealed page %d of %d bytes, want %d to %d", ErrInvalid, ps[i].Index, n, minSealed, wire.MaxSealed)
		}
		if ps[i].Index >= maxPages {
			return fmt.Errorf("%w: page %d, want less than %d", ErrInvalid, ps[i].Index, uint64(maxPages))
		}
	}
	return nil
}

// put stores pages, all or none. A page that is held already in that version or a
// newer one is left as it is: it was acknowledged before, or is out of date.
func (s *session) put(ps []Page) error {
	if err := checkPages(ps); err != nil {
		return err
	}
	if err := s.use(); err != nil {
		return err
	}
	defer s.life.RUnlock()

	err := s.store(ps)
	if errors.Is(err, ErrFull) && s.forgetOlder(ps) > 0 {
		err = s.store(ps)
	}
	return err
}

// store is put for checked pages.
func (s *session) store(ps []Page) error {
	var (
		which [wire.MaxBatch]int
		slot  [wire.MaxBatch]uint32
		body  [wire.MaxBatch][]byte
		n     int
	)
	for i := range ps {
		if !s.holds(&ps[i]) {
			which[n], body[n] = i, ps[i].Sealed
			n++
		}
	}
	if err := s.pool.room.take(n); err != nil {
		return err
	}
	if err := s.slots.take(slot[:n]); err != nil {
		return err
	}
	if err := s.arena.transfer(unix.SYS_PWRITEV, slot[:n], body[:n]); err != nil {
		s.retire(slot[:n])
		return err
	}
	dead := slot[:0]
	for k, i := range which[:n] {
		if old, ok := s.publish(&ps[i], slot[k]); ok {
			dead = append(dead, old) // never ahead of k
		}
	}
	s.retire(dead)
	return nil
}

// holds tells whether a page needs no storing.
func (s *session) holds(p *Page) bool {
	t := s.index.table(uint64(p.Index))
	t.mu.Lock()
	defer t.mu.Unlock()
	slot, ok := t.lookup(uint64(p.Index))
	return ok && meta(s.arena.desc(slot).meta.Load()).version() >= p.Version
}

// forgetOlder gives up the older versions of pages that find no room, and returns how
// many there were. Nobody needs them any more: a version is made when the source
// discards the one before.
func (s *session) forgetOlder(ps []Page) int {
	var dead [wire.MaxBatch]uint32
	n := 0
	for i := range ps {
		if old, ok := s.forget(uint64(ps[i].Index), ps[i].Version); ok {
			dead[n] = old
			n++
		}
	}
	s.retire(dead[:n])
	s.pool.room.give(n)
	return n
}

// publish makes a page live in a slot that has its body, unless another lane was
// faster with the same page. It returns the slot that is dead in consequence.
func (s *session) publish(p *Page, slot uint32) (dead uint32, ok bool) {
	t := s.index.table(uint64(p.Index))
	t.mu.Lock()
	defer t.mu.Unlock()
	old, held := t.lookup(uint64(p.Index))
	if held && meta(s.arena.desc(old).meta.Load()).version() >= p.Version {
		return slot, true
	}
	s.arena.desc(slot).publish(p, uint16(s.turn.Add(1)))
	t.set(uint64(p.Index), slot)
	if held {
		s.arena.desc(old).meta.Store(0)
	}
	return old, held
}

// forget makes a page dead that is held in a version below the given one, and returns
// its slot.
func (s *session) forget(page uint64, below pages.Version) (slot uint32, ok bool) {
	t := s.index.table(page)
	t.mu.Lock()
	defer t.mu.Unlock()
	slot, ok = t.lookup(page)
	if !ok || meta(s.arena.desc(slot).meta.Load()).version() >= below {
		return 0, false
	}
	t.remove(page)
	s.arena.desc(slot).meta.Store(0)
	return slot, true
}

// retire gives back the memory of dead slots, then the slots. It sorts them.
func (s *session) retire(dead []uint32) {
	if len(dead) == 0 {
		return
	}
	slices.Sort(dead)
	for first := 0; first < len(dead); {
		n := 1
		for first+n < len(dead) && dead[first+n] == dead[first]+uint32(n) {
			n++
		}
		s.arena.punchBodies(dead[first], n)
		first += n
	}
	s.slots.give(dead)
}

// get reads pages into buf, which must have wire.MaxSealed bytes for each.
func (s *session) get(ps []Page, buf []byte) error {
	if len(ps) > wire.MaxBatch || len(buf) < len(ps)*wire.MaxSealed {
		return fmt.Errorf("%w: %d pages at once into %d bytes, want at most %d, and %d bytes for each",
			ErrInvalid, len(ps), len(buf), wire.MaxBatch, wire.MaxSealed)
	}
	if err := s.use(); err != nil {
		return err
	}
	defer s.life.RUnlock()

	var (
		which [wire.MaxBatch]int
		slot  [wire.MaxBatch]uint32
		seen  [wire.MaxBatch]meta
		body  [wire.MaxBatch][]byte
		n     int
	)
	for i := range ps {
		ps[i].Sealed = nil
		if at, m, ok := s.look(&ps[i]); ok {
			which[n], slot[n], seen[n] = i, at, m
			body[n], buf = buf[:m.length():m.length()], buf[m.length():]
			n++
		}
	}
	if err := s.arena.transfer(unix.SYS_PREADV, slot[:n], body[:n]); err != nil {
		return err
	}
	for k, i := range which[:n] {
		s.confirm(&ps[i], slot[k], seen[k], body[k])
	}
	return nil
}

// look finds a page in the wanted version.
func (s *session) look(p *Page) (slot uint32, m meta, ok bool) {
	t := s.index.table(uint64(p.Index))
	t.mu.Lock()
	defer t.mu.Unlock()
	if slot, ok = t.lookup(uint64(p.Index)); !ok {
		return 0, 0, false
	}
	m = meta(s.arena.desc(slot).meta.Load())
	return slot, m, m.version() == p.Version
}

// confirm completes a page whose body was read without a lock, unless the slot died
// meanwhile: then the page is not held any more, and what was read may be anything.
// A slot that was filled anew shows by the turn in its meta.
func (s *session) confirm(p *Page, slot uint32, seen meta, sealed []byte) {
	t := s.index.table(uint64(p.Index))
	t.mu.Lock()
	defer t.mu.Unlock()
	now, ok := t.lookup(uint64(p.Index))
	if !ok || now != slot {
		return
	}
	d := s.arena.desc(slot)
	if meta(d.meta.Load()) != seen {
		return
	}
	if len(sealed) > pages.Size {
		d.loadTail(sealed[pages.Size:])
	}
	p.Encoding, p.Sealed = seen.encoding(), sealed
}

// free forgets pages in all versions, and returns how many were held.
func (s *session) free(first pages.Index, count uint64) (freed uint64, err error) {
	if err := s.use(); err != nil {
		return 0, err
	}
	defer s.life.RUnlock()
	if first >= maxPages {
		return 0, fmt.Errorf("%w: freeing page %d, want less than %d", ErrInvalid, first, uint64(maxPages))
	}
	count = min(count, maxPages-uint64(first))
	// A peer may name any run. Time and memory depend on the pages held, never on
	// the number named.
	if taken, _ := s.slots.count(); count > 64 && count > taken {
		return s.freeScan(uint64(first), count), nil
	}
	var batch [freeBatch]uint64
	for page := uint64(first); count > 0; {
		n := min(count, freeBatch)
		for i := range n {
			batch[i] = page + i
		}
		freed += s.freePages(batch[:n])
		page, count = page+n, count-n
	}
	return freed, nil
}

// freeBatch is how many pages are freed at once, so that their memory is given back
// in long runs.
const freeBatch = 256

func (s *session) freeScan(first, count uint64) (freed uint64) {
	var batch [freeBatch]uint64
	for i := range s.index {
		for {
			t := &s.index[i]
			t.mu.Lock()
			found := t.pagesIn(batch[:0], first, count)
			t.mu.Unlock()
			if len(found) == 0 {
				break
			}
			freed += s.freePages(found)
		}
	}
	return freed
}

func (s *session) freePages(ps []uint64) (freed uint64) {
	var dead [freeBatch]uint32
	n := 0
	for _, page := range ps {
		if slot, ok := s.drop(page); ok {
			dead[n] = slot
			n++
		}
	}
	s.retire(dead[:n])
	return uint64(n)
}

// drop makes a page dead in whatever version, and returns its slot.
func (s *session) drop(page uint64) (slot uint32, ok bool) {
	t := s.index.table(page)
	t.mu.Lock()
	defer t.mu.Unlock()
	if slot, ok = t.lookup(page); ok {
		t.remove(page)
		s.arena.desc(slot).meta.Store(0)
	}
	return slot, ok
}
