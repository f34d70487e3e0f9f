// SPDX-License-Identifier: Apache-2.0

package dataplane_test

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"scattergather.io/scattergather/internal/lab/guest"
)

// searcher looks for the guest's memory in other places. It knows some words of every
// page as the guest first filled it: whoever keeps such a page readable has them.
type searcher map[uint64]bool

// newSearcher learns the pattern of a guest.
func newSearcher(pages uint32, c guest.Config) searcher {
	s := searcher{}
	pattern := guest.Pattern{Seed: c.Seed, Mix: c.Mix}
	var p guest.Page
	for i := range pages {
		pattern.Fill(&p, i, 0)
		for _, at := range []int{0, guest.PageWords / 2, guest.PageWords - 1} {
			if p[at] != 0 {
				s[p[at]] = true
			}
		}
	}
	return s
}

// count counts known words in b.
func (s searcher) count(b []byte) (found int) {
	for ; len(b) >= 8; b = b[8:] {
		if s[binary.LittleEndian.Uint64(b)] {
			found++
		}
	}
	return found
}

// file searches what a sparse file holds; size is how many bytes that is.
func (s searcher) file(path string) (found int, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for at := int64(0); ; {
		begin, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return found, size, nil
		}
		if err != nil {
			return found, size, err
		}
		if at, err = unix.Seek(int(f.Fd()), begin, unix.SEEK_HOLE); err != nil {
			return found, size, err
		}
		for part := io.NewSectionReader(f, begin, at-begin); ; {
			n, err := io.ReadFull(part, buf)
			found += s.count(buf[:n])
			size += int64(n)
			if err != nil {
				break // the end, or what was freed meanwhile
			}
		}
	}
}

// assertCiphertext asserts that the pools of all intermediaries hold much of the guest
// and nothing of it that could be read.
func (s *stage) assertCiphertext(t *testing.T) {
	t.Helper()
	search := newSearcher(s.guest.pages, guestConfig(guestMiB, s.guest.seed))
	total := int64(0)
	for _, n := range s.Intermediaries {
		files, err := filepath.Glob(filepath.Join(s.state(t, n), "pool", "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range files {
			found, size, err := search.file(path)
			if err != nil {
				t.Fatal(err)
			}
			total += size
			if found > 0 {
				t.Errorf("%s of %s holds %d words of the guest's memory in the clear", filepath.Base(path), n.Name, found)
			}
		}
	}
	if total < 8<<20 {
		t.Errorf("the pools hold only %d KiB: the guest was not there", total>>10)
	}
	t.Logf("%d MiB in pools, nothing of it readable", total>>20)
}

// TestSearcherFindsPlaintext makes sure that assertCiphertext can fail.
func TestSearcherFindsPlaintext(t *testing.T) {
	c := guestConfig(guestMiB, 1)
	pattern := guest.Pattern{Seed: c.Seed, Mix: c.Mix}
	path := filepath.Join(t.TempDir(), "arena")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	written := 0
	for i := range uint32(200) {
		var p guest.Page
		if pattern.Fill(&p, i, 0); p == (guest.Page{}) {
			continue
		}
		var b []byte
		for _, w := range p {
			b = binary.LittleEndian.AppendUint64(b, w)
		}
		if _, err := f.WriteAt(b, 1<<30+int64(i)*2*guest.PageSize); err != nil {
			t.Fatal(err)
		}
		written++
	}
	found, size, err := newSearcher(200, c).file(path)
	if err != nil || found < 3*written || size < int64(written)*guest.PageSize || size > 2<<20 {
		t.Errorf("found %d words of %d pages in %d bytes, %v", found, written, size, err)
	}
}
