// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sys/unix"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// Sentinels. Errors of this package wrap them where callers have to branch.
var (
	// ErrFull means that a page finds no room: in the session's reservation, in the
	// tmpfs, or because the node needs its memory itself. The page belongs
	// elsewhere.
	ErrFull = errors.New("no room")
	// ErrBudget means that a reservation finds no room.
	ErrBudget = errors.New("over budget")
	// ErrUnknown means that there is no such session here.
	ErrUnknown = errors.New("no such session")
	// ErrForbidden means that the node may not do this in this session.
	ErrForbidden = errors.New("not allowed")
	// ErrGone means that the session was dissolved or has run out.
	ErrGone = errors.New("the session was dissolved or has run out")
	// ErrInvalid means that an argument is outside what the protocol allows.
	ErrInvalid = errors.New("invalid request")
	// ErrClosed means that this side closed the pool; its sessions live on in Dir.
	ErrClosed = errors.New("pool closed")
)

// Config configures a Pool. Zero values of optional fields mean the defaults.
type Config struct {
	// Dir is a directory on a tmpfs that belongs to this pool alone; Open makes it.
	// What lies in it survives the process but not the node. Required.
	Dir string
	// BudgetBytes bounds what all sessions together may take of the node's memory:
	// pages, descriptors and index. Sessions that Open finds are kept even when
	// they exceed it. With 0 nothing is lent out.
	BudgetBytes uint64
	// KeepFree is how many bytes of available memory are left to the node's own VMs
	// whatever the budget says. Default 1 GiB.
	KeepFree uint64
	// Headroom returns how many bytes of the node's memory may be taken now. It is
	// called before every 4 MiB that sessions take. By default it is the least of
	// MemAvailable in /proc/meminfo less KeepFree, the room in the process's
	// control group, and the free space of the tmpfs.
	Headroom func() uint64
	// OwnerGrace is how long a session is kept while its source is not connected
	// and its destination has never been; the source may ask for another time when
	// it reserves. Default 1 min.
	OwnerGrace time.Duration
	// ReaderGrace is how long a session is kept, at least, while neither is
	// connected and the destination has been. Default 15 min.
	ReaderGrace time.Duration
	// MaxGrace bounds what a source may ask for. Default 1 h.
	MaxGrace time.Duration
	// Log receives what happens to sessions without anybody asking.
	Log logr.Logger
}

// Pool is the memory that this node lends out. It is safe for concurrent use.
type Pool struct {
	cfg   Config
	room  room
	lock  *os.File // held as long as the pool is open
	limit int      // extents for which sessions map descriptors

	mu       sync.Mutex
	closed   bool
	sessions map[wire.MigrationID]*session
	reserved uint64         // cost of all sessions that have memory, listed or not
	rejected uint64         // bytes of files in Dir that are no arenas of ours
	dying    sync.WaitGroup // sessions that are unlisted and not destroyed yet
}

// Open opens the pool in c.Dir and takes up the sessions that lie there. They belong
// to nobody at first: the grace periods run. It fails when another process has the
// directory open.
func Open(c Config) (*Pool, error) {
	c.KeepFree = cmp.Or(c.KeepFree, 1<<30)
	c.OwnerGrace = cmp.Or(c.OwnerGrace, time.Minute)
	c.ReaderGrace = cmp.Or(c.ReaderGrace, 15*time.Minute)
	c.MaxGrace = cmp.Or(c.MaxGrace, time.Hour)
	p := &Pool{cfg: c, sessions: make(map[wire.MigrationID]*session)}
	p.limit = int(min(maxExtents, max(1, c.BudgetBytes/extentCost)))
	var err error
	if p.lock, err = lockDir(c.Dir); err != nil {
		return nil, fmt.Errorf("opening the pool in %q: %w", c.Dir, err)
	}
	if p.cfg.Headroom == nil {
		if _, err = nodeHeadroom(c.Dir, c.KeepFree); err != nil {
			p.lock.Close()
			return nil, fmt.Errorf("finding the node's available memory: %w", err)
		}
		p.cfg.Headroom = p.nodeHeadroom
	}
	p.room.available = p.cfg.Headroom
	p.mu.Lock()
	defer p.mu.Unlock()
	if err = p.reopen(); err != nil {
		p.release()
		return nil, fmt.Errorf("opening the pool in %q: %w", c.Dir, err)
	}
	for _, s := range p.sessions {
		p.renew(s)
	}
	return p, nil
}

