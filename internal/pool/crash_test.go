// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

const crashDirVariable = "SG_POOL_TEST_CRASH_DIR"

// What the child of TestKilledProcess does: each of its lanes puts its own pages round
// after round, in the version of the round, and frees some, until it is killed.
const (
	crashLanes = 3
	crashPages = 1500 // of a lane
)

func crashFirst(lane int) pages.Index { return pages.Index(lane * 1_000_000) }

// crashChild prints a line after each batch that the pool acknowledged: lane, round,
// first page, and "put" or "freed".
func crashChild(dir string) {
	p, err := Open(Config{Dir: dir, BudgetBytes: 1 << 30, Headroom: func() uint64 { return plenty }})
	if err != nil {
		fatal(err)
	}
	w, err := p.Reserve(migration, source, wire.Reserve{Bytes: 64 << 20, Reader: destination})
	if err != nil {
		fatal(err)
	}
	r, err := p.Attach(migration, destination, w.Session())
	if err != nil {
		fatal(err)
	}
	for lane := range crashLanes {
		go func() {
			for round := 0; ; round++ {
				crashRound(lane, round, w, r)
			}
		}()
	}
	select {}
}

func crashRound(lane, round int, w *Writer, r *Reader) {
	for k := 0; k < crashPages; k += 50 {
		first := crashFirst(lane) + pages.Index(k)
		if err := w.Put(run(first, 50, pages.Version(round))); err != nil {
			fatal(err)
		}
		fmt.Printf("%d %d %d put\n", lane, round, k)
		if k%150 == 0 {
			fmt.Printf("%d %d %d freeing\n", lane, round, k)
			if _, err := r.Free(first, 20); err != nil {
				fatal(err)
			}
		}
	}
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// TestKilledProcess kills a process with SIGKILL while it puts, replaces and frees
// pages, several times with the same directory, and looks for every page that it had
// acknowledged.
func TestKilledProcess(t *testing.T) {
	dir := shm(t)
	for kill := range 6 {
		lowest := runUntilKilled(t, dir, time.Duration(20+rand.IntN(180))*time.Millisecond)
		p := open(t, config(dir))
		st := p.Stats()
		if len(st.Sessions) != 1 {
			t.Fatalf("kill %d: %d sessions, want 1", kill, len(st.Sessions))
		}
		if got := blocks(t, dir); got != st.Used {
			t.Errorf("kill %d: the arena takes %d bytes, but the pool counts %d", kill, got, st.Used)
		}
		r := attach(t, p, st.Sessions[0].Session)
		acked := 0
		for i, version := range lowest {
			wantAtLeast(t, r, i, version)
			acked++
		}
		t.Logf("kill %d: found %d acknowledged pages in %d held", kill, acked, st.Pages)
		// The next child begins with an empty session, as rounds begin at 0.
		if err := r.Dissolve(); err != nil {
			t.Fatal(err)
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// runUntilKilled returns the versions in which pages were acknowledged and not freed.
func runUntilKilled(t *testing.T, dir string, after time.Duration) map[pages.Index]pages.Version {
	t.Helper()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), crashDirVariable+"="+dir)
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	lowest := map[pages.Index]pages.Version{}
	lines := bufio.NewScanner(out)
	for n := 0; lines.Scan(); n++ {
		if n == 0 {
			time.AfterFunc(after, func() { child.Process.Kill() })
		}
		var lane, round, k int
		var what string
		if _, err := fmt.Sscanf(lines.Text(), "%d %d %d %s", &lane, &round, &k, &what); err != nil {
			break // the last line may be cut
		}
		for i := range 50 {
			page := crashFirst(lane) + pages.Index(k+i)
			if what == "put" {
				lowest[page] = pages.Version(round)
			} else if i < 20 {
				delete(lowest, page)
			}
		}
	}
	io.Copy(io.Discard, out)
	var exit *exec.ExitError
	if err := child.Wait(); !errors.As(err, &exit) || exit.ExitCode() != -1 {
		t.Fatalf("the child ended by itself: %v", err)
	}
	if len(lowest) == 0 {
		t.Fatal("the child acknowledged nothing")
	}
	return lowest
}

// wantAtLeast looks for a page in version v, or in the next one: that may have been
// put just before the kill and not reported.
func wantAtLeast(t *testing.T, r *Reader, i pages.Index, v pages.Version) {
	t.Helper()
	for _, v := range []pages.Version{v, v + 1} {
		p := []Page{{Index: i, Version: v}}
		if err := r.Get(p, getBuffer); err != nil {
			t.Fatal(err)
		}
		if p[0].Sealed != nil {
			wantPages(t, r, i, 1, int(v))
			return
		}
	}
	t.Fatalf("page %d was acknowledged in version %d and is missing", i, v)
}
