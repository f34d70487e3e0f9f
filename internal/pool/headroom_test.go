// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"math"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"scattergather.io/scattergather/internal/wire"
)

func TestNodeNeedsItsMemory(t *testing.T) {
	dir := shm(t)
	c := config(dir)
	var spare atomic.Uint64
	spare.Store(64 << 20)
	c.Headroom = spare.Load
	p := open(t, c)
	w := reserve(t, p, 60<<20)
	// What is promised to one is not promised to another, taken or not.
	_, err := p.Reserve(wire.MigrationID{4}, source, wire.Reserve{Bytes: 60 << 20, Reader: destination})
	wantError(t, err, ErrBudget)
	put(t, w, run(0, 1024, 0)...)
	spare.Store(roomStep - 1)
	n := 0
	for ; n < 1024; n += 64 {
		if err = w.Put(run(10_000, 64, 0)); err != nil {
			break
		}
		if _, err := w.s.free(10_000, 64); err != nil { // what is freed is not taken again unasked
			t.Fatal(err)
		}
	}
	wantError(t, err, ErrFull)
	used := blocks(t, dir)
	wantError(t, w.Put(run(20_000, 1, 0)), ErrFull)
	if got := blocks(t, dir); got != used {
		t.Errorf("a refused page took %d bytes", got-used)
	}
	put(t, w, run(0, 64, 1)...) // takes no more than it gives back
	spare.Store(roomStep)
	put(t, w, run(20_000, 64, 0)...)
}

func TestParseMemAvailable(t *testing.T) {
	got, err := parseMemAvailable([]byte("MemTotal:  24684100 kB\nMemFree:  1 kB\nMemAvailable:   23456 kB\nX"))
	if err != nil || got != 23456<<10 {
		t.Errorf("%d, error %v", got, err)
	}
	for _, bad := range []string{"", "MemAvailable:", "MemAvailable: many kB", "MemAvailable: 99999999999999999999 kB"} {
		if got, err := parseMemAvailable([]byte(bad)); err == nil {
			t.Errorf("%q gave %d", bad, got)
		}
	}
	if n, err := nodeHeadroom("/dev/shm", 0); err != nil || n == 0 {
		t.Errorf("this machine can spare %d bytes, error %v", n, err)
	}
	if n, err := nodeHeadroom("/dev/shm", math.MaxUint64); err != nil || n != 0 {
		t.Errorf("%d bytes more than all are kept free, error %v", n, err)
	}
}

func TestControlGroup(t *testing.T) {
	root := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := func(bytes uint64) {
		t.Helper()
		if got, err := cgroupRoom(root); err != nil || got != bytes {
			t.Errorf("%d, error %v; want %d", got, err, bytes)
		}
	}
	want(math.MaxUint64)
	write("memory.max", "max\n")
	want(math.MaxUint64)
	write("memory.max", "1000\n")
	write("memory.current", "400\n")
	want(600)
	write("memory.current", "4000\n")
	want(0)
	write("memory.current", "?\n")
	if _, err := cgroupRoom(root); err == nil {
		t.Error("nonsense was taken for a number")
	}
}
