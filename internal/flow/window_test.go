// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"pgregory.net/rapid"
)

const (
	ms     = time.Millisecond
	target = 5 * ms // the default
)

// slack is the longest queue to expect before a link: the target, and some frames
// where these are what takes long.
func slack(rate float64) time.Duration {
	return 2*target + time.Duration(2.5*frame/rate*1e9)
}

func TestWindowFillsAnyLinkWithAShortQueue(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		rate := gigabit * math.Pow(10, rapid.Float64Range(-1, 0.7).Draw(rt, "log10 of Gb/s"))
		rtt := time.Duration(rapid.IntRange(50, 20000).Draw(rt, "rtt in us")) * time.Microsecond
		s := newSim(t, rapid.Uint64().Draw(rt, "seed"), rate)
		s.noise = busy
		x := s.join(0, rtt, WindowConfig{})
		const from, to = 1200 * ms, 3 * time.Second
		s.run(to)
		if use := x.use(from, to); use < 0.95 {
			rt.Errorf("used %.3f of the link", use)
		}
		median, worst := s.wait(from, to, 0.5), s.wait(from, to, 0.98)
		if median > slack(rate) || worst > 2*slack(rate) {
			rt.Errorf("queue %v, at worst %v; want %v", median, worst, slack(rate))
		}
		if got := x.w.Rate(); math.Abs(got/rate-1) > 0.25 {
			rt.Errorf("rate %.0f, want %.0f", got, rate)
		}
		if x.most > 64<<20 {
			rt.Errorf("%d bytes were under way", x.most)
		}
	})
}

// Where frames are short against the target, the queue is the target.
func TestWindowMeetsItsTarget(t *testing.T) {
	for _, want := range []time.Duration{2 * ms, 5 * ms, 15 * ms} {
		for _, rtt := range []time.Duration{ms / 5, 5 * ms} {
			s := newSim(t, 1, 10*gigabit)
			s.noise = busy
			x := s.join(0, rtt, WindowConfig{Target: want})
			s.run(4 * time.Second)
			got := s.wait(time.Second, 4*time.Second, 0.5)
			if got < want*3/4 || got > want*4/3 {
				t.Errorf("rtt %v: queue %v, want %v", rtt, got, want)
			}
			if seen := x.w.Queue(); seen < want/2 || seen > want*2 {
				t.Errorf("rtt %v: the window sees a queue of %v, want %v", rtt, seen, want)
			}
		}
	}
}

// However acknowledgements are held up, the link stays busy and the queue short.
func TestWindowOnABusyMachine(t *testing.T) {
	each := func(period, stall time.Duration) func(time.Duration) time.Duration {
		return func(at time.Duration) time.Duration { return max(at, at-at%period+stall) }
	}
	for name, c := range map[string]struct {
		noise func(*rand.Rand) time.Duration
		wake  func(time.Duration) time.Duration
		use   float64
	}{
		"every ack up to 5 ms late": {
			noise: func(r *rand.Rand) time.Duration { return time.Duration(r.Int64N(int64(5 * ms))) }, use: 0.97},
		"every other ack up to 10 ms late": {
			noise: func(r *rand.Rand) time.Duration { return time.Duration(r.Int64N(2) * r.Int64N(int64(10*ms))) }, use: 0.97},
		"exponential": {
			noise: func(r *rand.Rand) time.Duration { return time.Duration(r.ExpFloat64() * float64(2*ms)) }, use: 0.97},
		"acks in bunches of 5 ms": {
			wake: func(at time.Duration) time.Duration { return (at + 5*ms - 1).Truncate(5 * ms) }, use: 0.97},
		// Of a stall of 20 ms the queue bridges 5, and 85 % are left.
		"stalls of 20 ms": {wake: each(101*ms, 20*ms), use: 0.80},
		"stalls of 50 ms": {wake: each(501*ms, 50*ms), use: 0.88},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSim(t, 3, 2*gigabit)
			if c.noise != nil {
				s.noise = c.noise
			}
			if c.wake != nil {
				s.wake = c.wake
			}
			x := s.join(0, ms, WindowConfig{})
			s.run(6 * time.Second)
			if use := x.use(time.Second, 6*time.Second); use < c.use {
				t.Errorf("used %.3f of the link, want %.2f", use, c.use)
			}
			if worst := s.wait(time.Second, 6*time.Second, 0.9); worst > 4*target {
				t.Errorf("queue %v", worst)
			}
		})
	}
}

