// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// store keeps pages that QEMU cannot take yet: those that came from the source, and
// parts of large host pages. It is a sparse file in which page i begins at byte
// i*pages.Size, so it needs no index and outlives the process.
//
// It is written and read by system calls and not mapped: a full tmpfs is then an error
// that the source is told, instead of a SIGBUS; writing a whole new page takes no page
// fault and no zeroing; and punching holes needs no other CPU to flush its TLB.
//
// It is safe for concurrent use on different pages.
type store struct{ f *os.File }

// openStore makes the file, or opens the one of an earlier process.
func openStore(path string, l *pages.Layout) (*store, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the page store: %w", err)
	}
	if err := f.Truncate(int64(l.Bytes())); err != nil {
		return nil, errors.Join(fmt.Errorf("sizing the page store: %w", err), f.Close())
	}
	return &store{f}, nil
}

// write stores whole pages from first.
func (s *store) write(first pages.Index, data []byte) error {
	if _, err := s.f.WriteAt(data, int64(first)*pages.Size); err != nil {
		return fmt.Errorf("writing %d bytes to the page store: %w", len(data), err)
	}
	return nil
}

// read fills the buffers, of pages.Size each, with the pages from first.
func (s *store) read(first pages.Index, bufs [][]byte) error {
	off := int64(first) * pages.Size
	for len(bufs) > 0 {
		n, err := unix.Preadv(int(s.f.Fd()), bufs[:min(len(bufs), maxIovecs)], off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("reading page %d from the page store: %w", off/pages.Size, err)
		}
		// tmpfs never reads short within the file, but a file elsewhere may.
		if n < pages.Size {
			return fmt.Errorf("reading page %d from the page store: it gave %d bytes", off/pages.Size, n)
		}
		bufs = bufs[n/pages.Size:]
		off += int64(n/pages.Size) * pages.Size
	}
	return nil
}

// maxIovecs is the kernel's IOV_MAX.
const maxIovecs = 1024

// punch gives the memory of these pages back.
func (s *store) punch(list []wire.Run) error {
	for _, r := range list {
		err := unix.Fallocate(int(s.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE,
			int64(r.First)*pages.Size, int64(r.Count)*pages.Size)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("giving back %d pages of the page store: %w", r.Count, err)
		}
	}
	return nil
}

func (s *store) close() error { return s.f.Close() }
