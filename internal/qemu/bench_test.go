// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"bytes"
	"testing"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
	"scattergather.io/scattergather/internal/qemu/qemutest"
)

// manyPages returns a stream of n pages of one block, and its setup.
func manyPages(n uint64) (opening, part []byte, setup *qemu.Setup) {
	setup = qemutest.NewSetup(true, pages.Block{Name: "pc.ram", Length: n * pages.Size, PageSize: pages.Size})
	s := qemutest.NewSource(setup)
	opening = s.Take()
	data := bytes.Repeat([]byte{0xa5}, pages.Size)
	list := make([]qemutest.Page, n)
	for i := range list {
		list[i] = qemutest.Page{Offset: uint64(i) * pages.Size, Data: data}
	}
	s.Part(list...)
	return opening, s.Take(), setup
}

// endless repeats a section for ever.
type endless struct {
	first, again []byte
	rest         []byte
}

func (e *endless) Read(p []byte) (int, error) {
	if len(e.rest) == 0 {
		e.rest, e.first = e.first, nil
		if len(e.rest) == 0 {
			e.rest = e.again
		}
	}
	n := copy(p, e.rest)
	e.rest = e.rest[n:]
	return n, nil
}

func newEndless(n uint64) *endless {
	opening, part, _ := manyPages(n)
	return &endless{first: opening, again: part}
}

func nextPage(tb testing.TB, d *qemu.Decoder, ev *qemu.Event) {
	for {
		if err := d.Next(ev); err != nil {
			tb.Fatal(err)
		}
		if ev.Kind == qemu.EventPage {
			return
		}
	}
}

func BenchmarkDecodePages(b *testing.B) {
	d := qemu.NewDecoder(newEndless(1024), qemu.DecoderOptions{})
	var ev qemu.Event
	b.SetBytes(pages.Size)
	b.ReportAllocs()
	for b.Loop() {
		nextPage(b, d, &ev)
	}
}

func BenchmarkEncodePages(b *testing.B) {
	data := make([]byte, pages.Size)
	dst := make([]byte, 0, 1<<20)
	var st qemu.PageState
	var offset uint64
	b.SetBytes(pages.Size)
	b.ReportAllocs()
	for b.Loop() {
		if cap(dst)-len(dst) < 2*pages.Size {
			dst = dst[:0]
		}
		dst = qemu.AppendPage(dst, &st, "pc.ram", 0, offset, data)
		offset += pages.Size
	}
}

func BenchmarkEncodeHeaders(b *testing.B) {
	dst := make([]byte, 0, 1<<16)
	var st qemu.PageState
	b.ReportAllocs()
	for b.Loop() {
		dst = qemu.AppendPageHeader(dst[:0], &st, "pc.ram", 0, 0x1000)
	}
}

func TestPagesAllocateNothing(t *testing.T) {
	d := qemu.NewDecoder(newEndless(64), qemu.DecoderOptions{})
	var ev qemu.Event
	nextPage(t, d, &ev)
	if n := testing.AllocsPerRun(1000, func() { nextPage(t, d, &ev) }); n != 0 {
		t.Errorf("decoding a page allocates %v times, want 0", n)
	}
	data := make([]byte, pages.Size)
	dst := make([]byte, 0, 1<<16)
	var st qemu.PageState
	if n := testing.AllocsPerRun(1000, func() {
		dst = qemu.AppendPartStart(dst[:0], 1)
		dst = qemu.AppendPage(dst, &st, "pc.ram", 0, 0, data)
		dst = qemu.AppendZero(dst, &st, "pc.rom", 1, 0)
		dst = qemu.AppendPartEnd(dst, 1)
		dst = qemu.AppendPing(dst, 7)
	}); n != 0 {
		t.Errorf("encoding a section allocates %v times, want 0", n)
	}
	request := qemu.AppendReqPagesID(nil, "pc.ram", 0, pages.Size)
	rp := qemu.NewRPDecoder(&endless{again: request}, []pages.Block{{Name: "pc.ram", Length: 1 << 20, PageSize: pages.Size}})
	var m qemu.RPMessage
	if n := testing.AllocsPerRun(1000, func() {
		if err := rp.Next(&m); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("decoding a request allocates %v times, want 0", n)
	}
}
