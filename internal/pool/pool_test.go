// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"bytes"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

func TestPagesComeBack(t *testing.T) {
	p := open(t, config(shm(t)))
	w := reserve(t, p, 16<<20)
	put(t, w, run(5, 3000, 0)...)
	put(t, w, page(maxPages-1, 7))
	r := attach(t, p, w.Session())
	wantPages(t, r, 5, 3000, 0)
	wantPages(t, r, maxPages-1, 1, 7)
	wantPages(t, r, 0, 5, -1)
	if n, bytes := r.Held(); n != 3001 || bytes != 3001*pages.Size {
		t.Errorf("held %d pages and %d bytes, want 3001 and %d", n, bytes, 3001*pages.Size)
	}
}

func TestNewerVersionWins(t *testing.T) {
	p := open(t, config(shm(t)))
	w := reserve(t, p, 4<<20)
	r := attach(t, p, w.Session())
	put(t, w, run(0, 100, 3)...)
	put(t, w, run(0, 50, 4)...)  // newer: replaces
	put(t, w, run(50, 50, 2)...) // older: ignored
	put(t, w, Page{Index: 0, Version: 4, Sealed: content(nil, 77, 7)})
	wantPages(t, r, 0, 50, 4)
	wantPages(t, r, 50, 50, 3)
	old := []Page{{Index: 0, Version: 3}, {Index: 50, Version: 2}}
	if err := r.Get(old, getBuffer); err != nil || old[0].Sealed != nil || old[1].Sealed != nil {
		t.Errorf("versions that are not held were read (error %v)", err)
	}
	if n, _ := r.Held(); n != 100 {
		t.Errorf("%d pages held, want 100", n)
	}
	// One frame may name a page twice; the newest wins in any order.
	put(t, w, page(200, 1), page(200, 3), page(200, 2))
	wantPages(t, r, 200, 1, 3)
}

func TestFullSession(t *testing.T) {
	dir := shm(t)
	p := open(t, config(dir))
	w := reserve(t, p, 1) // one extent
	r := attach(t, p, w.Session())
	put(t, w, run(0, extentSlots-10, 0)...)
	used := blocks(t, dir)
	wantError(t, w.Put(run(5000, 11, 0)), ErrFull)
	wantPages(t, r, 5000, 11, -1) // all or none
	if got := blocks(t, dir); got != used {
		t.Errorf("a batch that did not fit left %d bytes", int64(got-used))
	}
	put(t, w, run(5000, 10, 0)...)
	// Newer versions find room even now: in the place of the older ones.
	put(t, w, run(0, 64, 1)...)
	wantPages(t, r, 0, 64, 1)
	wantPages(t, r, 64, extentSlots-74, 0)
	if n, err := r.Free(64, 1); n != 1 || err != nil {
		t.Fatalf("freed %d pages, error %v", n, err)
	}
	put(t, w, page(9000, 0))
	wantPages(t, r, 9000, 1, 0)
}

// TestFullFileSystem lets writing fail like on a tmpfs that is smaller than the budget.
func TestFullFileSystem(t *testing.T) {
	dir := shm(t)
	p := open(t, config(dir))
	w := reserve(t, p, 4<<20)
	put(t, w, run(0, 100, 0)...)
	full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	fd := w.s.arena.fd
	w.s.arena.fd = int(full.Fd())
	err = w.Put(run(200, 64, 0))
	w.s.arena.fd = fd
	wantError(t, err, ErrFull)
	if st := p.Stats(); st.Pages != 100 || blocks(t, dir) != st.Used {
		t.Errorf("%d pages in %d bytes after a failure, want 100 and %d", st.Pages, blocks(t, dir), st.Used)
	}
	put(t, w, run(200, 64, 0)...)
	r := attach(t, p, w.Session())
	wantPages(t, r, 0, 100, 0)
	wantPages(t, r, 200, 64, 0)
}

