// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"math"
	"testing"
	"time"
)

// Windows that join a full link one after the other must not believe the queue to be
// part of the path.
func TestWindowsShareALink(t *testing.T) {
	for _, c := range []struct {
		name    string
		rate    float64
		rtt     time.Duration
		windows int
		least   float64 // share of one, as a part of the even share
	}{
		{"two at 10 Gb/s", 10 * gigabit, ms / 5, 2, 0.7},
		{"two at 10 Gb/s, far", 10 * gigabit, 10 * ms, 2, 0.5},
		{"two at 1 Gb/s", gigabit, ms / 5, 2, 0.5},
		{"two at 300 Mb/s", 0.3 * gigabit, 10 * ms, 2, 0.5},
		{"five at 10 Gb/s", 10 * gigabit, ms, 5, 0.3},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSim(t, 5, c.rate)
			s.noise = busy
			var all []*sender
			for k := range c.windows {
				all = append(all, s.join(time.Duration(k)*700*ms, c.rtt, WindowConfig{}))
			}
			last := time.Duration(c.windows) * 700 * ms
			from, to := last+7*time.Second, last+10*time.Second
			s.run(to)
			sum := 0.0
			for k, x := range all {
				use := x.use(from, to)
				sum += use
				if part := use * float64(c.windows); part < c.least {
					t.Errorf("window %d has %.2f of its share", k, part)
				}
			}
			if sum < 0.95 {
				t.Errorf("together they use %.3f of the link", sum)
			}
			most := slack(c.rate * 2 / float64(c.windows))
			if queue := s.wait(from, to, 0.5); queue > most {
				t.Errorf("queue %v, want at most %v", queue, most)
			}
		})
	}
}

func TestWindowFollowsTheRate(t *testing.T) {
	for _, fast := range []float64{gigabit, 3 * gigabit, 10 * gigabit} {
		for _, rtt := range []time.Duration{ms / 5, 3 * ms, 10 * ms, 30 * ms} {
			s := newSim(t, 7, fast)
			s.noise = busy
			const drop, rise = 3 * time.Second, 6 * time.Second
			s.rate = func(at time.Duration) float64 {
				if at >= drop && at < rise {
					return fast / 6
				}
				return fast
			}
			x := s.join(0, rtt, WindowConfig{})
			s.run(9 * time.Second)
			// What was under way takes six times as long now, then the queue is short.
			settled := drop + 6*(rtt+2*target) + 60*ms
			if queue := s.wait(settled, settled+300*ms, 0.8); queue > slack(fast/6) {
				t.Errorf("%.0f Gb/s, rtt %v: queue %v after the drop", fast/gigabit, rtt, queue)
			}
			for _, span := range [][2]time.Duration{{drop, rise}, {rise + 200*ms, 9 * time.Second}} {
				if use := x.use(span[0], span[1]); use < 0.9 {
					t.Errorf("%.0f Gb/s, rtt %v: used %.3f from %v to %v", fast/gigabit, rtt, use, span[0], span[1])
				}
			}
		}
	}
}

func TestWindowGrowsFast(t *testing.T) {
	s := newSim(t, 4, 10*gigabit)
	s.noise = busy
	x := s.join(0, 10*ms, WindowConfig{})
	s.run(time.Second)
	if use := x.use(0, 500*ms); use < 0.8 {
		t.Errorf("used %.3f of the first half second", use)
	}
	if queue := s.wait(0, time.Second, 1); queue > 40*ms {
		t.Errorf("queue %v while it grew", queue)
	}
}

// With four frames on the path, one more or less is much.
func TestWindowOfFewFrames(t *testing.T) {
	s := newSim(t, 1, 0.1*gigabit)
	x := s.join(0, 60*ms, WindowConfig{})
	s.run(12 * time.Second)
	if use := x.use(2*time.Second, 12*time.Second); use < 0.97 {
		t.Errorf("used %.3f", use)
	}
}

