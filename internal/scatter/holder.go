// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"math"
	"sync"
	"time"

	"scattergather.io/scattergather/internal/flow"
	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// minWindow is what may always be under way to a holder: two small batches.
const minWindow = 48 << 10

// holder is one place that takes pages: the destination or an intermediary. All of it
// is guarded by Engine.mu.
type holder struct {
	peer  Peer
	value pages.Holder // Local for the destination
	cfg   flow.WindowConfig

	// conn is nil while the holder is not connected; reason then says why.
	conn   *wire.Conn
	reason string
	// session is an intermediary's reservation; dissolved is its answer to Dissolve,
	// stored means that it has acknowledged pages.
	session           wire.Session
	dissolved, stored bool
	window            *flow.Window
	meter             flow.Meter
	sent              uint64
	// granted and used count sealed bytes: the destination's credit and what was sent
	// to it on this connection, or the reservation and what was placed there.
	granted, used uint64

	// queue is placed here and not taken by a lane yet; wake tells the lanes.
	queue line
	wake  *sync.Cond
	lanes []laneState
}

// laneState is what a lane has under way, in the order of sending.
type laneState struct {
	flights []*flight
	// sending is the flight that the sender is writing now.
	sending *flight
	seq     uint64
}

func newHolder(peer Peer, value pages.Holder, target time.Duration, mu sync.Locker) *holder {
	h := &holder{
		peer: peer, value: value, wake: sync.NewCond(mu),
		cfg: flow.WindowConfig{Target: target, MinBytes: minWindow},
	}
	h.window = flow.NewWindow(h.cfg)
	return h
}

// attach begins a connection with nothing under way.
func (h *holder) attach(c *wire.Conn, granted, used uint64) {
	h.conn, h.reason = c, ""
	h.window = flow.NewWindow(h.cfg)
	h.lanes = make([]laneState, c.Lanes())
	h.granted, h.used = granted, used
}

// detach ends the connection and returns what was not acknowledged, oldest first. No
// lane may be sending any more.
func (h *holder) detach(why error) []*flight {
	var lost []*flight
	for i := range h.lanes {
		lost = append(lost, h.lanes[i].flights...)
	}
	lost = append(lost, h.queue.empty()...)
	for _, f := range lost {
		h.used -= min(h.used, uint64(f.sealed))
	}
	h.conn, h.reason, h.lanes = nil, why.Error(), nil
	return lost
}

// left is the sealed bytes that the holder is still ready to store.
func (h *holder) left() uint64 {
	if h.used >= h.granted {
		return 0
	}
	return h.granted - h.used
}

// candidate shows the holder to choose for a frame of size bytes with that many sealed
// bytes. What is left is scaled to frame bytes, which choose compares.
func (h *holder) candidate(size, sealed int) candidate {
	if h.conn == nil {
		return candidate{}
	}
	left := h.left()
	if left < uint64(sealed) {
		left = 0
	} else {
		left = min(left, math.MaxInt64) + uint64(size-sealed)
	}
	return candidate{
		alive: true, room: h.window.Room(), outstanding: h.window.Outstanding(),
		left: left, finish: h.window.Finish(size),
	}
}

// assign queues a flight for the holder's lanes.
func (h *holder) assign(f *flight, now time.Time) {
	f.placed = now
	h.window.Sent(f.batch.Bytes(), now)
	h.used += uint64(f.sealed)
	h.queue.add(f)
	h.wake.Signal()
}

// leg describes the holder for people.
func (h *holder) leg(now time.Time) Leg {
	return Leg{
		Name: h.peer.Name, Connected: h.conn != nil, Reason: h.reason, Bytes: h.sent,
		Rate: h.meter.Rate(now), Outstanding: h.window.Outstanding(),
		QueueMicros: h.window.Queue().Microseconds(), LeftBytes: h.left(),
	}
}

// find removes and returns the flight with that number from what the lane has under
// way, or nil.
func (l *laneState) find(seq uint64) *flight {
	for i, f := range l.flights {
		if f.batch.Seq == seq {
			l.flights = append(l.flights[:i], l.flights[i+1:]...)
			return f
		}
	}
	return nil
}