func TestFreeGivesMemoryBack(t *testing.T) {
	dir := shm(t)
	p := open(t, config(dir))
	w := reserve(t, p, 64<<20)
	r := attach(t, p, w.Session())
	put(t, w, run(0, 4*extentSlots, 0)...)
	if got := blocks(t, dir); got < 16<<20 {
		t.Fatalf("16 MiB of pages take %d bytes", got)
	}
	arena, err := os.Open(arenaPath(dir, migration))
	if err != nil {
		t.Fatal(err)
	}
	defer arena.Close()
	free := func(first pages.Index, count, want uint64) {
		t.Helper()
		if n, err := r.Free(first, count); n != want || err != nil {
			t.Fatalf("freeing %d pages from %d freed %d, want %d; error %v", count, first, n, want, err)
		}
	}
	// All but every 100th page of three extents: their memory is back at once.
	for i := range pages.Index(3 * extentSlots) {
		if i%100 != 0 {
			free(i, 1, 1)
		}
	}
	left := uint64(31 + extentSlots)
	if got, want := blocks(t, dir), descBase+4*extentDesc+left*pages.Size; got != want {
		t.Errorf("%d bytes left, want %d", got, want)
	}
	body := make([]byte, pages.Size)
	if _, err := arena.ReadAt(body, bodyBase+pages.Size); err != nil || !zero(body) {
		t.Errorf("the body of a freed page is not zero (error %v)", err)
	}
	if _, err := arena.ReadAt(body, bodyBase); err != nil || zero(body) {
		t.Errorf("the body of a kept page is gone (error %v)", err)
	}
	free(0, 3*extentSlots, 31)
	if got, want := blocks(t, dir), uint64(descBase+extentDesc+extentBody); got != want {
		t.Errorf("%d bytes left after three extents ran empty, want %d", got, want)
	}
	wantPages(t, r, 3*extentSlots, extentSlots, 0)
	// A run that names more pages than there are takes no longer.
	free(0, 1<<63, extentSlots)
	free(maxPages-1, 1<<63, 0)
	if got := blocks(t, dir); got != descBase {
		t.Errorf("%d bytes left when all is free, want %d", got, descBase)
	}
	_, err = r.Free(maxPages, 1)
	wantError(t, err, ErrInvalid)
	put(t, w, run(0, 100, 0)...)
	wantPages(t, r, 0, 100, 0)
}

func zero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

func TestDissolveLeavesNothing(t *testing.T) {
	dir := shm(t)
	p := open(t, config(dir))
	w := reserve(t, p, 16<<20)
	put(t, w, run(0, 2000, 0)...)
	arena, err := os.Open(arenaPath(dir, migration))
	if err != nil {
		t.Fatal(err)
	}
	defer arena.Close()
	r := attach(t, p, w.Session())
	wantError(t, w.Dissolve(), ErrForbidden)
	if err := r.Dissolve(); err != nil {
		t.Fatal(err)
	}
	for _, offset := range []int64{0, descBase, bodyBase, bodyBase + 1000*pages.Size} {
		body := make([]byte, pages.Size)
		if _, err := arena.ReadAt(body, offset); !errors.Is(err, io.EOF) || !zero(body) {
			t.Errorf("there is something at offset %d of the arena (error %v)", offset, err)
		}
	}
	if st := p.Stats(); st.Reserved != 0 || len(st.Sessions) != 0 {
		t.Errorf("something is still reserved: %+v", st)
	}
	wantError(t, w.Put(run(0, 1, 0)), ErrGone)
	wantError(t, r.Get(make([]Page, 1), getBuffer), ErrGone)
	_, err = r.Free(0, 1)
	wantError(t, err, ErrGone)
	wantError(t, r.Dissolve(), ErrGone)
	_, err = p.Attach(migration, destination, w.Session())
	wantError(t, err, ErrUnknown)
	// The holds on the old session do not touch a new one of the same migration.
	again := reserve(t, p, 4<<20)
	if again.Session() == w.Session() {
		t.Error("a new session has the name of the old one")
	}
	w.Close()
	r.Close()
	if st := p.Stats(); st.Sessions[0].Owners != 1 || st.Sessions[0].Phase != Filling {
		t.Errorf("the new session is %+v", st.Sessions[0])
	}
	if err := again.Dissolve(); err != nil { // nobody has attached
		t.Error(err)
	}
}

