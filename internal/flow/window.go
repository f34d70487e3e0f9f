// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"math"
	"time"
)

// WindowConfig bounds a window.
type WindowConfig struct {
	// Target is the queueing delay to keep before the bottleneck; 0 means 5 ms.
	// Where a frame alone takes longer than that, the queue holds a frame or two.
	Target time.Duration
	// MinBytes is what may be under way on the slowest path, except for the moments
	// in which the window drains; 0 means 512 KiB. It must be as large as the
	// largest frame, or that frame would never fit, and should hold two. However
	// slow a link is, each window that shares it keeps so much in its queue.
	MinBytes int
	// MaxBytes is what may be under way at most; 0 means 64 MiB. It is raised to
	// MinBytes.
	MaxBytes int
}

// Window says how many bytes may be under way to a peer. It is the product's pacing:
// it grows while acknowledgements come as fast as on an empty path and shrinks when
// they show a queue longer than the target.
//
// The control is multiplicative: once the frames sent under a size have been
// acknowledged, the size is scaled by (base+target)/(base+queue), which meets the
// target in one step whatever the path's rate. What could go wrong with that, and what
// is done about it:
//
//   - The rtt on a busy machine is noisy, upwards only. One early acknowledgement is
//     enough to grow, and the earliest of up to eight must be late to shrink.
//   - Who joins a full path takes the others' queue for the empty path, and drives
//     them out. So every 2.5 s (every 5 s on paths longer than 25 ms) each window
//     lets its own bytes drain and sends single frames for 20 ms or a round trip.
//     All do so at the same moments of absolute time, so the path is empty then and
//     each sees its true length. It costs 1 % of the rate, up to 4 % at 100 ms.
//   - All splits of a path between windows with the same target would be stable. So
//     small windows aim a little above the target and large ones a little below, and
//     shares become even.
//   - A sender that has nothing to send learns nothing about the path: only a window
//     that was used up grows.
//   - A path that becomes much slower holds all bytes under way for long, and the
//     news with them. So late acknowledgements, spread over time, shrink a window to
//     what their rate fills.
type Window struct {
	cfg         WindowConfig
	size        float64 // bytes that may be under way
	outstanding int

	base   baseline
	recent recent
	queue  time.Duration // as of the last judgement
	rate   rate
	frame  int // the largest frame of late

	// skip counts the acknowledged bytes until frames that were sent under the
	// present size are heard of.
	skip int
	// limited tells that the sender used the present size up.
	limited bool
	// ramping tells that the size doubles while the path seems empty.
	ramping bool
	// low counts the judgements in a row that found the path nearly empty.
	low int

	alarm alarm

	drained    int64 // the slot of base in which the window drained last
	draining   bool
	drainUntil time.Time
}

// NewWindow returns the window of a fresh connection.
func NewWindow(cfg WindowConfig) *Window {
	if cfg.Target <= 0 {
		cfg.Target = 5 * time.Millisecond
	}
	if cfg.MinBytes <= 0 {
		cfg.MinBytes = 512 << 10
	}
	if cfg.MaxBytes <= 0 {
		cfg.MaxBytes = 64 << 20
	}
	cfg.MaxBytes = max(cfg.MaxBytes, cfg.MinBytes)
	return &Window{cfg: cfg, size: float64(cfg.MinBytes), ramping: true}
}

// Room returns how many bytes may be sent now. A sender sends a frame iff it fits, and
// asks again after each frame and each acknowledgement.
func (w *Window) Room() int {
	if w.draining {
		if w.outstanding > 0 {
			return 0
		}
		return w.cfg.MinBytes // whatever the next frame is, it fits
	}
	return max(0, int(w.size)-w.outstanding)
}

// Sent notes that a frame of that many bytes was given to the connection.
func (w *Window) Sent(bytes int, now time.Time) {
	if w.outstanding == 0 {
		w.rate.resume(now)
	}
	w.outstanding += bytes
	w.frame = max(w.frame, bytes)
	if w.outstanding+bytes > int(w.size) {
		w.limited = true
	}
}

// Acked notes that the peer acknowledged a frame of that many bytes, rtt after it was
// given to the connection. With 0 bytes it notes the rtt of a message that does not
// count as under way, such as a ping on an idle connection.
func (w *Window) Acked(bytes int, rtt time.Duration, now time.Time) {
	rtt = max(rtt, time.Microsecond)
	w.release(bytes)
	w.base.add(rtt, now)
	if bytes <= 0 {
		return
	}
	w.rate.add(bytes, now, rtt)
	if w.drained != w.base.slot {
		w.drain(now, rtt)
	}
	if w.draining {
		w.refill(now, rtt)
		return
	}
	if w.collapsed(bytes, rtt, now) {
		return
	}
	if w.skip > 0 {
		w.skip -= bytes
		return
	}
	w.recent.add(rtt)
	w.judge()
}

// Lost notes that a frame of that many bytes will never be acknowledged, since its
// connection broke.
func (w *Window) Lost(bytes int) { w.release(bytes) }

