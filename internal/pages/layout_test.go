// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func mustLayout(t testing.TB, blocks ...Block) *Layout {
	t.Helper()
	l, err := NewLayout(blocks)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// flat returns a layout of one block of n pages.
func flat(t testing.TB, n uint64) *Layout {
	t.Helper()
	return mustLayout(t, Block{Name: "pc.ram", Length: n * Size, PageSize: Size})
}

func TestNewLayoutRefuses(t *testing.T) {
	many := make([]Block, MaxBlocks+1)
	for i := range many {
		many[i] = Block{Name: fmt.Sprint(i), Length: Size, PageSize: Size}
	}
	for _, c := range []struct {
		name   string
		blocks []Block
		want   string
	}{
		{"no blocks", nil, "0 blocks"},
		{"too many blocks", many, "4097 blocks"},
		{"no name", []Block{{"", Size, Size}}, "name of 0 bytes"},
		{"long name", []Block{{strings.Repeat("x", 256), Size, Size}}, "name of 256 bytes"},
		{"name cut by C", []Block{{"a\x00b", Size, Size}}, "zero byte"},
		{"twice the name", []Block{{"a", Size, Size}, {"b", Size, Size}, {"a", Size, Size}}, `blocks 0 and 2 are both named "a"`},
		{"part of a page", []Block{{"a", Size + 1, Size}}, "4097 bytes are no multiple"},
		{"part of a huge page", []Block{{"a", 3 << 20, 2 << 20}}, "no multiple"},
		{"small host page", []Block{{"a", Size, 2048}}, "host pages of 2048"},
		{"odd host page", []Block{{"a", 3 * Size, 3 * Size}}, "host pages of 12288"},
		{"host page 0", []Block{{"a", Size, 0}}, "host pages of 0"},
		{"a block too large", []Block{{"a", MaxBytes + Size, Size}}, "at most"},
		{"a block as large as can be told", []Block{{"a", ^uint64(0) - 4095, Size}}, "at most"},
		{"too large together", []Block{{"a", MaxBytes, Size}, {"b", Size, Size}}, `up to "b"`},
		{"no pages", []Block{{"a", 0, Size}}, "no block holds a page"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := NewLayout(c.blocks)
			if !errors.Is(err, ErrLayout) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want ErrLayout with %q", err, c.want)
			}
		})
	}
}

func TestLayoutOfAVM(t *testing.T) {
	blocks := []Block{
		{"pc.ram", 4 << 20, 2 << 20},
		{"empty", 0, Size},
		{"pc.bios", 3 * Size, Size},
		{"tail", 0, 1 << 30},
	}
	l := mustLayout(t, blocks...)
	if l.Pages() != 1027 || l.Bytes() != 1027*Size {
		t.Errorf("%d pages, %d bytes", l.Pages(), l.Bytes())
	}
	if diff := cmp.Diff(blocks, l.Blocks()); diff != "" {
		t.Error(diff)
	}
	if b, offset := l.Locate(1024); b != 2 || offset != 0 {
		t.Errorf("page 1024 at block %d, offset %d", b, offset)
	}
	if first, n := l.Unit(700); first != 512 || n != 512 {
		t.Errorf("unit of page 700: %d, %d", first, n)
	}
	if first, n := l.Extent(2); first != 1024 || n != 3 {
		t.Errorf("extent of the bios: %d, %d", first, n)
	}
	if b, ok := l.Lookup("pc.bios"); !ok || b != 2 {
		t.Errorf("lookup: %d %v", b, ok)
	}
	if _, ok := l.Lookup("pc"); ok {
		t.Error("found a block that is not there")
	}
}

func genLayout(t *rapid.T) *Layout {
	n := rapid.IntRange(1, 8).Draw(t, "blocks")
	blocks := make([]Block, n)
	for i := range blocks {
		size := uint64(Size) << rapid.IntRange(0, 9).Draw(t, "order")
		blocks[i] = Block{
			Name:     fmt.Sprintf("block%d", i),
			PageSize: size,
			Length:   size * rapid.Uint64Range(0, 5).Draw(t, "units"),
		}
	}
	blocks[0].Length += blocks[0].PageSize
	l, err := NewLayout(blocks)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestLayoutNumbersPagesInOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := genLayout(t)
		next := Index(0)
		for b, block := range l.Blocks() {
			first, n := l.Extent(b)
			if first != next || n != block.Length/Size {
				t.Fatalf("extent of block %d: %d, %d; want from %d", b, first, n, next)
			}
			for offset := uint64(0); offset < block.Length; offset += Size {
				i, err := l.Index(b, offset)
				if err != nil || i != next {
					t.Fatalf("block %d offset %d: page %d, %v; want %d", b, offset, i, err, next)
				}
				if gb, goff := l.Locate(i); gb != b || goff != offset {
					t.Fatalf("page %d: block %d offset %d; want %d, %d", i, gb, goff, b, offset)
				}
				want := first + Index(offset/block.PageSize*(block.PageSize/Size))
				if u, un := l.Unit(i); u != want || un != block.PageSize/Size {
					t.Fatalf("unit of page %d: %d, %d; want %d, %d", i, u, un, want, block.PageSize/Size)
				}
				next++
			}
		}
		if uint64(next) != l.Pages() {
			t.Fatalf("%d pages, Pages says %d", next, l.Pages())
		}
	})
}

func TestLayoutOutside(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := genLayout(t)
		b := rapid.IntRange(-2, 10).Draw(t, "block")
		offset := rapid.OneOf(rapid.Uint64(), rapid.Uint64Range(0, 1<<16)).Draw(t, "offset")
		inside := b >= 0 && b < len(l.Blocks()) && offset < l.Blocks()[b].Length && offset%Size == 0
		if _, err := l.Index(b, offset); (err == nil) != inside || err != nil && !errors.Is(err, ErrRange) {
			t.Fatalf("Index(%d, %#x): %v", b, offset, err)
		}
		i := Index(l.Pages() + rapid.OneOf(rapid.Uint64Range(0, 3), rapid.Uint64Range(0, 1<<60)).Draw(t, "past"))
		if b, _ := l.Locate(i); b != -1 {
			t.Fatalf("Locate(%d) of %d pages: block %d", i, l.Pages(), b)
		}
		if _, n := l.Unit(i); n != 0 {
			t.Fatalf("Unit(%d) of %d pages: %d pages", i, l.Pages(), n)
		}
		if first, n := l.Extent(len(l.Blocks())); first != 0 || n != 0 {
			t.Fatalf("extent past the last block: %d, %d", first, n)
		}
	})
}
