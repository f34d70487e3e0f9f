// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// reopen takes up what an earlier process left in the directory. A file that makes no
// sense is left alone, since it may be another version's only copy of a VM's pages,
// but its memory counts against the budget.
func (p *Pool) reopen() error {
	files, err := os.ReadDir(p.cfg.Dir)
	if err != nil {
		return err
	}
	for _, f := range files {
		path := filepath.Join(p.cfg.Dir, f.Name())
		switch {
		case strings.HasSuffix(f.Name(), draftSuffix):
			// Its owner was never told that the session exists.
			if err := os.Remove(path); err != nil {
				return err
			}
		case strings.HasSuffix(f.Name(), arenaSuffix):
			err := p.reopenArena(path)
			if errors.Is(err, ErrFull) {
				return err
			}
			if err != nil {
				p.reject(path, err)
			}
		}
	}
	return nil
}

func (p *Pool) reject(path string, why error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err == nil {
		p.rejected += uint64(st.Blocks) * 512
	}
	p.cfg.Log.Error(why, "a file in the pool's directory is left alone; delete it if no migration needs it any more", "file", path)
}

func (p *Pool) reopenArena(path string) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	a := &arena{fd: fd, path: path, log: p.cfg.Log}
	h, extents, err := a.check()
	if err == nil && arenaPath(p.cfg.Dir, h.migration) != path {
		err = fmt.Errorf("it is the arena of migration %v by another name", h.migration)
	}
	if err == nil {
		err = a.mapControl(max(p.limit, extents))
	}
	if err == nil {
		err = a.setExtents(extents)
	}
	if err != nil {
		a.close()
		return err
	}
	s := newSession(p, h, a)
	s.lease.phase = Phase(a.word(wordPhase).Load())
	s.lease.asked = min(p.cfg.MaxGrace, time.Duration(min(math.MaxInt32, a.word(wordGrace).Load()))*time.Second)
	s.slots.resize(extents)
	damaged, err := s.recover()
	if err != nil {
		a.close()
		return err
	}
	p.reserved += sessionFixed + uint64(extents)*extentCost
	p.sessions[h.migration] = s
	taken, _ := s.slots.count()
	p.cfg.Log.Info("took up a session of an earlier process", "migration", h.migration.String(), "owner", h.owner,
		"reader", h.reader, "phase", s.lease.phase.String(), "pages", taken, "damaged", damaged)
	return nil
}

// check reads the header without trusting anything, and returns the session's size in
// extents.
func (a *arena) check() (h header, extents int, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(a.fd, &st); err != nil {
		return h, 0, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return h, 0, fmt.Errorf("%w: not a regular file", errHeader)
	}
	page := make([]byte, descBase)
	n, err := unix.Pread(a.fd, page, 0)
	if err != nil {
		return h, 0, err
	}
	if h, err = parseHeader(page[:n]); err != nil {
		return h, 0, err
	}
	// The header's page is whole if the file has the size that is checked next.
	count, phase := wordIn(page, wordExtents), Phase(wordIn(page, wordPhase))
	switch {
	case count > maxExtents || st.Size < fileBytes(int(count)):
		return h, 0, fmt.Errorf("%w: %d extents in a file of %d bytes", errHeader, count, st.Size)
	case phase != Filling && phase != Shared:
		return h, 0, fmt.Errorf("%w: phase %d", errHeader, phase)
	}
	return h, int(count), nil
}

// recover finds the live slots of an arena and gives back all other memory. It returns
// the number of descriptors that no version of this program can have written.
func (s *session) recover() (damaged int, err error) {
	var old []uint32 // slots whose page is held in a newer version as well
	end := 0         // extents dealt with so far
	for e := range s.arena.grownExtents(len(s.slots.extents)) {
		s.arena.punchExtents(end, e)
		end = e + 1
		// Descriptors that were never touched may lack memory.
		if err := s.arena.growExtent(e); err != nil {
			return damaged, err
		}
		stale, n := s.recoverExtent(e)
		old, damaged = append(old, stale...), damaged+n
	}
	s.arena.punchExtents(end, len(s.slots.extents))
	tail := int64(descBase + len(s.slots.extents)*extentDesc)
	s.arena.punch(tail, bodyBase-tail)
	s.retire(old)
	return damaged, nil
}

// grownExtents yields the extents below n that have a descriptor.
func (a *arena) grownExtents(n int) func(yield func(int) bool) {
	return func(yield func(int) bool) {
		for e := 0; ; e++ {
			at, err := unix.Seek(a.fd, descBase+int64(e)*extentDesc, unix.SEEK_DATA)
			if err != nil {
				return // ENXIO: there is no data any more
			}
			if e = int((at - descBase) / extentDesc); e >= n || !yield(e) {
				return
			}
		}
	}
}

// punchExtents gives back all memory of extents from up to, not including, to.
func (a *arena) punchExtents(from, to int) {
	if from < to {
		a.punch(descBase+int64(from)*extentDesc, int64(to-from)*extentDesc)
		a.punchBodies(uint32(from*extentSlots), (to-from)*extentSlots)
	}
}

// recoverExtent takes up the live slots of an extent. Of the slots that it takes, it
// returns those that hold an older version of a page; it leaves it to the caller to
// retire them.
func (s *session) recoverExtent(e int) (old []uint32, damaged int) {
	s.slots.adopt(e)
	first := uint32(e * extentSlots)
	for slot := first; slot < first+extentSlots; slot++ {
		d := s.arena.desc(slot)
		m, page := meta(d.meta.Load()), d.page.Load()
		if m == 0 {
			continue
		}
		if m.check(page) != nil {
			d.meta.Store(0)
			damaged++
			continue
		}
		s.slots.claim(slot)
		if loser, ok := s.recoverPage(page, slot, m); ok {
			s.arena.desc(loser).meta.Store(0)
			old = append(old, loser)
		}
	}
	s.slots.tidy(e, s.arena.punchBodies)
	return old, damaged
}

// recoverPage enters a page into the index. A process that died while it replaced a
// page may have left two versions; the slot of the older one is returned.
func (s *session) recoverPage(page uint64, slot uint32, m meta) (old uint32, ok bool) {
	t := s.index.table(page)
	other, ok := t.lookup(page)
	if ok && meta(s.arena.desc(other).meta.Load()).version() >= m.version() {
		return slot, true
	}
	t.set(page, slot)
	return other, ok
}
