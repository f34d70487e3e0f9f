// SPDX-License-Identifier: Apache-2.0

package multifd

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// Whatever the readers' pace, nobody is behind a point before all were at it.
func TestBarrierKeepsTheOrder(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		channels := rapid.IntRange(1, 6).Draw(rt, "channels")
		points := rapid.IntRange(0, 8).Draw(rt, "points")
		naps := rapid.SliceOfN(rapid.IntRange(0, 3), (channels+1)*(points+1), -1).Draw(rt, "naps")
		synctest.Test(t, func(t *testing.T) {
			b := NewBarrier(channels)
			arrived := make([]atomic.Int64, points)
			var wg sync.WaitGroup
			reader := func(party int, wait func() error) {
				for i := range points {
					time.Sleep(time.Duration(naps[party*points+i]) * time.Second)
					arrived[i].Add(1)
					if err := wait(); err != nil {
						t.Errorf("party %d: %v", party, err)
						return
					}
					if n := arrived[i].Load(); n != int64(channels+1) {
						t.Errorf("party %d is behind point %d with %d there", party, i, n)
					}
				}
			}
			for id := range channels {
				wg.Go(func() { reader(id, func() error { return b.Channel(t.Context(), id) }) })
			}
			wg.Go(func() { reader(channels, func() error { return b.Main(t.Context()) }) })
			wg.Wait()
			if b.Passed() != uint64(points) {
				t.Errorf("passed %d of %d points", b.Passed(), points)
			}
		})
	})
}

func TestBarrierEndsWithTheContextAndNamesWhoIsMissing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBarrier(3)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		others := make(chan error, 1)
		go func() { others <- b.Main(t.Context()) }()
		err := b.Channel(ctx, 1)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "sync 0 not reached by channel 0, channel 2:") {
			t.Errorf("error %v", err)
		}
		// The others must not wait for one that has given up.
		if other := <-others; other != err {
			t.Errorf("the main connection got %v", other)
		}
		if later := b.Channel(t.Context(), 0); later != err {
			t.Errorf("a broken barrier gives %v", later)
		}
	})
}

func TestBarrierBreaks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBarrier(1)
		waiting := make(chan error, 1)
		go func() { waiting <- b.Channel(t.Context(), 0) }()
		synctest.Wait()
		gone := errors.New("connection reset")
		b.Break(gone)
		b.Break(errors.New("later"))
		if err := <-waiting; err != gone {
			t.Errorf("error %v", err)
		}
		if err := b.Main(t.Context()); err != gone || b.Passed() != 0 {
			t.Errorf("error %v, passed %d", err, b.Passed())
		}
	})
}

// The last channel may end, and its reader break the barrier, before the others
// have woken up from the last point.
func TestReachedPointBeatsBreakAndContext(t *testing.T) {
	for range 200 {
		b := NewBarrier(1)
		ctx, cancel := context.WithCancel(t.Context())
		waiting := make(chan error, 1)
		go func() { waiting <- b.Channel(ctx, 0) }()
		if err := b.Main(t.Context()); err != nil {
			t.Fatal(err)
		}
		cancel()
		b.Break(errors.New("end of the channel"))
		if err := <-waiting; err != nil {
			t.Fatalf("error %v", err)
		}
	}
}

func TestOneReaderCannotStandForTwo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBarrier(2)
		go b.Channel(t.Context(), 0)
		synctest.Wait()
		if err := b.Channel(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "channel 0 is twice at sync 0") {
			t.Errorf("error %v", err)
		}
	})
	defer func() {
		if recover() == nil {
			t.Error("channel 2 of 2 is accepted")
		}
	}()
	NewBarrier(2).Channel(t.Context(), 2)
}