func (w *Window) release(bytes int) { w.outstanding = max(0, w.outstanding-bytes) }

// drain begins to send one frame at a time only, so that the frames to come see the
// path without this window's queue.
func (w *Window) drain(now time.Time, rtt time.Duration) {
	first := w.drained == 0
	w.drained = w.base.slot
	if first || w.outstanding == 0 {
		return // nothing of this window is in the way
	}
	if w.base.slot%2 != 0 && w.base.rtt() > 25*time.Millisecond {
		return // a drain costs two base rtts at most
	}
	w.draining = true
	// Until then all that any window sent before this moment is gone, and the others
	// had a frame through the empty path.
	w.drainUntil = now.Add(max(rtt, 4*w.cfg.Target))
}

// refill ends the drain when it is time.
func (w *Window) refill(now time.Time, rtt time.Duration) {
	late := now.Sub(w.drainUntil)
	// Frames that are never acknowledged must not keep the window shut.
	if late >= 0 && w.outstanding == 0 || late > 4*rtt+100*time.Millisecond {
		w.draining = false
		w.frame = w.frame * 3 / 4 // frames may have become smaller
		w.begin()
	}
}

// begin waits for frames sent under the present size before it judges again.
func (w *Window) begin() {
	w.skip = w.outstanding
	if w.limited || w.outstanding == 0 {
		// A window that grew is filled at once, and only the last frame of that
		// burst finds the queue that the size makes.
		w.skip = max(w.skip, int(w.size))
	}
	w.limited = false
	w.recent.reset()
	w.alarm.reset()
}

// collapsed shrinks a window at once when its path became much slower: to judge it
// would take as long as the bytes under way take over that path, twice.
func (w *Window) collapsed(bytes int, rtt time.Duration, now time.Time) bool {
	base := w.base.rtt()
	target := w.target(base)
	if rtt < base+3*target {
		w.alarm.reset()
		return false
	}
	w.alarm.late(bytes, now)
	rate, slow := w.alarm.rings(now, base+target)
	size := rate * (base + target).Seconds()
	if !slow || size > w.size*0.7 {
		return false
	}
	w.resize(max(size/w.size, 1.0/8))
	w.ramping, w.low = false, 0
	return true
}

// judge compares the queue with the target and sets the size.
func (w *Window) judge() {
	base := w.base.rtt()
	w.queue = max(0, w.recent.min()-base)
	target := w.target(base)
	if w.queue < target/2 && w.limited {
		w.grow(base, target)
		return
	}
	if w.recent.n < min(recentAcks, max(3, int(w.size)/max(w.frame, 1))) {
		return
	}
	w.low = 0
	factor := float64(base+target) / float64(base+w.queue)
	if factor > 1 && !w.limited {
		factor = 1
	}
	w.ramping = w.ramping && factor >= 1 && w.queue < target/2
	w.resize(max(factor, 1.0/8))
}

// grow enlarges a window that found the path nearly empty. One frame is enough to
// know that, for none arrives early.
func (w *Window) grow(base, target time.Duration) {
	if w.low++; w.low >= 3 {
		w.ramping = true
	}
	factor := 2.0
	if !w.ramping {
		factor = min(1.5, float64(base+target)/float64(base+w.queue))
	}
	w.resize(factor)
}

func (w *Window) resize(factor float64) {
	w.size = min(max(w.size*factor, float64(w.cfg.MinBytes)), float64(w.cfg.MaxBytes))
	w.begin()
}

// target returns the queueing delay that this window aims at: from 1.2 times that of
// the configuration for a window with little in the queue down to 0.8 times.
func (w *Window) target(base time.Duration) time.Duration {
	least, most := float64(w.cfg.MinBytes)/8, float64(w.cfg.MaxBytes)
	queued := w.size * float64(w.cfg.Target) / float64(base+w.cfg.Target)
	share := min(1, math.Log(max(1, queued/least))/math.Log(most/least))
	target := float64(w.cfg.Target) * (1.2 - 0.4*share)
	// A queue shorter than a frame cannot keep a slow path busy.
	frame := float64(w.frame) / w.size * float64(base+w.queue)
	return time.Duration(max(target, min(1.25*frame, 8*target)))
}

// Outstanding returns the bytes under way.
func (w *Window) Outstanding() int { return w.outstanding }

// Rate returns the delivered bytes a second while any were under way, smoothed, as of
// the last acknowledgement.
func (w *Window) Rate() float64 { return w.rate.value }

// Queue returns the queueing delay as of the last judgement: the present round-trip
// time less that of the empty path.
func (w *Window) Queue() time.Duration { return w.queue }

// Finish returns the expected time until that many bytes more would be delivered. It
// trusts the size of the window, not the rate, which is low for who sends little.
func (w *Window) Finish(bytes int) time.Duration {
	rtt := w.base.rtt() + w.queue
	if rtt == 0 {
		rtt = w.cfg.Target
	}
	rounds := float64(w.outstanding+bytes) / w.size
	return time.Duration(max(rounds, 1) * float64(rtt))
}
