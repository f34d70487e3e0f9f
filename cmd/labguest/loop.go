// SPDX-License-Identifier: Apache-2.0

package main

import (
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"scattergather.io/scattergather/internal/lab/guest"
)

// The rhythm of the loop, in nanoseconds of the guest's clock.
const (
	beatEvery   = 2_000_000
	statusEvery = 200_000_000
	listenEvery = 10_000_000
	maxArrears  = 50_000_000 // work not done for longer than this is forgotten
)

var clockBase = time.Now()

// nanos is the guest's monotonic clock since the program began.
func nanos() uint64  { return uint64(time.Since(clockBase)) }
func millis() uint32 { return uint32(nanos() / 1e6) }

// pace says how many units of work at a rate are due.
type pace struct {
	every uint64 // ns for one unit; 0 = never
	next  uint64
}

func newPace(perSecond int) pace {
	if perSecond <= 0 {
		return pace{}
	}
	return pace{every: uint64(time.Second) / uint64(perSecond)}
}

// due takes one unit if it is due.
func (p *pace) due(now uint64) bool {
	if p.every == 0 || now < p.next {
		return false
	}
	if p.next+maxArrears < now {
		p.next = now
	}
	p.next += p.every
	return true
}

// sweep is the walk of the verification over all pages, without end, and the
// full one that the host asked for.
type sweep struct {
	next     uint32
	verified atomic.Uint64
	asked    atomic.Uint32 // token of the full verification under way, 0 = none
	left     atomic.Uint32 // pages it has yet to visit
}

// loop is all that the guest does. With one CPU a single goroutine does it in
// turns; with two, the verification has its own.
type loop struct {
	config guest.Config
	mem    *memory
	port   port

	sweep     sweep
	random    uint64
	beat      guest.Beat
	lastBeat  uint64
	out       []byte
	in        [256]byte
	decoder   guest.Decoder
	wrongs    chan guest.Wrong
	requests  pace
	dirtying  pace
	verifying pace
}

// start never returns.
func (l *loop) start() {
	l.random = l.config.Seed | 1
	l.out = make([]byte, 0, 256)
	l.wrongs = make(chan guest.Wrong, 64)
	l.mem.onWrong = func(w guest.Wrong) {
		select {
		case l.wrongs <- w:
		default: // counted all the same
		}
	}
	l.send(guest.TypeHello, guest.Filled{Pages: uint32(len(l.mem.pages))})
	began := nanos()
	zeros := l.mem.fill(func() { l.keepBeating(nanos()) })
	l.send(guest.TypeFilled, guest.Filled{Pages: uint32(len(l.mem.pages)), Zeros: zeros, Millis: uint32((nanos() - began) / 1e6)})
	l.requests, l.dirtying, l.verifying = newPace(l.config.Requests), newPace(l.config.DirtyRate), newPace(l.config.VerifyRate)
	if l.config.CPUs > 1 {
		go l.verifyAlone()
	}
	runtime.LockOSThread()
	l.work()
}

func (l *loop) send(t guest.Type, payload any) {
	l.out = guest.Append(l.out[:0], t, payload)
	l.port.write(l.out)
}

// keepBeating sends a beat if one is due.
func (l *loop) keepBeating(now uint64) {
	if now-l.lastBeat < beatEvery {
		return
	}
	l.lastBeat = now
	l.beat.Seq++
	l.beat.Nanos = now
	l.out = guest.AppendBeat(l.out[:0], l.beat)
	l.port.write(l.out)
}

func (l *loop) work() {
	var status, listen uint64
	for {
		now := nanos()
		l.keepBeating(now)
		if now-listen >= listenEvery {
			listen = now
			l.obey()
		}
		if now-status >= statusEvery {
			status = now
			l.tellStatus()
		}
		busy := false
		if l.requests.due(now) {
			l.serve()
			busy = true
		}
		if l.dirtying.due(now) {
			l.mem.dirty(l.pick())
			l.beat.Dirtied++
			busy = true
		}
		if l.config.CPUs == 1 && l.verifyDue(now) {
			busy = true
		}
		if !busy {
			pause(nanos() - now)
		}
	}
}

// pause sleeps until work may be due: long enough to give the host its CPU,
// short against the beat.
func pause(spent uint64) {
	const nap = 500_000
	if spent < nap {
		t := unix.NsecToTimespec(int64(nap - spent))
		_ = unix.Nanosleep(&t, nil)
	}
}

// pick draws a page of the working set.
func (l *loop) pick() uint32 {
	l.random ^= l.random << 13
	l.random ^= l.random >> 7
	l.random ^= l.random << 17
	return uint32(l.random>>32) % uint32(l.config.WorkingSet<<20/guest.PageSize)
}

// serve answers one request: it reads some pages of the working set and checks
// each of them on the way.
func (l *loop) serve() {
	for range l.config.Touches {
		l.mem.verify(l.pick())
	}
	l.beat.Served++
}

// verifyDue verifies the next page when the pace or a full verification wants
// it.
func (l *loop) verifyDue(now uint64) bool {
	if l.sweep.asked.Load() == 0 && !l.verifying.due(now) {
		return false
	}
	s := &l.sweep
	l.mem.verify(s.next)
	s.verified.Add(1)
	if s.next++; s.next == uint32(len(l.mem.pages)) {
		s.next = 0
	}
	if left := s.left.Load(); left > 0 {
		s.left.CompareAndSwap(left, left-1)
	}
	return true
}

// verifyAlone is the second CPU's loop.
func (l *loop) verifyAlone() {
	runtime.LockOSThread()
	for {
		now := nanos()
		if !l.verifyDue(now) {
			pause(nanos() - now)
		}
	}
}

func (l *loop) tellStatus() {
	for len(l.wrongs) > 0 {
		l.send(guest.TypeWrong, <-l.wrongs)
	}
	l.send(guest.TypeStatus, guest.Status{Verified: l.sweep.verified.Load(), Wrong: l.mem.wrongCount.Load()})
	if token := l.sweep.asked.Load(); token != 0 && l.sweep.left.Load() == 0 {
		l.sweep.asked.Store(0)
		l.send(guest.TypeVerified, guest.Verified{
			Token: token, Pages: uint32(len(l.mem.pages)), Wrong: l.mem.wrongCount.Load(), Finished: nanos(),
		})
	}
}

// obey carries out what the host asked for.
func (l *loop) obey() {
	n := l.port.read(l.in[:])
	if n == 0 {
		return
	}
	l.decoder.Feed(l.in[:n], func(t guest.Type, payload []byte) {
		switch t {
		case guest.TypeVerify:
			var v guest.Verify
			if guest.Decode(payload, &v) == nil && v.Token != 0 {
				// One more than there are: the other CPU may be in the middle of
				// a page whose verification began before the request.
				l.sweep.left.Store(uint32(len(l.mem.pages)) + 1)
				l.sweep.asked.Store(v.Token)
			}
		case guest.TypeReport:
			var r guest.Report
			if guest.Decode(payload, &r) == nil {
				l.send(guest.TypeFaults, l.mem.faults(r.Since, r.Until))
			}
		}
	})
}
