// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"errors"
	"fmt"
	"strings"
)

// Size is the size of a page in bytes: the target page of x86-64, which is the
// granule of QEMU's RAM stream whatever the host page under a block is.
const Size = 4096

const (
	// MaxBlocks bounds the RAM blocks of one VM. QEMU VMs have some ten to thirty.
	MaxBlocks = 4096
	// MaxBytes bounds the RAM of one VM, all blocks together: 64 TiB.
	MaxBytes = 64 << 40
	// MaxName is the longest name of a RAM block in bytes; QEMU writes its length
	// in one byte (migration/ram.c).
	MaxName = 255
)

// ErrLayout is wrapped by the errors of NewLayout.
var ErrLayout = errors.New("bad RAM layout")

// ErrRange is wrapped by errors that name a page or an offset outside the RAM.
var ErrRange = errors.New("outside the RAM")

// Index is the number of a page, counted over all blocks laid end to end in the
// order in which the start of the RAM section names them.
type Index uint64

// Block is one RAM block of a VM.
type Block struct {
	// Name is QEMU's idstr of the block, such as "pc.ram".
	Name string
	// Length is the used length in bytes, a multiple of PageSize.
	Length uint64
	// PageSize is the size in bytes of the host pages under the block: 4096, or
	// 2 MiB or 1 GiB with huge pages. QEMU places whole host pages only.
	PageSize uint64
}

// Layout is the validated list of a VM's RAM blocks. It never changes.
type Layout struct {
	blocks []Block
	// starts[b] is the first page of block b; the entry after the last block is
	// the number of all pages.
	starts []Index
	names  map[string]int
}

// NewLayout checks blocks, which may come from another process, and lays them end to
// end. Its errors wrap ErrLayout and name the block.
func NewLayout(blocks []Block) (*Layout, error) {
	if len(blocks) == 0 || len(blocks) > MaxBlocks {
		return nil, fmt.Errorf("%w: %d blocks, want 1 to %d", ErrLayout, len(blocks), MaxBlocks)
	}
	l := &Layout{
		blocks: append([]Block(nil), blocks...),
		starts: make([]Index, len(blocks)+1),
		names:  make(map[string]int, len(blocks)),
	}
	var total uint64
	for i, b := range blocks {
		if err := b.check(); err != nil {
			return nil, fmt.Errorf("%w: block %d: %w", ErrLayout, i, err)
		}
		if other, ok := l.names[b.Name]; ok {
			return nil, fmt.Errorf("%w: blocks %d and %d are both named %q", ErrLayout, other, i, b.Name)
		}
		// No overflow: each Length was checked against MaxBytes before.
		if total += b.Length; total > MaxBytes {
			return nil, fmt.Errorf("%w: the blocks up to %q hold more than %d bytes", ErrLayout, b.Name, uint64(MaxBytes))
		}
		l.names[b.Name] = i
		l.starts[i+1] = Index(total / Size)
	}
	if total == 0 {
		return nil, fmt.Errorf("%w: no block holds a page", ErrLayout)
	}
	return l, nil
}

func (b Block) check() error {
	switch {
	case b.Name == "" || len(b.Name) > MaxName:
		return fmt.Errorf("name of %d bytes, want 1 to %d", len(b.Name), MaxName)
	case strings.IndexByte(b.Name, 0) >= 0:
		// To QEMU the name would end there, and two names could become one.
		return fmt.Errorf("name %q holds a zero byte", b.Name)
	case b.PageSize < Size || b.PageSize&(b.PageSize-1) != 0:
		return fmt.Errorf("%q: host pages of %d bytes, want a power of two from %d", b.Name, b.PageSize, Size)
	case b.Length > MaxBytes:
		return fmt.Errorf("%q: %d bytes, want at most %d", b.Name, b.Length, uint64(MaxBytes))
	case b.Length%b.PageSize != 0:
		return fmt.Errorf("%q: %d bytes are no multiple of its host pages of %d bytes", b.Name, b.Length, b.PageSize)
	}
	return nil
}

// Blocks returns the blocks. The caller must not change them.
func (l *Layout) Blocks() []Block { return l.blocks }

// Pages returns the number of pages of all blocks.
func (l *Layout) Pages() uint64 { return uint64(l.starts[len(l.blocks)]) }

// Bytes returns the number of bytes of all blocks.
func (l *Layout) Bytes() uint64 { return l.Pages() * Size }

// Lookup returns the number of the block of that name.
func (l *Layout) Lookup(name string) (block int, ok bool) {
	block, ok = l.names[name]
	return block, ok
}

// Extent returns the first page of a block and its number of pages; both are 0 for a
// number that no block has.
func (l *Layout) Extent(block int) (first Index, n uint64) {
	if block < 0 || block >= len(l.blocks) {
		return 0, 0
	}
	return l.starts[block], uint64(l.starts[block+1] - l.starts[block])
}

// Index returns the page at an offset in bytes of a block. The error wraps ErrRange
// when there is none, or when the offset is not that of a page's first byte.
func (l *Layout) Index(block int, offset uint64) (Index, error) {
	if block < 0 || block >= len(l.blocks) {
		return 0, fmt.Errorf("block %d of %d: %w", block, len(l.blocks), ErrRange)
	}
	if offset >= l.blocks[block].Length || offset%Size != 0 {
		return 0, fmt.Errorf("offset %#x of block %q of %#x bytes: %w, or between pages",
			offset, l.blocks[block].Name, l.blocks[block].Length, ErrRange)
	}
	return l.starts[block] + Index(offset/Size), nil
}

// Locate returns the block of a page and the page's offset in it in bytes. It returns
// block -1 for a page that does not exist.
func (l *Layout) Locate(i Index) (block int, offset uint64) {
	if uint64(i) >= l.Pages() {
		return -1, 0
	}
	// The last block that starts at or before i. It has pages: a block without shares
	// its start with the next one, and at the end that start is past i.
	lo, hi := 0, len(l.blocks)-1
	for lo < hi {
		mid := int(uint(lo+hi+1) / 2)
		if l.starts[mid] <= i {
			lo = mid
		} else {
			hi = mid - 1
		}
	}
	return lo, uint64(i-l.starts[lo]) * Size
}

// Unit returns the host page that holds page i: its first page and how many it has.
// QEMU's post-copy takes the pages of a unit together. n is 0 for a page that does
// not exist.
func (l *Layout) Unit(i Index) (first Index, n uint64) {
	block, offset := l.Locate(i)
	if block < 0 {
		return 0, 0
	}
	b := l.blocks[block]
	return l.starts[block] + Index((offset&^(b.PageSize-1))/Size), b.PageSize / Size
}
