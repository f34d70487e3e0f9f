// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"bytes"
	"slices"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// Stats says what a pool is used for. All sizes are in bytes.
type Stats struct {
	// Budget is what all sessions together may take, and Reserved what they were
	// promised: their pages, what describes them, and their part of the index.
	Budget, Reserved uint64
	// Used is what lies in arenas now.
	Used uint64
	// Index is what the sessions take of the process's heap to find their pages.
	Index uint64
	// Headroom is what the node can spare now.
	Headroom uint64
	// Rejected is what files in the directory take that Open could not make sense of.
	Rejected uint64
	// Pages is the number of pages held.
	Pages uint64
	// Sessions is ordered by migration.
	Sessions []SessionStats
}

// SessionStats says what a session holds and who is connected.
type SessionStats struct {
	Migration     wire.MigrationID
	Session       wire.Session
	Owner, Reader wire.Identity
	Phase         Phase
	// Owners and Readers count the connections of the two.
	Owners, Readers int
	// Expires is when the session is dropped if nobody connects; zero while no such
	// time runs.
	Expires time.Time
	// Pages is the number of pages held, and Capacity the number that may be.
	Pages, Capacity uint64
	// Reserved and Used are the session's parts of the pool's, in bytes.
	Reserved, Used uint64
}

// Stats returns a snapshot, consistent for each session.
func (p *Pool) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := Stats{
		Budget: p.cfg.BudgetBytes, Reserved: p.reserved, Rejected: p.rejected,
		Headroom: p.cfg.Headroom(), Sessions: make([]SessionStats, 0, len(p.sessions)),
	}
	for _, s := range p.sessions {
		one := s.stats()
		st.Sessions = append(st.Sessions, one)
		st.Pages += one.Pages
		st.Used += one.Used
		st.Index += s.index.bytes()
	}
	slices.SortFunc(st.Sessions, func(a, b SessionStats) int {
		return bytes.Compare(a.Migration[:], b.Migration[:])
	})
	return st
}

func (s *session) stats() SessionStats {
	taken, grown := s.slots.count()
	extents := uint64(len(s.slots.extents))
	return SessionStats{
		Migration: s.migration, Session: s.session, Owner: s.owner, Reader: s.reader,
		Phase: s.lease.phase, Owners: s.lease.owners, Readers: s.lease.readers, Expires: s.lease.expires,
		Pages: taken, Capacity: extents * extentSlots,
		Reserved: sessionFixed + extents*extentCost,
		Used:     descBase + grown*extentDesc + taken*pages.Size,
	}
}
