// SPDX-License-Identifier: Apache-2.0

package pool

import "time"

// Phase says whose a session is; see the package comment.
type Phase uint8

// The phases. They are written into arenas.
const (
	// Filling: the reader has never attached. The session is the owner's.
	Filling Phase = 1
	// Shared: the reader has attached. These pages may be the only copy.
	Shared Phase = 2
)

// String returns "filling" or "shared".
func (ph Phase) String() string {
	switch ph {
	case Filling:
		return "filling"
	case Shared:
		return "shared"
	}
	return "unknown"
}

// lease says how long a session lives.
type lease struct {
	phase           Phase
	owners, readers int
	over            bool // the session has ended
	// asked is the grace that the source asked for, 0 for none.
	asked time.Duration

	timer *time.Timer
	// turn tells the newest timer from one that fires while it is replaced.
	turn    uint64
	expires time.Time // zero while somebody is connected who keeps the session
}

// grace returns how long the session lives from now on if nobody connects. kept is
// true when somebody is connected, so that no time runs.
func (l *lease) grace(c *Config) (d time.Duration, kept bool) {
	d = c.OwnerGrace
	if l.asked > 0 {
		d = min(l.asked, c.MaxGrace)
	}
	if l.phase == Filling {
		// A reader that attaches turns the phase, so none is connected here.
		return d, l.owners > 0
	}
	return max(d, c.ReaderGrace), l.owners+l.readers > 0
}

// ownerMayDissolve tells whether the owner may end the session, which the reader always
// may.
func (l *lease) ownerMayDissolve() bool { return l.phase == Filling }

// renew starts or stops the time of a session after somebody came or went. The
// caller holds p.mu, and the session is listed.
func (p *Pool) renew(s *session) {
	l := &s.lease
	l.stop()
	d, kept := l.grace(&p.cfg)
	if kept {
		return
	}
	turn := l.turn
	l.expires = time.Now().Add(d)
	l.timer = time.AfterFunc(d, func() { p.expire(s, turn) })
}

// stop ends the time that runs, if any.
func (l *lease) stop() {
	if l.timer != nil {
		l.timer.Stop()
	}
	l.turn++
	l.timer, l.expires = nil, time.Time{}
}

// expire drops a session whose time is up, unless somebody came in the same moment.
func (p *Pool) expire(s *session, turn uint64) {
	p.mu.Lock()
	if s.lease.turn != turn || p.closed {
		p.mu.Unlock()
		return
	}
	p.unlist(s)
	p.mu.Unlock()
	p.cfg.Log.Info("dropping a session that nobody came back for", "migration", s.migration.String(),
		"owner", s.owner, "reader", s.reader, "phase", s.lease.phase.String())
	p.destroy(s)
}