func TestWhoMayDoWhat(t *testing.T) {
	p := open(t, config(shm(t)))
	w := reserve(t, p, 4<<20)
	_, err := p.Attach(migration, source, w.Session())
	wantError(t, err, ErrForbidden)
	_, err = p.Attach(migration, stranger, w.Session())
	wantError(t, err, ErrForbidden)
	_, err = p.Attach(migration, destination, wire.Session{1})
	wantError(t, err, ErrUnknown)
	_, err = p.Attach(wire.MigrationID{9}, destination, w.Session())
	wantError(t, err, ErrUnknown)
	for _, c := range []struct{ owner, reader wire.Identity }{
		{stranger, destination}, {destination, destination}, {source, stranger},
	} {
		_, err = p.Reserve(migration, c.owner, wire.Reserve{Bytes: 4096, Reader: c.reader})
		wantError(t, err, ErrForbidden)
	}
	for _, c := range []struct {
		owner wire.Identity
		want  wire.Reserve
	}{
		{source, wire.Reserve{Bytes: 0, Reader: destination}},
		{source, wire.Reserve{Bytes: 1, Reader: ""}},
		{"", wire.Reserve{Bytes: 1, Reader: destination}},
		{source, wire.Reserve{Bytes: 1, Reader: wire.Identity(strings.Repeat("x", wire.MaxIdentity+1))}},
	} {
		_, err = p.Reserve(wire.MigrationID{1}, c.owner, c.want)
		wantError(t, err, ErrInvalid)
	}
	if st := p.Stats(); len(st.Sessions) != 1 || st.Sessions[0].Phase != Filling {
		t.Errorf("refused requests changed something: %+v", st)
	}
}

func TestHostilePages(t *testing.T) {
	p := open(t, config(shm(t)))
	w := reserve(t, p, 4<<20)
	r := attach(t, p, w.Session())
	good := page(1, 1)
	for name, bad := range map[string]Page{
		"empty":     {Index: 2},
		"too small": {Index: 2, Sealed: make([]byte, wire.Overhead)},
		"too large": {Index: 2, Sealed: make([]byte, wire.MaxSealed+1)},
		"outside":   {Index: maxPages, Sealed: good.Sealed},
		"far out":   {Index: 1<<64 - 1, Sealed: good.Sealed},
	} {
		if err := w.Put([]Page{good, bad}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	wantPages(t, r, 1, 1, -1)
	wantError(t, w.Put(run(0, wire.MaxBatch+1, 0)), ErrInvalid)
	wantError(t, r.Get(make([]Page, wire.MaxBatch+1), getBuffer), ErrInvalid)
	wantError(t, r.Get(make([]Page, 2), getBuffer[:2*wire.MaxSealed-1]), ErrInvalid)
	if err := r.Get([]Page{{Index: 1<<64 - 1}}, getBuffer); err != nil {
		t.Error(err)
	}
}

func TestBudget(t *testing.T) {
	c := config(shm(t))
	c.BudgetBytes = 2*sessionFixed + 5*extentCost
	p := open(t, c)
	w := reserve(t, p, 2*extentBody)
	if w.Granted() != 2*extentBody {
		t.Errorf("granted %d of %d", w.Granted(), 2*extentBody)
	}
	second := wire.MigrationID{2}
	other, err := p.Reserve(second, source, wire.Reserve{Bytes: 9 * extentBody, Reader: destination})
	if err != nil {
		t.Fatal(err)
	}
	if other.Granted() != 3*extentBody {
		t.Errorf("granted %d, want the %d that are free", other.Granted(), 3*extentBody)
	}
	_, err = p.Reserve(wire.MigrationID{3}, source, wire.Reserve{Bytes: 4096, Reader: destination})
	wantError(t, err, ErrBudget)
	// The session may grow only into what another gives up.
	if w = reserve(t, p, 3*extentBody); w.Granted() != 2*extentBody {
		t.Errorf("granted %d over the budget", w.Granted())
	}
	put(t, other, run(0, 10, 0)...)
	shrunk, err := p.Reserve(second, source, wire.Reserve{Bytes: 5000, Reader: destination})
	if err != nil || shrunk.Granted() != 5000 {
		t.Fatalf("granted %v, error %v", shrunk, err)
	}
	if w = reserve(t, p, 3*extentBody); w.Granted() != 3*extentBody {
		t.Errorf("granted %d, want %d", w.Granted(), 3*extentBody)
	}
	put(t, w, run(0, 3*extentSlots, 0)...)
	wantPages(t, attach(t, p, w.Session()), 0, 3*extentSlots, 0)
	if st := p.Stats(); st.Reserved != 2*sessionFixed+4*extentCost {
		t.Errorf("%d bytes reserved, want %d", st.Reserved, 2*sessionFixed+4*extentCost)
	}
	// A session never shrinks below what it holds.
	if w = reserve(t, p, 1); w.Granted() != 1 {
		t.Errorf("granted %d, want 1", w.Granted())
	}
	if st := p.Stats(); st.Reserved != 2*sessionFixed+4*extentCost {
		t.Errorf("%d bytes reserved, want %d", st.Reserved, 2*sessionFixed+4*extentCost)
	}
}