// Whatever comes, no more than MaxBytes is under way, and a sender that waits for all
// its acknowledgements may send MinBytes.
func TestWindowIsNeverShut(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg := WindowConfig{
			Target:   time.Duration(rapid.IntRange(0, 20).Draw(t, "target")) * ms,
			MinBytes: rapid.IntRange(1, 1<<20).Draw(t, "min"),
			MaxBytes: rapid.IntRange(1, 4<<20).Draw(t, "max"),
		}
		w, now := NewWindow(cfg), time.Unix(1_700_000_000, 0)
		most := max(cfg.MinBytes, cfg.MaxBytes)
		var flight []int
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.OneOf(rapid.Int64Range(-1e6, 5e6), rapid.Int64Range(0, 20e9)).Draw(t, "pause")))
			size := rapid.IntRange(1, cfg.MinBytes).Draw(t, "size")
			if w.Outstanding() == 0 && w.Room() < cfg.MinBytes {
				t.Fatalf("nothing is under way and there is room for %d of %d bytes", w.Room(), cfg.MinBytes)
			}
			switch op := rapid.IntRange(0, 5).Draw(t, "op"); {
			case op < 3 && size <= w.Room():
				w.Sent(size, now)
				flight = append(flight, size)
			case op < 5 && len(flight) > 0:
				w.Acked(flight[0], time.Duration(rapid.Int64Range(-1e6, 1e9).Draw(t, "rtt")), now)
				flight = flight[1:]
			case len(flight) > 0:
				w.Lost(flight[0])
				flight = flight[1:]
			default:
				w.Acked(0, ms, now) // a ping
			}
			sum := 0
			for _, n := range flight {
				sum += n
			}
			if w.Outstanding() != sum || sum > most || w.Room() < 0 || sum+w.Room() > most {
				t.Fatalf("%d bytes of %d are under way, the window says %d, and room for %d", sum, most, w.Outstanding(), w.Room())
			}
			if w.Finish(size) <= 0 || w.Finish(size) > w.Finish(size+1<<30) || w.Queue() < 0 || w.Rate() < 0 {
				t.Fatalf("finish %v and %v, queue %v, rate %v", w.Finish(size), w.Finish(size+1<<30), w.Queue(), w.Rate())
			}
		}
	})
}

// A frame that is never acknowledged must not keep a window shut that drains.
func TestWindowDrainsInVain(t *testing.T) {
	w, now := NewWindow(WindowConfig{}), time.Unix(1_700_000_000, 0)
	w.Sent(frame/8, now) // nobody will hear of this one
	drains, shut := 0, 0
	for range 2000 { // 20 s
		sent := 0
		for w.Room() >= frame {
			w.Sent(frame, now)
			sent += frame
		}
		now = now.Add(10 * ms)
		was := w.draining
		for ; sent > 0; sent -= frame {
			w.Acked(frame, 10*ms, now)
		}
		if w.draining {
			w.Acked(1, 10*ms, now) // such as the frame of a lane that does not wait for room
			w.Sent(1, now)
			shut++
		}
		if w.draining && !was {
			drains++
		}
	}
	if drains < 6 || drains > 9 {
		t.Errorf("%d drains in 20 s", drains)
	}
	if shut > drains*20 {
		t.Errorf("%d drains lasted %d ms", drains, shut*10)
	}
}

func TestFinishPrefersTheFasterPath(t *testing.T) {
	finish := func(rate float64) time.Duration {
		s := newSim(t, 1, rate)
		x := s.join(0, ms, WindowConfig{})
		s.run(2 * time.Second)
		return x.w.Finish(32 << 20)
	}
	slow, fast := finish(gigabit), finish(8*gigabit)
	if want := time.Duration(32<<20/gigabit*1e9) + target; slow < want*8/10 || slow > want*12/10 {
		t.Errorf("32 MiB at 1 Gb/s would finish in %v, want %v", slow, want)
	}
	if fast*4 > slow {
		t.Errorf("%v at 8 Gb/s, %v at 1 Gb/s", fast, slow)
	}
	if fresh := NewWindow(WindowConfig{}).Finish(1); fresh != target {
		t.Errorf("a fresh window expects %v", fresh)
	}
}

func TestWindowAllocatesNothing(t *testing.T) {
	w, now := NewWindow(WindowConfig{}), time.Unix(1_700_000_000, 0)
	var m Meter
	if n := testing.AllocsPerRun(10000, func() {
		now = now.Add(ms)
		w.Sent(frame, now)
		w.Acked(frame, ms, now)
		m.Add(frame, now)
		m.Rate(now)
	}); n != 0 {
		t.Errorf("%v allocations a frame", n)
	}
}

func BenchmarkWindow(b *testing.B) {
	w, now := NewWindow(WindowConfig{}), time.Unix(1_700_000_000, 0)
	b.ReportAllocs()
	for b.Loop() {
		now = now.Add(ms / 10)
		if w.Room() >= frame {
			w.Sent(frame, now)
		}
		w.Acked(frame, ms, now)
	}
}
