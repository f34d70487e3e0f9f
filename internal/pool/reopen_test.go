// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// abandon forgets a pool like a process that dies: nothing is written any more, and
// its lock is gone.
func abandon(p *Pool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, s := range p.sessions {
		s.lease.stop()
	}
	p.lock.Close()
}

// TestTornStates makes by hand what a process can leave that dies between two steps.
func TestTornStates(t *testing.T) {
	dir := shm(t)
	p := open(t, config(dir))
	w := reserve(t, p, 64<<20)
	put(t, w, run(0, 3*extentSlots+100, 5)...)
	tear(t, w.s)
	abandon(p)
	w.s.end(ErrClosed)
	w.s.arena.close()
	// Reserving died before the arena had its name.
	if err := os.WriteFile(filepath.Join(dir, "draft"+draftSuffix), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}

	p = open(t, config(dir))
	st := p.Stats()
	if got := blocks(t, dir); got != st.Used {
		t.Errorf("the arena takes %d bytes, but the pool counts %d", got, st.Used)
	}
	if want := uint64(2*extentSlots + 100 - 3); st.Pages != want {
		t.Errorf("%d pages found, want %d", st.Pages, want)
	}
	r := attach(t, p, w.Session())
	wantPages(t, r, 0, 10, 5)
	wantPages(t, r, 10, 1, 6)
	wantPages(t, r, 11, 9, 5)
	wantPages(t, r, 21, 9, 5)
	for _, gone := range []pages.Index{20, 30, 31} {
		wantPages(t, r, gone, 1, -1)
	}
	wantPages(t, r, 32, extentSlots-32, 5)
	wantPages(t, r, extentSlots, extentSlots, -1)
	wantPages(t, r, 2*extentSlots, extentSlots+100, 5)
	w = reserve(t, p, 64<<20)
	put(t, w, run(0, 4*extentSlots, 7)...)
	wantPages(t, r, 0, 4*extentSlots, 7)
}

// tear leaves a session as a process does that died in the midst of everything.
func tear(t *testing.T, s *session) {
	t.Helper()
	slotOf := func(i uint64) uint32 {
		slot, ok := s.index.table(i).lookup(i)
		if !ok {
			t.Fatalf("page %d has no slot", i)
		}
		return slot
	}
	// Put died after the body was written: memory without a live slot.
	var stray [2]uint32
	if err := s.slots.take(stray[:]); err != nil {
		t.Fatal(err)
	}
	if err := s.arena.transfer(unix.SYS_PWRITEV, stray[:], [][]byte{content(nil, 1, 1), content(nil, 2, 1)}); err != nil {
		t.Fatal(err)
	}
	// The same in an extent of its own.
	if err := s.arena.growExtent(9); err != nil {
		t.Fatal(err)
	}
	if err := s.arena.transfer(unix.SYS_PWRITEV, []uint32{9 * extentSlots}, [][]byte{content(nil, 1, 1)}); err != nil {
		t.Fatal(err)
	}
	// Replacing died before the older version was dead, in both orders of slots.
	newer := page(10, 6)
	s.arena.desc(stray[0]).publish(&newer, 0)
	older := page(11, 4)
	s.arena.desc(stray[1]).publish(&older, 0)
	// Free died before the memory was given back.
	s.arena.desc(slotOf(20)).meta.Store(0)
	// A descriptor that nobody can have written.
	s.arena.desc(slotOf(30)).page.Store(maxPages)
	s.arena.desc(slotOf(31)).meta.Store(0x55aa55aa55aa55aa)
	if err := s.arena.transfer(unix.SYS_PWRITEV, stray[:1], [][]byte{newer.Sealed}); err != nil {
		t.Fatal(err)
	}
	// An extent whose pages are all gone.
	for i := uint64(extentSlots); i < 2*extentSlots; i++ {
		s.arena.desc(slotOf(i)).meta.Store(0)
	}
}

