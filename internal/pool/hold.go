// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"fmt"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// hold is somebody's connection to a session.
type hold struct {
	s        *session
	owner    bool
	released bool // guarded by the pool's mu
}

// Session returns the session's name.
func (h *hold) Session() wire.Session { return h.s.session }

// Close disconnects. If that leaves nobody, the session's grace period begins. More
// calls do nothing.
func (h *hold) Close() {
	p := h.s.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if h.released {
		return
	}
	h.released = true
	if h.owner {
		h.s.lease.owners--
	} else {
		h.s.lease.readers--
	}
	if !h.s.lease.over && !p.closed {
		p.renew(h.s)
	}
}

// Free forgets count pages from first on, in whatever version, gives their memory back
// to the node, and returns how many of them were held. The reader frees what it has
// placed, and the owner what it discards.
func (h *hold) Free(first pages.Index, count uint64) (uint64, error) { return h.s.free(first, count) }

// dissolve ends the session and returns when its memory is given back.
func (h *hold) dissolve() error {
	s, p := h.s, h.s.pool
	p.mu.Lock()
	switch {
	case p.closed:
		p.mu.Unlock()
		return ErrClosed
	case s.lease.over:
		p.mu.Unlock()
		return ErrGone
	case h.owner && !s.lease.ownerMayDissolve():
		p.mu.Unlock()
		return fmt.Errorf("%w: %q has attached to the session of migration %v, so %q cannot dissolve it any more",
			ErrForbidden, s.reader, s.migration, s.owner)
	}
	p.unlist(s)
	p.mu.Unlock()
	p.destroy(s)
	return nil
}

// Writer is the owner's connection to a session. It is safe for concurrent use.
type Writer struct {
	hold
	granted uint64
}

// Granted returns how many bytes of pages the session may hold, at most as many as
// were asked for.
func (w *Writer) Granted() uint64 { return w.granted }

// Put stores at most wire.MaxBatch pages, all or none. When it returns nil, they are
// where a restarted agent finds them. A newer version of a page replaces an older one;
// a version that is not newer than the one held changes nothing and is no error. When
// there is no room, the error wraps ErrFull; older versions of these pages may then be
// lost, which nobody can want any more. Put does not allocate.
func (w *Writer) Put(ps []Page) error { return w.s.put(ps) }

// Dissolve ends the session, gives back its memory, and returns when that is done.
// Once the reader has attached it fails with ErrForbidden.
func (w *Writer) Dissolve() error { return w.dissolve() }

// Reader is the reader's connection to a session. It is safe for concurrent use.
type Reader struct{ hold }

// Held returns the number of pages in the session, and of the bytes of memory that
// they take.
func (r *Reader) Held() (n, bytes uint64) {
	n, _ = r.s.slots.count()
	return n, n * pages.Size
}

// Get reads at most wire.MaxBatch pages, whose Index and Version are given, into buf,
// which must have wire.MaxSealed bytes for each. It fills in Encoding and Sealed.
// Sealed is nil for pages that are not held in just that version. Get does not
// allocate.
func (r *Reader) Get(ps []Page, buf []byte) error { return r.s.get(ps, buf) }

// Dissolve ends the session, gives back its memory, and returns when that is done.
func (r *Reader) Dissolve() error { return r.dissolve() }