// lockDir makes dir if need be, checks that it is on a tmpfs, and locks it against
// other processes until the file is closed.
func lockDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	var fs unix.Statfs_t
	if err := retry(func() error { return unix.Statfs(dir, &fs) }); err != nil {
		return nil, err
	}
	if fs.Type != unix.TMPFS_MAGIC {
		return nil, errors.New("it is not on a tmpfs; give a directory in /dev/shm, or an emptyDir of medium Memory")
	}
	f, err := os.OpenFile(dir+"/lock", os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another process has it open (%w); end that process first", err)
	}
	return f, nil
}

// nodeHeadroom counts a failure to ask as no room at all: the node's VMs go first.
func (p *Pool) nodeHeadroom() uint64 {
	n, err := nodeHeadroom(p.cfg.Dir, p.cfg.KeepFree)
	if err != nil {
		p.cfg.Log.Error(err, "finding the node's available memory; taking no more pages")
		return 0
	}
	return n
}

// Close lets go of all sessions without changing them: another Open finds them. Calls
// on their Writers and Readers fail with ErrClosed.
func (p *Pool) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return ErrClosed
	}
	p.closed = true
	for _, s := range p.sessions {
		s.lease.stop()
	}
	p.mu.Unlock()
	p.dying.Wait()
	p.release()
	return nil
}

// release closes whatever is open, after which nothing is listed any more.
func (p *Pool) release() {
	for _, s := range p.sessions {
		if s.end(ErrClosed) {
			s.arena.close()
		}
	}
	p.lock.Close()
}

