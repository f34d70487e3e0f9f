// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"testing"
	"testing/synctest"
	"time"

	"scattergather.io/scattergather/internal/wire"
)

func TestGrace(t *testing.T) {
	c := &Config{OwnerGrace: 1 * time.Minute, ReaderGrace: 15 * time.Minute, MaxGrace: time.Hour}
	for _, test := range []struct {
		name  string
		lease lease
		want  time.Duration
		kept  bool
	}{
		{"owner there", lease{phase: Filling, owners: 1}, time.Minute, true},
		{"owner gone", lease{phase: Filling}, time.Minute, false},
		{"owner gone, asked for less", lease{phase: Filling, asked: time.Second}, time.Second, false},
		{"owner gone, asked for more", lease{phase: Filling, asked: 30 * time.Minute}, 30 * time.Minute, false},
		{"owner gone, asked for too much", lease{phase: Filling, asked: 30 * time.Hour}, time.Hour, false},
		{"both there", lease{phase: Shared, owners: 1, readers: 2}, 15 * time.Minute, true},
		{"owner gone by right", lease{phase: Shared, readers: 1}, 15 * time.Minute, true},
		{"reader restarts", lease{phase: Shared, owners: 1}, 15 * time.Minute, true},
		{"both gone", lease{phase: Shared}, 15 * time.Minute, false},
		{"both gone, asked for less", lease{phase: Shared, asked: time.Second}, 15 * time.Minute, false},
		{"both gone, asked for more", lease{phase: Shared, asked: 30 * time.Minute}, 30 * time.Minute, false},
	} {
		if got, kept := test.lease.grace(c); got != test.want || kept != test.kept {
			t.Errorf("%s: %v, kept %v; want %v, %v", test.name, got, kept, test.want, test.kept)
		}
	}
}

// listed returns how many sessions there are, once nothing moves any more.
func listed(p *Pool) int {
	synctest.Wait()
	return len(p.Stats().Sessions)
}

func TestOwnerVanishes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := shm(t)
		p := open(t, config(dir))
		w := reserve(t, p, 8<<20)
		put(t, w, run(0, 2000, 0)...)
		time.Sleep(24 * time.Hour)
		if listed(p) != 1 {
			t.Fatal("a session was dropped while its owner was connected")
		}
		w.Close()
		w.Close() // counts once
		time.Sleep(59 * time.Second)
		w = reserve(t, p, 8<<20) // back in time
		time.Sleep(time.Hour)
		if listed(p) != 1 {
			t.Fatal("a session was dropped though its owner came back")
		}
		w.Close()
		time.Sleep(59 * time.Second)
		if listed(p) != 1 {
			t.Fatal("a session was dropped before its time")
		}
		time.Sleep(2 * time.Second)
		if listed(p) != 0 {
			t.Fatal("a session outlived its owner")
		}
		if st := p.Stats(); st.Reserved != 0 || blocks(t, dir) != 0 {
			t.Errorf("%d bytes still reserved, %d taken", st.Reserved, blocks(t, dir))
		}
		wantError(t, w.Put(run(0, 1, 0)), ErrGone)
	})
}

func TestReaderInheritsSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := open(t, config(shm(t)))
		w := reserve(t, p, 8<<20)
		put(t, w, run(0, 100, 0)...)
		r := attach(t, p, w.Session())
		w.Close()
		time.Sleep(24 * time.Hour)
		wantPages(t, r, 0, 100, 0) // the source is gone by right
		r.Close()
		time.Sleep(14 * time.Minute)
		r = attach(t, p, w.Session()) // the destination's agent was restarted
		wantPages(t, r, 0, 100, 0)
		r.Close()
		time.Sleep(16 * time.Minute)
		if listed(p) != 0 {
			t.Error("a session outlived both source and destination")
		}
	})
}

func TestGraceStartsAnewAfterRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := shm(t)
		p := open(t, config(dir))
		w, err := p.Reserve(migration, source, wire.Reserve{Bytes: 1, Reader: destination, Grace: 20 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		other, err := p.Reserve(wire.MigrationID{5}, source, wire.Reserve{Bytes: 1, Reader: destination})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Attach(wire.MigrationID{5}, destination, other.Session()); err != nil {
			t.Fatal(err)
		}
		put(t, w, run(0, 10, 0)...)
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		wantError(t, w.Put(run(0, 1, 0)), ErrClosed)
		w.Close() // of a pool that is closed: nothing
		time.Sleep(time.Hour)
		p = open(t, config(dir))
		time.Sleep(19 * time.Second)
		if listed(p) != 2 {
			t.Error("a session was dropped before anybody could come back")
		}
		time.Sleep(2 * time.Second)
		if listed(p) != 1 {
			t.Error("the source's own grace period was forgotten")
		}
		time.Sleep(14 * time.Minute)
		if listed(p) != 1 {
			t.Error("the phase was forgotten: the reader had attached")
		}
		time.Sleep(time.Minute)
		if listed(p) != 0 {
			t.Error("a session outlived both source and destination")
		}
	})
}
