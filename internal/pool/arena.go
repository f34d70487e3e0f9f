// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"unsafe"

	"github.com/go-logr/logr"
	"golang.org/x/sys/unix"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// arena is the file of one session. Calls on different slots may run at once; who may
// touch which slot is the session's business.
type arena struct {
	fd   int
	path string
	// ctl maps the header and the descriptors of all extents that the session could
	// ever have. Only the header and the descriptors of grown extents may be touched:
	// anything else would take memory that nobody counts.
	ctl []byte
	log logr.Logger
}

// createArena makes the file of a new session. It appears under its name when it is
// complete.
func createArena(path string, h *header, limit int, log logr.Logger) (*arena, error) {
	draft := path + draftSuffix
	fd, err := unix.Open(draft, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("creating %s: %w", draft, err)
	}
	a := &arena{fd: fd, path: path, log: log}
	err = a.init(h, limit)
	if err == nil {
		err = os.Rename(draft, path)
	}
	if err != nil {
		a.close()
		return nil, errors.Join(fmt.Errorf("creating %s: %w", path, err), os.Remove(draft))
	}
	return a, nil
}

func (a *arena) init(h *header, limit int) error {
	page := h.append(make([]byte, 0, descBase))
	if err := retry(func() error { return unix.Ftruncate(a.fd, bodyBase) }); err != nil {
		return err
	}
	if n, err := unix.Pwrite(a.fd, page[:descBase], 0); err != nil || n != descBase {
		return fullWhenNoMemory(fmt.Errorf("writing %d of %d bytes of header: %w", n, descBase, orShort(err)))
	}
	return a.mapControl(limit)
}

// mapControl maps the header and the descriptors of limit extents.
func (a *arena) mapControl(limit int) error {
	ctl, err := unix.Mmap(a.fd, 0, descBase+limit*extentDesc, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mapping descriptors: %w", err)
	}
	a.ctl = ctl
	return nil
}

// close gives up the file without changing it.
func (a *arena) close() {
	if a.ctl != nil {
		// Neither call can fail for memory and a descriptor that are ours.
		_ = unix.Munmap(a.ctl)
		a.ctl = nil
	}
	_ = unix.Close(a.fd)
	a.fd = -1
}

// wipe turns all content into zeroes and gives its memory back, whoever else has the
// file open.
func (a *arena) wipe() error {
	return retry(func() error { return unix.Ftruncate(a.fd, 0) })
}

// limit returns for how many extents descriptors are mapped.
func (a *arena) limit() int { return (len(a.ctl) - descBase) / extentDesc }

func (a *arena) word(offset int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&a.ctl[offset]))
}

func (a *arena) desc(slot uint32) *descriptor {
	return (*descriptor)(unsafe.Pointer(&a.ctl[descBase+int(slot)*descBytes]))
}

// setExtents makes the file as long as n extents need and notes n in it. In between
// the file is always long enough for the number noted.
func (a *arena) setExtents(n int) error {
	if uint64(n) < a.word(wordExtents).Load() {
		a.word(wordExtents).Store(uint64(n))
	}
	if err := retry(func() error { return unix.Ftruncate(a.fd, fileBytes(n)) }); err != nil {
		return fmt.Errorf("resizing %s: %w", a.path, err)
	}
	a.word(wordExtents).Store(uint64(n))
	return nil
}

func fileBytes(extents int) int64 { return bodyBase + int64(extents)*extentBody }

// growExtent gets the memory of an extent's descriptors before they are touched, so
// that a full tmpfs is an error and no SIGBUS.
func (a *arena) growExtent(e int) error {
	err := retry(func() error {
		return unix.Fallocate(a.fd, unix.FALLOC_FL_KEEP_SIZE, descBase+int64(e)*extentDesc, extentDesc)
	})
	if err != nil {
		return fullWhenNoMemory(fmt.Errorf("growing %s: %w", a.path, err))
	}
	return nil
}

func (a *arena) dropExtent(e int) {
	a.punch(descBase+int64(e)*extentDesc, extentDesc)
}

func (a *arena) punchBodies(slot uint32, n int) {
	a.punch(bodyBase+int64(slot)*pages.Size, int64(n)*pages.Size)
}

// punch gives memory back. Linux has no reason to refuse that on a tmpfs; if it does,
// the memory comes back when the slot is used again or the session ends.
func (a *arena) punch(offset, n int64) {
	err := retry(func() error {
		return unix.Fallocate(a.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, n)
	})
	if err != nil {
		a.log.Error(err, "giving memory back", "arena", a.path, "offset", offset, "bytes", n)
	}
}

// publish makes a slot live whose body is written.
func (d *descriptor) publish(p *Page, turn uint16) {
	var tail [tailBytes]byte
	copy(tail[:], p.Sealed[min(len(p.Sealed), pages.Size):])
	d.page.Store(uint64(p.Index))
	d.tail[0].Store(*(*uint64)(unsafe.Pointer(&tail[0])))
	d.tail[1].Store(*(*uint64)(unsafe.Pointer(&tail[8])))
	d.meta.Store(uint64(makeMeta(p.Version, len(p.Sealed), p.Encoding, turn)))
}

// loadTail copies what of a sealed page does not lie in the body.
func (d *descriptor) loadTail(dst []byte) {
	var tail [tailBytes]byte
	*(*uint64)(unsafe.Pointer(&tail[0])) = d.tail[0].Load()
	*(*uint64)(unsafe.Pointer(&tail[8])) = d.tail[1].Load()
	copy(dst, tail[:])
}

// transfer reads or writes bodies: slots[i] holds the first at most pages.Size bytes
// of bufs[i]. Slots that follow each other travel in one system call.
func (a *arena) transfer(call uintptr, slots []uint32, bufs [][]byte) error {
	var vec [wire.MaxBatch]unix.Iovec
	for len(slots) > 0 {
		n, want := 0, 0
		for n < len(slots) && n < len(vec) && slots[n] == slots[0]+uint32(n) && want == n*pages.Size {
			size := min(len(bufs[n]), pages.Size)
			vec[n].Base = &bufs[n][0]
			vec[n].SetLen(size)
			want += size
			n++
		}
		offset := bodyBase + int64(slots[0])*pages.Size
		got, _, errno := unix.Syscall6(call, uintptr(a.fd), uintptr(unsafe.Pointer(&vec[0])), uintptr(n), uintptr(offset), 0, 0)
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return fullWhenNoMemory(fmt.Errorf("moving %d pages at slot %d of %s: %w", n, slots[0], a.path, errno))
		case int(got) < want && int(got) >= pages.Size:
			// Cut short by a lack of memory or a signal: go on after the whole
			// pages; the lack shows when they are tried again.
			n = int(got) / pages.Size
		case int(got) != want:
			return fullWhenNoMemory(fmt.Errorf("moving slot %d of %s: %w", slots[0], a.path, orShort(nil)))
		}
		slots, bufs = slots[n:], bufs[n:]
	}
	return nil
}

// orShort names what went wrong when a system call did less than asked for.
func orShort(err error) error {
	if err == nil {
		return unix.ENOSPC
	}
	return err
}

// fullWhenNoMemory makes errors that mean a lack of memory wrap ErrFull.
func fullWhenNoMemory(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: the node's tmpfs has no memory left: %w", ErrFull, err)
	}
	return err
}

func retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

const (
	arenaSuffix = ".arena"
	draftSuffix = ".new"
)

func arenaPath(dir string, id wire.MigrationID) string {
	return filepath.Join(dir, id.String()+arenaSuffix)
}
