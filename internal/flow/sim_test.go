// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"container/heap"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

const (
	gigabit = 125e6 // bytes a second
	frame   = 256 << 10
)

// event is something that happens in the simulated network.
type event struct {
	at time.Duration
	n  int // keeps events of the same instant in the order of their making
	do func()
}

type events []event

func (q events) Len() int { return len(q) }
func (q events) Less(i, k int) bool {
	return q[i].at < q[k].at || q[i].at == q[k].at && q[i].n < q[k].n
}
func (q events) Swap(i, k int) { q[i], q[k] = q[k], q[i] }
func (q *events) Push(e any)   { *q = append(*q, e.(event)) }
func (q *events) Pop() any {
	last := (*q)[len(*q)-1]
	*q = (*q)[:len(*q)-1]
	return last
}

// sim is a bottleneck link with a FIFO queue and some senders before it.
type sim struct {
	t      testing.TB
	now    time.Duration
	queue  events
	made   int
	rng    *rand.Rand
	rate   func(at time.Duration) float64 // of the link, bytes a second
	free   time.Duration                  // when the link will have sent all that waits
	noise  func(rng *rand.Rand) time.Duration
	wake   func(at time.Duration) time.Duration // when a sender's process runs next
	waits  []wait
	offset time.Duration // of the clock that the windows see
}

// wait is how long the link's queue was when a frame came.
type wait struct{ at, queue time.Duration }

// sender keeps a window full.
type sender struct {
	*sim
	w         *Window
	rtt       time.Duration // of the empty path without the time of the frame itself
	size      int           // of its frames
	pace      float64       // bytes a second that it has to send; 0 is no end of them
	credit    time.Duration // until when it has sent what it has
	stop      time.Duration // 0 is never
	delivered []delivery
	most      int // outstanding
}

type delivery struct {
	at    time.Duration
	bytes int
}

func newSim(t testing.TB, seed uint64, rate float64) *sim {
	return &sim{
		t: t, rng: rand.New(rand.NewPCG(seed, 1)),
		rate:   func(time.Duration) float64 { return rate },
		noise:  func(*rand.Rand) time.Duration { return 0 },
		wake:   func(at time.Duration) time.Duration { return at },
		offset: time.Duration(seed%1000) * 7 * time.Millisecond,
	}
}

// busy delays every fourth acknowledgement by up to 5 ms.
func busy(rng *rand.Rand) time.Duration {
	if rng.IntN(4) > 0 {
		return 0
	}
	return time.Duration(rng.Int64N(int64(5 * time.Millisecond)))
}

func (s *sim) clock() time.Time { return time.Unix(1_700_000_000, 0).Add(s.offset + s.now) }

func (s *sim) after(d time.Duration, do func()) {
	s.made++
	heap.Push(&s.queue, event{s.now + d, s.made, do})
}

// run lets time pass until the given instant.
func (s *sim) run(until time.Duration) {
	for len(s.queue) > 0 && s.queue[0].at <= until {
		e := heap.Pop(&s.queue).(event)
		s.now = e.at
		e.do()
	}
	s.now = until
}

// join makes a sender start at an instant.
func (s *sim) join(at time.Duration, rtt time.Duration, cfg WindowConfig) *sender {
	x := &sender{sim: s, w: NewWindow(cfg), rtt: rtt, size: frame}
	s.after(at-s.now, func() {
		x.credit = s.now
		x.fill()
	})
	return x
}

// fill sends what the window lets through.
func (x *sender) fill() {
	for x.stop == 0 || x.now < x.stop {
		if x.w.Room() < x.size {
			return
		}
		if x.pace > 0 {
			if x.credit > x.now {
				return // awake sets it going again
			}
			x.credit = max(x.credit, x.now-time.Second) + time.Duration(float64(x.size)/x.pace*1e9)
			x.after(x.credit-x.now, x.fill)
		}
		x.send()
	}
}

func (x *sender) send() {
	sent, size := x.now, x.size
	x.w.Sent(size, x.clock())
	x.most = max(x.most, x.w.Outstanding())
	start := max(x.now, x.free)
	x.waits = append(x.waits, wait{x.now, start - x.now})
	x.free = start + time.Duration(float64(size)/x.rate(start)*1e9)
	arrived := x.free
	x.after(arrived-x.now, func() { x.delivered = append(x.delivered, delivery{x.now, size}) })
	heard := x.wake(arrived + x.rtt + x.noise(x.rng))
	x.after(heard-x.now, func() {
		x.w.Acked(size, x.now-sent, x.clock())
		x.fill()
	})
}

// got returns the bytes that arrived between two instants.
func (x *sender) got(from, to time.Duration) (n int) {
	for _, d := range x.delivered {
		if d.at > from && d.at <= to {
			n += d.bytes
		}
	}
	return n
}

// wait returns a quantile of the queueing delay between two instants.
func (s *sim) wait(from, to time.Duration, quantile float64) time.Duration {
	var in []time.Duration
	for _, w := range s.waits {
		if w.at > from && w.at <= to {
			in = append(in, w.queue)
		}
	}
	if len(in) == 0 {
		s.t.Fatalf("nothing was sent between %v and %v", from, to)
	}
	slices.Sort(in)
	return in[int(quantile*float64(len(in)-1))]
}

// use returns the part of the link that a sender had between two instants.
func (x *sender) use(from, to time.Duration) float64 {
	var could float64
	for at := from; at < to; at += time.Millisecond {
		could += x.rate(at) / 1000
	}
	return float64(x.got(from, to)) / could
}