// TestHostileArenas opens directories with files that are not ours, or not whole.
func TestHostileArenas(t *testing.T) {
	name := filepath.Base(arenaPath("", migration))
	overwrite := func(offset int64, b ...byte) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt(b, offset); err != nil {
				t.Fatal(err)
			}
		}
	}
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ff := []byte{255, 255, 255, 255, 255, 255, 255, 255}
	for what, spoil := range map[string]func(t *testing.T, dir string){
		"magic":        overwrite(0, 'X'),
		"owner":        overwrite(60, 'X'),
		"many extents": overwrite(wordExtents, ff...),
		"more extents": overwrite(wordExtents, 200),
		"phase":        overwrite(wordPhase, 9),
		"empty":        func(t *testing.T, dir string) { must(t, os.Truncate(filepath.Join(dir, name), 0)) },
		"short":        func(t *testing.T, dir string) { must(t, os.Truncate(filepath.Join(dir, name), 1000)) },
		"cut":          func(t *testing.T, dir string) { must(t, os.Truncate(filepath.Join(dir, name), bodyBase)) },
		"renamed": func(t *testing.T, dir string) {
			must(t, os.Rename(filepath.Join(dir, name), arenaPath(dir, wire.MigrationID{7})))
		},
		"link": func(t *testing.T, dir string) {
			must(t, os.Rename(filepath.Join(dir, name), filepath.Join(dir, "elsewhere")))
			must(t, os.Symlink(filepath.Join(dir, "elsewhere"), filepath.Join(dir, name)))
		},
		"directory": func(t *testing.T, dir string) {
			must(t, os.Remove(filepath.Join(dir, name)))
			must(t, os.Mkdir(filepath.Join(dir, name), 0o700))
		},
	} {
		t.Run(what, func(t *testing.T) {
			dir := shm(t)
			p := open(t, config(dir))
			put(t, reserve(t, p, 8<<20), run(0, 10, 0)...)
			must(t, p.Close())
			spoil(t, dir)
			before := blocks(t, dir)
			p = open(t, config(dir))
			st := p.Stats()
			if len(st.Sessions) != 0 || st.Rejected != before && what != "link" {
				t.Errorf("%d sessions, %d bytes rejected, want 0 and %d", len(st.Sessions), st.Rejected, before)
			}
			if files, err := filepath.Glob(filepath.Join(dir, "*"+arenaSuffix)); len(files) != 1 || err != nil {
				t.Errorf("files %q left (error %v), want one", files, err)
			}
		})
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := shm(t)
	p := open(t, config(dir))
	if _, err := Open(config(dir)); err == nil {
		t.Error("a directory was opened twice")
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(config("/proc/self")); err == nil {
		t.Error("a directory on a file system other than tmpfs was opened")
	}
	_, err := p.Reserve(migration, source, wire.Reserve{Bytes: 1, Reader: destination})
	wantError(t, err, ErrClosed)
	wantError(t, p.Close(), ErrClosed)
}

func FuzzHeader(f *testing.F) {
	h := header{migration: migration, session: wire.Session{1, 2, 3}, owner: source, reader: destination}
	good := h.append(nil)
	f.Add(good)
	f.Add(good[:headerFixed-1])
	f.Add(append(good[:20:20], make([]byte, headerFixed)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHeader(b)
		if err != nil {
			return
		}
		if again := h.append(nil); string(again) != string(b[:headerFixed]) {
			t.Fatalf("parsed %x, which is written %x", b[:headerFixed], again)
		}
	})
}

// FuzzDescriptors opens arenas with any bytes for descriptors. Whatever is taken for a
// page must be countable, readable and replaceable.
func FuzzDescriptors(f *testing.F) {
	live := func(page uint64, v pages.Version, size int) []byte {
		b := binary.NativeEndian.AppendUint64(nil, uint64(makeMeta(v, size, 0, 9)))
		return append(binary.NativeEndian.AppendUint64(b, page), make([]byte, tailBytes)...)
	}
	f.Add([]byte{})
	f.Add(slices.Concat(live(1, 1, 4112), live(2, 1, 17), live(1, 2, 4096)))
	f.Add(slices.Concat(live(maxPages, 1, 4112), live(3, 1, 16), live(4, 1, 4113), make([]byte, 32), live(1, 2, 4096)))
	f.Add(append(make([]byte, extentDesc-32), slices.Concat(live(7, 7, 100), live(7, 6, 100))...))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := shm(t)
		p := open(t, config(dir))
		session := reserve(t, p, 2*extentBody).Session()
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		file, err := os.OpenFile(arenaPath(dir, migration), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if _, err := file.WriteAt(b[:min(len(b), 3*extentDesc)], descBase); err != nil {
			t.Fatal(err)
		}
		p = open(t, config(dir))
		st := p.Stats()
		// No body was written, so those of live slots take nothing.
		if len(st.Sessions) != 1 || st.Used-st.Pages*pages.Size != blocks(t, dir) {
			t.Fatalf("%+v, but the arena takes %d bytes", st, blocks(t, dir))
		}
		r := attach(t, p, session)
		w := reserve(t, p, 2*extentBody)
		for i := range pages.Index(10) {
			put(t, w, page(i, 1<<16-1))
		}
		if freed, err := r.Free(0, maxPages); err != nil || freed < st.Pages {
			t.Fatalf("freed %d of %d pages, error %v", freed, st.Pages, err)
		}
		if got := blocks(t, dir); got != descBase {
			t.Fatalf("%d bytes left", got)
		}
	})
}