// On a long path each mistake takes a round trip to be noticed.
func TestWindowOnALongPath(t *testing.T) {
	for _, rate := range []float64{0.3 * gigabit, 2 * gigabit} {
		s := newSim(t, 1, rate)
		s.noise = busy
		x := s.join(0, 100*ms, WindowConfig{})
		s.run(12 * time.Second)
		if use := x.use(2*time.Second, 12*time.Second); use < 0.94 {
			t.Errorf("%.1f Gb/s: used %.3f", rate/gigabit, use)
		}
		if queue := s.wait(2*time.Second, 12*time.Second, 0.95); queue > slack(rate) {
			t.Errorf("%.1f Gb/s: queue %v", rate/gigabit, queue)
		}
	}
}

// A sender with little to send must not collect the right to flood the link.
func TestWindowOfASlowSenderDoesNotGrow(t *testing.T) {
	s := newSim(t, 1, gigabit)
	x := s.join(0, 2*ms, WindowConfig{})
	x.pace = gigabit / 10
	s.run(5 * time.Second)
	if size := int(x.w.size); size > 2<<20 {
		t.Errorf("the window is %d bytes", size)
	}
	if use := x.use(time.Second, 5*time.Second); use < 0.09 || use > 0.11 {
		t.Errorf("used %.3f of the link, had 0.1 to send", use)
	}
	if got := x.w.Finish(frame); got > 20*ms {
		t.Errorf("an idle path would take %v for a frame", got)
	}
	x.pace = 0
	s.after(0, x.fill)
	s.run(8 * time.Second)
	if queue := s.wait(5*time.Second, 8*time.Second, 0.98); queue > 2*slack(gigabit) {
		t.Errorf("then it made a queue of %v", queue)
	}
	if use := x.use(5100*ms, 8*time.Second); use < 0.95 {
		t.Errorf("then it used %.3f of the link", use)
	}
}

// After a pause the path may be another one, shorter or longer.
func TestWindowAfterAPause(t *testing.T) {
	for _, rtts := range [][2]time.Duration{{ms, 20 * ms}, {20 * ms, ms}} {
		s := newSim(t, 2, gigabit)
		s.noise = busy
		x := s.join(0, rtts[0], WindowConfig{})
		x.stop = 3 * time.Second
		s.run(40 * time.Second)
		x.stop, x.rtt = 0, rtts[1]
		x.fill()
		s.run(44 * time.Second)
		if use := x.use(40500*ms, 44*time.Second); use < 0.95 {
			t.Errorf("rtt %v to %v: used %.3f", rtts[0], rtts[1], use)
		}
		if queue := s.wait(40500*ms, 44*time.Second, 0.5); queue > slack(gigabit) {
			t.Errorf("rtt %v to %v: queue %v", rtts[0], rtts[1], queue)
		}
		if got := x.w.Rate(); math.Abs(got/gigabit-1) > 0.15 {
			t.Errorf("rtt %v to %v: rate %.0f", rtts[0], rtts[1], got)
		}
	}
}

// A path that becomes longer under way looks full, until the memory of the shorter
// one is gone.
func TestWindowOnALongerPath(t *testing.T) {
	s := newSim(t, 2, gigabit)
	x := s.join(0, ms, WindowConfig{})
	s.run(3 * time.Second)
	x.rtt = 20 * ms
	s.run(16 * time.Second)
	if use := x.use(3*time.Second, 13*time.Second); use < 0.15 {
		t.Errorf("used %.3f in doubt", use)
	}
	if use := x.use(13500*ms, 16*time.Second); use < 0.95 {
		t.Errorf("used %.3f in the end", use)
	}
}

// Small frames among large ones look fast; they must not make the path of the large
// ones seem full.
func TestWindowWithFramesOfAllSizes(t *testing.T) {
	for _, rate := range []float64{0.2 * gigabit, gigabit, 10 * gigabit} {
		s := newSim(t, 9, rate)
		s.noise = busy
		x := s.join(0, 5*ms, WindowConfig{})
		var shuffle func()
		shuffle = func() {
			x.size = 4096 << s.rng.IntN(7)
			s.after(time.Duration(s.rng.Int64N(int64(3*ms))), shuffle)
		}
		shuffle()
		s.run(6 * time.Second)
		if use := x.use(time.Second, 6*time.Second); use < 0.94 {
			t.Errorf("%.1f Gb/s: used %.3f of the link", rate/gigabit, use)
		}
		if queue := s.wait(time.Second, 6*time.Second, 0.9); queue > 2*slack(rate) {
			t.Errorf("%.1f Gb/s: queue %v", rate/gigabit, queue)
		}
	}
}
