// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The file of a map, in the byte order of the machine that it never leaves:
//
//	0          header: magic, layout digest
//	4096       a bit per chunk whose versions exist
//	holdersAt  a byte per page
//	chunksAt   64 KiB of versions per chunk
//
// Each part begins at a multiple of 4096. The file has its full length from the start
// but takes memory for holders and for chunks that exist only: reading a hole of a
// mapped tmpfs file would allocate it, hence the bits. Memory is asked for with
// fallocate before it is touched, since a full tmpfs answers a touch with SIGBUS.
const (
	mapMagic    = "sgpages1"
	mapHeader   = len(mapMagic) + sha256.Size
	chunkBitsAt = 4096
)

// ErrMapFile is wrapped when a file holds no map, or that of another VM.
var ErrMapFile = errors.New("no page map of this VM")

// mapFile is the mapping of a map's file.
type mapFile struct {
	file                       *os.File
	data                       []byte
	holdersAt, chunksAt, total uint64
}

// OpenMap returns a map that lives in f, which is given its content when it is empty
// and must hold a map of the same layout otherwise; else the error wraps ErrMapFile.
// What the map was told outlives the process, however that ends. On tmpfs it does not
// outlive the machine, and need not.
//
// f must allow reading and writing, stay open until the map is closed, and be changed
// by nobody else: cutting it kills the process by SIGBUS. Closing the map leaves f
// open.
func OpenMap(l *Layout, f *os.File) (*Map, error) {
	m, err := openMap(l, f)
	if err != nil {
		return nil, fmt.Errorf("opening page map %s: %w", f.Name(), err)
	}
	return m, nil
}

func openMap(l *Layout, f *os.File) (*Map, error) {
	n := l.Pages()
	x := &mapFile{file: f}
	x.holdersAt = chunkBitsAt + whole((chunkCount(n)+7)/8)
	x.chunksAt = x.holdersAt + whole(n)
	x.total = x.chunksAt + chunkCount(n)*chunkBytes
	if err := x.mmap(); err != nil {
		return nil, err
	}
	m := &Map{
		pages:    n,
		holders:  unsafe.Slice((*Holder)(&x.data[x.holdersAt]), n),
		versions: newVersions(n),
		file:     x,
	}
	if err := x.claim(l); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	if err := m.recall(); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

func whole(n uint64) uint64 { return (n + 4095) &^ 4095 }

// mmap maps the file, after giving an empty one its length.
func (x *mapFile) mmap() error {
	info, err := x.file.Stat()
	if err != nil {
		return err
	}
	if size := info.Size(); size != 0 && uint64(size) != x.total {
		return fmt.Errorf("%d bytes, want %d: %w", size, x.total, ErrMapFile)
	}
	if err := x.file.Truncate(int64(x.total)); err != nil {
		return err
	}
	if err := x.reserve(0, x.chunksAt); err != nil {
		return err
	}
	x.data, err = unix.Mmap(int(x.file.Fd()), 0, int(x.total), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mapping %d bytes: %w", x.total, err)
	}
	return nil
}

// reserve gives a part of the file memory, so that touching it cannot fail.
func (x *mapFile) reserve(at, n uint64) error {
	for {
		err := unix.Fallocate(int(x.file.Fd()), unix.FALLOC_FL_KEEP_SIZE, int64(at), int64(n))
		if err == nil {
			return nil
		}
		if err != unix.EINTR {
			return fmt.Errorf("reserving %d bytes (free memory of the tmpfs that holds it, or enlarge it): %w", n, err)
		}
	}
}

// claim writes the header of a new file, or checks that of an old one.
func (x *mapFile) claim(l *Layout) error {
	header := append([]byte(mapMagic), l.digest()...)
	have := x.data[:mapHeader]
	if bytes.Equal(have, header) {
		return nil
	}
	// The magic is written last: without it, nothing was ever written behind it.
	if !bytes.Equal(have[:len(mapMagic)], make([]byte, len(mapMagic))) {
		return fmt.Errorf("header %x, want %x: %w", have, header, ErrMapFile)
	}
	copy(have[len(mapMagic):], header[len(mapMagic):])
	copy(have, mapMagic)
	return nil
}

// digest tells layouts apart.
func (l *Layout) digest() []byte {
	var text []byte
	for _, b := range l.blocks {
		text = append(text, byte(len(b.Name)))
		text = append(text, b.Name...)
		text = binary.LittleEndian.AppendUint64(text, b.Length)
		text = binary.LittleEndian.AppendUint64(text, b.PageSize)
	}
	sum := sha256.Sum256(text)
	return sum[:]
}

// recall takes the chunks that exist from the file and counts the holders.
func (m *Map) recall() error {
	x, chunks := m.file, chunkCount(m.pages)
	for k, b := range x.data[chunkBitsAt:x.holdersAt] {
		for ; b != 0; b &= b - 1 {
			c := uint64(k)*8 + uint64(bits.TrailingZeros8(b))
			if c >= chunks {
				return fmt.Errorf("versions of chunk %d of %d: %w", c, chunks, ErrMapFile)
			}
			m.versions.add(c, x.chunk(c))
		}
	}
	for k := 0; k < len(m.holders); {
		// Most neighbours are alike: count eight that are at once.
		h := m.holders[k]
		if k+8 <= len(m.holders) &&
			binary.NativeEndian.Uint64(x.data[x.holdersAt+uint64(k):]) == uint64(h)*0x0101010101010101 {
			m.counts[h] += 8
			k += 8
			continue
		}
		m.counts[h]++
		k++
	}
	for h := int(FirstHolder) + MaxHolders; h < len(m.counts); h++ {
		if m.counts[h] > 0 {
			return fmt.Errorf("%d pages with %s: %w", m.counts[h], Holder(h), ErrMapFile)
		}
	}
	return nil
}

// addChunk makes chunk c exist in the file and returns its versions, all 0.
func (x *mapFile) addChunk(c uint64) ([]Version, error) {
	if err := x.reserve(x.chunksAt+c*chunkBytes, chunkBytes); err != nil {
		return nil, fmt.Errorf("page map %s: %w", x.file.Name(), err)
	}
	// Nothing was written to the chunk before its bit is set, so it reads as zeros.
	x.data[chunkBitsAt+c/8] |= 1 << (c % 8)
	return x.chunk(c), nil
}

func (x *mapFile) chunk(c uint64) []Version {
	return unsafe.Slice((*Version)(unsafe.Pointer(&x.data[x.chunksAt+c*chunkBytes])), chunkPages)
}

// Close releases the mapping of a map that lives in a file and leaves the file as it
// is. The map must not be used afterwards. Closing a map in process memory, or closing
// twice, does nothing.
func (m *Map) Close() error {
	if m.file == nil {
		return nil
	}
	data := m.file.data
	// A use after this finds no pages instead of unmapped memory.
	*m = Map{}
	if err := unix.Munmap(data); err != nil {
		return fmt.Errorf("unmapping a page map: %w", err)
	}
	return nil
}