// Reserve makes a session of up to want.Bytes of pages, at page size, for the
// migration, owned by the node owner, and connects the owner to it. When less is
// free, it grants what there is; when next to nothing is, it fails with ErrBudget.
//
// If the session exists already, its owner is connected again, and its size is changed
// to want.Bytes as far as that goes. Another owner, or another reader, is refused with
// ErrForbidden.
func (p *Pool) Reserve(id wire.MigrationID, owner wire.Identity, want wire.Reserve) (*Writer, error) {
	if err := checkNames(owner, want.Reader); err != nil {
		return nil, err
	}
	if want.Bytes == 0 {
		return nil, fmt.Errorf("%w: a reservation of 0 bytes", ErrInvalid)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	s, err := p.reserve(id, owner, want)
	if err != nil {
		return nil, err
	}
	s.lease.asked = min(max(0, want.Grace), p.cfg.MaxGrace)
	s.arena.word(wordGrace).Store(uint64(s.lease.asked / time.Second))
	s.lease.owners++
	p.renew(s)
	return &Writer{hold{s: s, owner: true}, min(want.Bytes, s.capacity())}, nil
}

func (p *Pool) reserve(id wire.MigrationID, owner wire.Identity, want wire.Reserve) (*session, error) {
	need := int(min(maxExtents, (want.Bytes-1)/extentBody+1))
	if s := p.sessions[id]; s != nil {
		if s.owner != owner || s.reader != want.Reader {
			return nil, fmt.Errorf("%w: migration %v has a session here from %q for %q, not from %q for %q",
				ErrForbidden, id, s.owner, s.reader, owner, want.Reader)
		}
		return s, p.resize(s, need)
	}
	free := p.free()
	if free < sessionFixed+extentCost {
		return nil, fmt.Errorf("%w: %d bytes need %d with what describes them, of which %d are free in a budget of %d, %d of it reserved; %d bytes can be spared by the node",
			ErrBudget, want.Bytes, sessionFixed+uint64(need)*extentCost, free, p.cfg.BudgetBytes, p.reserved, p.cfg.Headroom())
	}
	h := header{migration: id, owner: owner, reader: want.Reader}
	rand.Read(h.session[:])
	a, err := createArena(arenaPath(p.cfg.Dir, id), &h, p.limit, p.cfg.Log)
	if err != nil {
		return nil, err
	}
	s := newSession(p, h, a)
	s.setPhase(Filling)
	p.reserved += sessionFixed
	if err := p.setExtents(s, min(need, int((free-sessionFixed)/extentCost))); err != nil {
		p.unlist(s)
		go p.destroy(s)
		return nil, err
	}
	p.sessions[id] = s
	return s, nil
}

// resize changes the size of a session towards want extents.
func (p *Pool) resize(s *session, want int) error {
	if have := len(s.slots.extents); want > have {
		want = min(want, have+int(p.free()/extentCost), s.arena.limit())
	}
	return p.setExtents(s, want)
}

// setExtents changes the size of a session to n extents, or to as few as it can. The
// file is never shorter than what can be taken.
func (p *Pool) setExtents(s *session, n int) error {
	before := len(s.slots.extents)
	if n > before {
		if err := s.arena.setExtents(n); err != nil {
			return err
		}
		s.slots.resize(n)
	} else if n = s.slots.resize(n); n < before {
		if err := s.arena.setExtents(n); err != nil {
			p.cfg.Log.Error(err, "shrinking an arena")
		}
	}
	p.reserved = p.reserved + uint64(n)*extentCost - uint64(before)*extentCost
	return nil
}

// capacity returns how many bytes of pages a session may hold. The caller holds p.mu.
func (s *session) capacity() uint64 { return uint64(len(s.slots.extents)) * extentBody }

// free returns how many bytes can still be reserved. What is reserved already but not
// taken yet counts as if it were.
func (p *Pool) free() uint64 {
	var due uint64
	for _, s := range p.sessions {
		taken, grown := s.slots.count()
		due += uint64(len(s.slots.extents))*(extentBody+extentDesc) - taken*pages.Size - grown*extentDesc
	}
	spare := p.cfg.Headroom()
	spare -= min(spare, due)
	budget := p.cfg.BudgetBytes
	return min(budget-min(budget, p.reserved+p.rejected), spare)
}

// Attach connects the reader to the session of a migration. From then on the session
// is the reader's.
func (p *Pool) Attach(id wire.MigrationID, reader wire.Identity, session wire.Session) (*Reader, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	s := p.sessions[id]
	if s == nil {
		return nil, fmt.Errorf("%w: migration %v has none here: it was never reserved, was dissolved, has run out, or the node was restarted",
			ErrUnknown, id)
	}
	if s.reader != reader {
		return nil, fmt.Errorf("%w: the session of migration %v is for %q, not for %q", ErrForbidden, id, s.reader, reader)
	}
	if s.session != session {
		return nil, fmt.Errorf("%w: migration %v has session %x here, not %x", ErrUnknown, id, s.session, session)
	}
	s.setPhase(Shared)
	s.lease.readers++
	p.renew(s)
	return &Reader{hold{s: s}}, nil
}

// setPhase notes the phase where a restarted agent finds it.
func (s *session) setPhase(ph Phase) {
	s.lease.phase = ph
	s.arena.word(wordPhase).Store(uint64(ph))
}

// unlist makes a session unknown. The caller holds p.mu, and calls destroy after
// giving it up.
func (p *Pool) unlist(s *session) {
	s.lease.stop()
	s.lease.over = true
	delete(p.sessions, s.migration)
	p.dying.Add(1)
	// Under p.mu, so that a new session of the migration cannot lose its file.
	if err := os.Remove(s.arena.path); err != nil {
		p.cfg.Log.Error(err, "removing the arena of a session that has ended")
	}
}

// destroy gives back all memory of an unlisted session, once nobody uses it. That
// takes about a second for each GiB that is still held.
func (p *Pool) destroy(s *session) {
	defer p.dying.Done()
	s.end(ErrGone)
	if err := s.arena.wipe(); err != nil {
		// Closing frees the memory all the same: the file has no name any more.
		p.cfg.Log.Error(err, "wiping the arena of a session that has ended", "arena", s.arena.path)
	}
	s.arena.close()
	p.mu.Lock()
	p.reserved -= sessionFixed + uint64(len(s.slots.extents))*extentCost
	p.mu.Unlock()
}
