// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// memfd returns an empty file on tmpfs.
func memfd(t testing.TB) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("map", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "map")
	t.Cleanup(func() { f.Close() })
	return f
}

// used returns the bytes of memory that a tmpfs file takes.
func used(t testing.TB, f *os.File) int64 {
	t.Helper()
	var s unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &s); err != nil {
		t.Fatal(err)
	}
	return s.Blocks * 512
}

func mustOpen(t testing.TB, l *Layout, f *os.File) *Map {
	t.Helper()
	m, err := OpenMap(l, f)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestMapFileAgainstModel(t *testing.T) {
	l := flat(t, spanning)
	f := memfd(t)
	rapid.Check(t, func(t *rapid.T) {
		if err := f.Truncate(0); err != nil {
			t.Fatal(err)
		}
		want := make(mapModel, spanning)
		for range rapid.IntRange(1, 3).Draw(t, "processes") {
			got, err := OpenMap(l, f)
			if err != nil {
				t.Fatal(err)
			}
			want.check(t, got)
			for range rapid.IntRange(0, 15).Draw(t, "steps") {
				mapStep(t, got, want)
			}
			want.check(t, got)
			if err := errors.Join(got.Close(), got.Close()); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// A VM of 256 GiB: the file takes what is needed and asking takes nothing.
func TestMapFileIsSparse(t *testing.T) {
	const n = 1 << 26
	l, f := flat(t, n), memfd(t)
	m := mustOpen(t, l, f)
	defer m.Close()
	fresh := used(t, f)
	if fresh < n || fresh > n+n/64 {
		t.Fatalf("a fresh map takes %d bytes for %d pages", fresh, n)
	}
	for i := Index(0); i < n; i += chunkPages / 2 {
		m.At(i)
	}
	if _, err := m.Apply(Record{First: 0, Count: n, Holder: FirstHolder}); err != nil {
		t.Fatal(err)
	}
	if got := used(t, f); got != fresh {
		t.Errorf("version 0 grew the file from %d to %d", fresh, got)
	}
	if _, err := m.Store(n-1, 1); err != nil {
		t.Fatal(err)
	}
	if got := used(t, f); got != fresh+chunkBytes {
		t.Errorf("one newer page grew the file from %d to %d", fresh, got)
	}
	if got := m.MemoryBytes(); got < uint64(used(t, f)) || got > uint64(used(t, f))+n/64 {
		t.Errorf("MemoryBytes says %d, the file has %d", got, used(t, f))
	}
}

func TestOpenMapRefuses(t *testing.T) {
	l := flat(t, 5000)
	for _, c := range []struct {
		name   string
		spoil  func(t *testing.T, f *os.File)
		layout *Layout
		want   string
	}{
		{"cut", func(t *testing.T, f *os.File) { truncate(t, f, 100) }, l, "100 bytes, want"},
		{"grown", func(t *testing.T, f *os.File) { truncate(t, f, 1<<20) }, l, "1048576 bytes, want"},
		{"not a map", func(t *testing.T, f *os.File) { write(t, f, 0, "GGUFGGUF") }, l, "header"},
		{"another VM", func(*testing.T, *os.File) {},
			mustLayout(t, Block{"pc.ram", 4999 * Size, Size}, Block{"vga", Size, Size}), "header"},
		{"holder without meaning", func(t *testing.T, f *os.File) { write(t, f, 8192+77, "\xfe") }, l, "1 pages with holder 254"},
		{"versions past the end", func(t *testing.T, f *os.File) { write(t, f, 4096, "\x02") }, l, "chunk 1 of 1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := memfd(t)
			if err := mustOpen(t, l, f).Close(); err != nil {
				t.Fatal(err)
			}
			c.spoil(t, f)
			m, err := OpenMap(c.layout, f)
			if m != nil || !errors.Is(err, ErrMapFile) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want ErrMapFile with %q", err, c.want)
			}
		})
	}
}

// A process that died while it made the file left no magic, and no map.
func TestOpenMapFinishesItsFile(t *testing.T) {
	l, f := flat(t, 5000), memfd(t)
	if err := mustOpen(t, l, f).Close(); err != nil {
		t.Fatal(err)
	}
	write(t, f, 0, strings.Repeat("\x00", 8)+"half a digest")
	m := mustOpen(t, l, f)
	if _, err := m.Store(1, 0); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m = mustOpen(t, l, f)
	defer m.Close()
	if h, _ := m.At(1); h != Local {
		t.Errorf("page 1 is %s", h)
	}
}

func TestMapFileThatCannotGrow(t *testing.T) {
	f := memfd(t)
	m := mustOpen(t, flat(t, 100), f)
	defer m.Close()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Store(1, 0); err != nil {
		t.Errorf("a page in version 0 needs no room: %v", err)
	}
	if fresh, err := m.Store(2, 1); fresh || err == nil {
		t.Errorf("store of a newer page: %v, %v", fresh, err)
	}
	if n, err := m.Apply(Record{0, 100, FirstHolder, 1}); n != 0 || err == nil {
		t.Errorf("record of newer pages: %d, %v", n, err)
	}
	if h, v := m.At(2); h != Absent || v != 0 || m.Counts().Absent != 99 {
		t.Errorf("page 2 is %s in %d; %+v", h, v, m.Counts())
	}
}

func TestOpenMapOnAReadOnlyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "map")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := OpenMap(flat(t, 1), f); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v, want an error that names %s", err, path)
	}
}

func truncate(t *testing.T, f *os.File, n int64) {
	t.Helper()
	if err := f.Truncate(n); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, f *os.File, at int64, s string) {
	t.Helper()
	if _, err := io.Copy(io.NewOffsetWriter(f, at), strings.NewReader(s)); err != nil {
		t.Fatal(err)
	}
}
