// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// stage is how far the gather is; it is kept, so that another process can go on.
type stage uint8

const (
	// stageOpening: QEMU has not accepted the VM, or has not begun with its device
	// state. Nothing of this survives the process.
	stageOpening stage = iota
	// stageDelivering: the device state is on its way into QEMU. It may run already.
	stageDelivering
	// stageFeeding: QEMU has loaded the device state, its guest runs.
	stageFeeding
	// stageEnding: QEMU was given every page and the end of the stream.
	stageEnding
)

var stageNames = [...]string{"opening", "delivering", "feeding", "ending"}

// String returns the stage's name for logs.
func (s stage) String() string {
	if int(s) < len(stageNames) {
		return stageNames[s]
	}
	return fmt.Sprintf("stage %d", uint8(s))
}

const (
	metaFile   = "meta.json"
	mapFile    = "map"
	storeFile  = "store"
	cursorFile = "cursor"
)

// meta is what a gather is about, and changes seldom. It is kept as a JSON file that
// is replaced in one step. It contains the key of the pages and is for the owner only.
type meta struct {
	Migration string        `json:"migration"`
	Source    wire.Identity `json:"source"`
	Setup     *wire.Setup   `json:"setup"`
	Stage     stage         `json:"stage"`
	Committed bool          `json:"committed"`
	// Claimed is the number of pages that was committed.
	Claimed uint64 `json:"claimed"`
	// Released means that the source knows of the commit.
	Released bool `json:"released"`
}

// state is the directory that holds all that must outlive the process: meta, the page
// map, the page store and the cursor.
type state struct {
	dir    string
	meta   meta
	mapf   *os.File
	where  *pages.Map
	store  *store
	cursor *cursor
}

// newState makes the directory; it must not hold an earlier gather.
func newState(dir string) (*state, error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return nil, fmt.Errorf("making the state directory: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		if errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("state directory %s exists: an earlier gather of this migration must be reopened or removed", dir)
		}
		return nil, fmt.Errorf("making the state directory: %w", err)
	}
	return &state{dir: dir}, nil
}

// begin keeps a migration that a source has just described.
func (s *state) begin(m meta, l *pages.Layout) error {
	s.meta = m
	if err := s.openFiles(l); err != nil {
		return err
	}
	return s.save()
}

// openState opens what an earlier process left. The error wraps ErrNotResumable when
// that is not enough to go on with.
func openState(dir string, id wire.MigrationID) (*state, *pages.Layout, error) {
	s := &state{dir: dir}
	data, err := os.ReadFile(filepath.Join(dir, metaFile))
	if errors.Is(err, os.ErrNotExist) {
		return s, nil, fmt.Errorf("%w: %s holds no migration that a source had described", ErrNotResumable, dir)
	}
	if err != nil {
		return s, nil, fmt.Errorf("reading the state: %w", err)
	}
	if err := json.Unmarshal(data, &s.meta); err != nil {
		return s, nil, fmt.Errorf("%w: reading %s: %w", ErrNotResumable, metaFile, err)
	}
	if s.meta.Migration != id.String() || s.meta.Setup == nil {
		return s, nil, fmt.Errorf("%w: %s is the state of migration %q, not %s", ErrNotResumable, dir, s.meta.Migration, id)
	}
	if s.meta.Stage < stageDelivering {
		return s, nil, fmt.Errorf("%w: the earlier process ended before the device state was given to the destination QEMU, which must be started again", ErrNotResumable)
	}
	l, err := pages.NewLayout(s.meta.Setup.Blocks)
	if err != nil {
		return s, nil, fmt.Errorf("%w: %w", ErrNotResumable, err)
	}
	if err := s.openFiles(l); err != nil {
		return s, nil, errors.Join(err, s.close())
	}
	return s, l, nil
}

func (s *state) openFiles(l *pages.Layout) error {
	var err error
	if s.mapf, err = os.OpenFile(filepath.Join(s.dir, mapFile), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return fmt.Errorf("opening the page map: %w", err)
	}
	if s.where, err = pages.OpenMap(l, s.mapf); err != nil {
		return fmt.Errorf("opening the page map: %w", err)
	}
	if s.store, err = openStore(filepath.Join(s.dir, storeFile), l); err != nil {
		return err
	}
	s.cursor, err = openCursor(filepath.Join(s.dir, cursorFile))
	return err
}

// save replaces the meta file in one step.
func (s *state) save() error {
	data, err := json.Marshal(&s.meta)
	if err != nil {
		return fmt.Errorf("encoding the state: %w", err)
	}
	path := filepath.Join(s.dir, metaFile)
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return fmt.Errorf("keeping the state: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("keeping the state: %w", err)
	}
	return nil
}

// close releases memory and descriptors and keeps the files.
func (s *state) close() error {
	var errs []error
	if s.where != nil {
		errs = append(errs, s.where.Close())
	}
	if s.mapf != nil {
		errs = append(errs, s.mapf.Close())
	}
	if s.store != nil {
		errs = append(errs, s.store.close())
	}
	if s.cursor != nil {
		errs = append(errs, s.cursor.close())
	}
	s.where, s.mapf, s.store, s.cursor = nil, nil, nil, nil
	return errors.Join(errs...)
}

// remove closes the state and deletes it.
func (s *state) remove() error {
	err := s.close()
	if rm := os.RemoveAll(s.dir); rm != nil {
		err = errors.Join(err, fmt.Errorf("removing the state: %w", rm))
	}
	return err
}

// cursor is a number in a mapped file: it costs a store to change it, and the last
// value outlives the process. It holds the last control frame that was applied.
type cursor struct {
	mem []byte
	n   *atomic.Uint64
}

func openCursor(path string) (*cursor, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the cursor: %w", err)
	}
	defer f.Close()
	size := os.Getpagesize()
	// The page is written, not only sized, so that it exists and a full tmpfs is an
	// error here and no SIGBUS later.
	if st, err := f.Stat(); err != nil || st.Size() < int64(size) {
		if _, err := f.WriteAt(make([]byte, size), 0); err != nil {
			return nil, fmt.Errorf("sizing the cursor: %w", err)
		}
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mapping the cursor: %w", err)
	}
	return &cursor{mem: mem, n: (*atomic.Uint64)(unsafe.Pointer(&mem[0]))}, nil
}

func (c *cursor) get() uint64  { return c.n.Load() }
func (c *cursor) set(n uint64) { c.n.Store(n) }

func (c *cursor) close() error { return unix.Munmap(c.mem) }
