// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDirVariable); dir != "" {
		crashChild(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

const (
	source      wire.Identity = "node-a"
	destination wire.Identity = "node-b"
	stranger    wire.Identity = "node-c"
)

var migration = wire.MigrationID{0: 0x0b, 15: 0x01}

// shm returns an empty directory on a tmpfs.
func shm(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "sg-pool-test-") //nolint:usetesting // t.TempDir is on a disk
	if err != nil {
		t.Fatalf("%v; these tests need a tmpfs at /dev/shm", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

const plenty = 1 << 50

// config returns a configuration that is independent of the machine's memory.
func config(dir string) Config {
	return Config{Dir: dir, BudgetBytes: 1 << 30, Headroom: func() uint64 { return plenty }}
}

func open(t testing.TB, c Config) *Pool {
	t.Helper()
	p, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil && !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	})
	return p
}

func reserve(t testing.TB, p *Pool, bytes uint64) *Writer {
	t.Helper()
	w, err := p.Reserve(migration, source, wire.Reserve{Bytes: bytes, Reader: destination})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func attach(t testing.TB, p *Pool, session wire.Session) *Reader {
	t.Helper()
	r, err := p.Attach(migration, destination, session)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// content is what a page holds in a version: never zero, the same at every call, and
// of a size that depends on the two.
func content(dst []byte, i pages.Index, v pages.Version) []byte {
	size := wire.MaxSealed
	switch pick := (uint64(i)*31 + uint64(v)) % 8; pick {
	case 0:
		size = minSealed + int(uint64(i)*7919%4000)
	case 1:
		size = pages.Size
	case 2:
		size = pages.Size + 1 + int(i%15)
	}
	r := rand.NewPCG(uint64(i), uint64(v)+1)
	for len(dst) < size {
		dst = binary.LittleEndian.AppendUint64(dst, r.Uint64()|0x0101010101010101)
	}
	return dst[:size]
}

func encodingOf(i pages.Index) wire.Encoding { return wire.Encoding(i % 3) }

func page(i pages.Index, v pages.Version) Page {
	return Page{Index: i, Version: v, Encoding: encodingOf(i), Sealed: content(nil, i, v)}
}

func run(first pages.Index, n int, v pages.Version) []Page {
	ps := make([]Page, n)
	for k := range ps {
		ps[k] = page(first+pages.Index(k), v)
	}
	return ps
}

func put(t testing.TB, w *Writer, ps ...Page) {
	t.Helper()
	for batch := range slices.Chunk(ps, wire.MaxBatch) {
		if err := w.Put(batch); err != nil {
			t.Fatal(err)
		}
	}
}

var getBuffer = make([]byte, wire.MaxBatch*wire.MaxSealed)

// tester is what testing.T and rapid.T have in common.
type tester interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
}

// wantPages checks that pages are held in exactly version v, or not if v is negative.
func wantPages(t tester, r *Reader, first pages.Index, n int, v int) {
	t.Helper()
	for k := range n {
		i := first + pages.Index(k)
		p := []Page{{Index: i, Version: pages.Version(max(v, 0))}}
		if err := r.Get(p, getBuffer); err != nil {
			t.Fatal(err)
		}
		switch {
		case v < 0 && p[0].Sealed != nil:
			t.Fatalf("page %d is held, want it missing", i)
		case v >= 0 && p[0].Sealed == nil:
			t.Fatalf("page %d is missing in version %d", i, v)
		case v >= 0 && !slices.Equal(p[0].Sealed, content(nil, i, pages.Version(v))):
			t.Fatalf("page %d in version %d holds other bytes than were put", i, v)
		case v >= 0 && p[0].Encoding != encodingOf(i):
			t.Fatalf("page %d has encoding %d, want %d", i, p[0].Encoding, encodingOf(i))
		}
	}
}

// blocks returns the memory that all arenas in dir take.
func blocks(t tester, dir string) (bytes uint64) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*"+arenaSuffix+"*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err != nil {
			t.Fatal(err)
		}
		bytes += uint64(st.Blocks) * 512
	}
	return bytes
}

func wantError(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want one that is: %v", err, want)
	}
}

// soon waits for a condition that another goroutine makes true.
func soon(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s did not happen", what)
		}
	}
}
