// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
	"scattergather.io/scattergather/internal/qemu/qemutest"
)

// seedStreams returns small streams: the beginnings of recorded ones, up to
// their first pages, and whole ones of generated sources.
func seedStreams(tb testing.TB) [][]byte {
	var seeds [][]byte
	for name := range wantRecorded() {
		stream := recorded(tb, name)
		seeds = append(seeds, stream[:min(len(stream), 600)])
	}
	for _, name := range []string{"block-7.2", "compress-7.2", "dirty-bitmaps-10.0", "ignore-shared-10.0"} {
		seeds = append(seeds, recorded(tb, "refused-"+name))
	}
	setup := qemutest.NewSetup(true, pages.Block{Name: "m", Length: 8 << 20, PageSize: 2 << 20}, pages.Block{Name: "r", Length: 4096, PageSize: 4096})
	setup.Early = recordedEarly(tb)
	s := qemutest.NewSource(setup)
	s.Part(qemutest.Page{Block: 0, Offset: 4096}, qemutest.Page{Block: 1, Data: make([]byte, 4096)}, qemutest.Page{Block: 1})
	s.Discard(0, qemu.Range{Start: 0, Length: 2 << 20}, qemu.Range{Start: 4 << 20, Length: 2 << 20})
	s.Switch([]byte("\x04device\x7e\x00\x00\x00\x02"), 3, 0x42)
	s.Part(qemutest.Page{Block: 0, Offset: 4096})
	s.EndPostcopy()
	seeds = append(seeds, s.Take())
	s = qemutest.NewSource(qemutest.NewSetup(false, pages.Block{Name: "m", Length: 8 << 20, PageSize: 4096}))
	s.Part(qemutest.Page{Offset: 4096})
	s.EndPrecopy([]byte("\x04device\x00\x06\x7e\x00\x00\x00\x02"))
	return append(seeds, s.Take())
}

// checkEvent fails if an event is not what its documentation says.
func checkEvent(t *testing.T, d *qemu.Decoder, ev *qemu.Event) {
	t.Helper()
	blocks := d.Setup().RAM.Blocks
	inside := func(start, length uint64) {
		if ev.Block < 0 || ev.Block >= len(blocks) {
			t.Fatalf("%v of block %d of %d", ev.Kind, ev.Block, len(blocks))
		}
		if n := blocks[ev.Block].Length; start%pages.Size != 0 || length%pages.Size != 0 || length == 0 || start >= n || length > n-start {
			t.Fatalf("%v at %#x+%#x of a block of %#x bytes", ev.Kind, start, length, n)
		}
	}
	switch ev.Kind {
	case qemu.EventPage:
		inside(ev.Offset, pages.Size)
		if len(ev.Data) != pages.Size {
			t.Fatalf("page of %d bytes", len(ev.Data))
		}
	case qemu.EventZero:
		inside(ev.Offset, pages.Size)
	case qemu.EventCommand:
		if ev.Command == qemu.CommandPostcopyDiscard && len(ev.Ranges) == 0 {
			t.Fatal("discard of nothing")
		}
		for _, r := range ev.Ranges {
			inside(r.Start, r.Length)
		}
	case qemu.EventRAMStart:
		checkBlocks(t, blocks)
	case qemu.EventSetup, qemu.EventSectionEnd, qemu.EventSync, qemu.EventRAMEnd, qemu.EventPackage, qemu.EventTail, qemu.EventEnd:
	default:
		t.Fatalf("unknown %v", ev.Kind)
	}
}

func checkBlocks(t *testing.T, blocks []pages.Block) {
	for i, b := range blocks {
		if b.Name == "" || b.Length == 0 || b.Length%pages.Size != 0 || b.PageSize < pages.Size || b.PageSize&(b.PageSize-1) != 0 {
			t.Fatalf("block %+v", b)
		}
		if slices.ContainsFunc(blocks[:i], func(o pages.Block) bool { return o.Name == b.Name }) {
			t.Fatalf("block %q twice", b.Name)
		}
	}
}

// FuzzDecoder reads a stream whole and byte by byte: events must be legal, and
// the same. Only where a tail ends depends on how the bytes arrive.
func FuzzDecoder(f *testing.F) {
	for _, s := range seedStreams(f) {
		f.Add(s, false)
		f.Add(s, true)
	}
	f.Fuzz(func(t *testing.T, stream []byte, multifd bool) {
		opt := qemu.DecoderOptions{Multifd: multifd, BufferBytes: 1}
		whole := qemu.NewDecoder(bytes.NewReader(stream), opt)
		parts := qemu.NewDecoder(iotest.OneByteReader(bytes.NewReader(stream)), opt)
		var a, b qemu.Event
		for {
			errA, errB := whole.Next(&a), parts.Next(&b)
			if errA == nil {
				checkEvent(t, whole, &a)
			}
			if errB == nil {
				checkEvent(t, parts, &b)
			}
			if a.Kind == qemu.EventTail || b.Kind == qemu.EventTail {
				return
			}
			if (errA == nil) != (errB == nil) || errA != nil && errA.Error() != errB.Error() {
				if errA != nil && strings.Contains(errA.Error(), "device state") || errB != nil && strings.Contains(errB.Error(), "device state") {
					return // of a tail
				}
				t.Fatalf("whole: %v, byte by byte: %v", errA, errB)
			}
			if errA != nil {
				return
			}
			if x, y := tell(&a), tell(&b); x != y || whole.Offset() != parts.Offset() {
				t.Fatalf("whole: %s at %d, byte by byte: %s at %d", x, whole.Offset(), y, parts.Offset())
			}
		}
	})
}

// FuzzParseSetup wants what was parsed to be built again alike.
func FuzzParseSetup(f *testing.F) {
	setup := qemutest.NewSetup(true, pages.Block{Name: "m", Length: 8 << 20, PageSize: 2 << 20}, pages.Block{Name: "r", Length: 4096, PageSize: 4096})
	f.Add(qemu.AppendOpening(nil, setup, 1))
	setup.Early = recordedEarly(f)
	f.Add(qemu.AppendOpening(nil, setup, 1))
	f.Fuzz(func(t *testing.T, opening []byte) {
		s, err := qemu.ParseSetup(opening)
		if err != nil || !s.Postcopy {
			return
		}
		checkBlocks(t, s.RAM.Blocks)
		again := qemu.AppendOpening(nil, s, 1)
		s2, err := qemu.ParseSetup(again)
		if err != nil {
			t.Fatalf("what was parsed does not parse when built: %v", err)
		}
		if !bytes.Equal(again, qemu.AppendOpening(nil, s2, 1)) {
			t.Fatal("built twice, and not alike")
		}
	})
}

func FuzzParseDiscard(f *testing.F) {
	payload := func(b []byte) []byte { return b[5:] }
	f.Add(payload(qemu.AppendDiscard(nil, "pc.ram", []qemu.Range{{Start: 0, Length: 4096}, {Start: 1 << 30, Length: 2 << 20}})))
	f.Add([]byte("\x00\x06pc.ram\x00"))
	f.Fuzz(func(t *testing.T, p []byte) {
		name, ranges, err := qemu.ParseDiscard(p)
		if err != nil {
			return
		}
		if len(ranges) == 0 || 16*len(ranges) > len(p) {
			t.Fatalf("%d ranges from %d bytes", len(ranges), len(p))
		}
		for _, r := range ranges {
			if r.Length == 0 || r.Start+r.Length < r.Start {
				t.Fatalf("range %x", r)
			}
		}
		if again := qemu.AppendDiscard(nil, name, ranges); len(ranges) <= 12 && !bytes.Equal(payload(again), p) {
			t.Fatalf("%x became %x", p, again)
		}
	})
}

func FuzzPackagePings(f *testing.F) {
	f.Add(qemu.WrapTail([]byte("device"), 3))
	f.Add(qemu.WrapTail(qemu.AppendPing(nil, 0x42), 3))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, pkg []byte) {
		pings, err := qemu.PackagePings(pkg)
		if err != nil {
			return
		}
		tail := []byte{}
		for _, p := range pings {
			tail = qemu.AppendPing(tail, p)
		}
		tail = qemu.AppendCommand(tail, qemu.CommandPostcopyRun, nil)
		if !bytes.HasSuffix(pkg, tail) {
			t.Fatalf("%x does not end with pings %x", pkg, pings)
		}
	})
}

// FuzzTail gives a source's device state in two pieces.
func FuzzTail(f *testing.F) {
	f.Add([]byte("device\x00\x06\x00\x00\x00\x02{}"), 3)
	f.Add([]byte("\x00\x06\x00\x00\x00\x30{\x00\x06\x00\x00\x00\x02{}"), 8)
	real := recorded(f, "multifd-7.2")
	f.Add(real[len(real)-1000:], 100)
	f.Fuzz(func(t *testing.T, tail []byte, cut int) {
		begin := untilTail()
		r := &pieces{data: append(begin, tail...), sizes: []int{len(begin), max(1, cut), 1 << 20}}
		d := qemu.NewDecoder(r, qemu.DecoderOptions{MaxTail: 1 << 16})
		var ev qemu.Event
		for ev.Kind != qemu.EventTail {
			if err := d.Next(&ev); err != nil {
				return
			}
		}
		n := len(ev.Payload)
		if !bytes.HasPrefix(tail, ev.Payload) || !bytes.HasPrefix(tail[n:], []byte("\x00\x06")) || tail[n+6] != '{' {
			t.Fatalf("tail %q of %q", ev.Payload, tail)
		}
		if err := d.Next(&ev); err != nil || ev.Kind != qemu.EventEnd {
			t.Fatalf("behind the tail: %v %v", ev.Kind, err)
		}
	})
}

func FuzzReturnPath(f *testing.F) {
	for _, name := range []string{"postcopy-7.2", "postcopy-hugepages-10.0"} {
		f.Add(recorded(f, "returnpath-"+name))
	}
	f.Add(qemu.AppendReqPages(qemu.AppendReqPagesID(nil, "pc.rom", 0, 4096), 8192, 4096))
	f.Add(qemu.AppendSwitchoverAck(qemu.AppendResumeAck(qemu.AppendRecvBitmapReply(nil, "pc.rom", make([]byte, 9)))))
	f.Fuzz(func(t *testing.T, stream []byte) {
		whole := qemu.NewRPDecoder(bytes.NewReader(stream), rpBlocks)
		parts := qemu.NewRPDecoder(iotest.OneByteReader(bytes.NewReader(stream)), rpBlocks)
		var a, b qemu.RPMessage
		for {
			errA, errB := whole.Next(&a), parts.Next(&b)
			if (errA == nil) != (errB == nil) || errA != nil && errA.Error() != errB.Error() {
				t.Fatalf("whole: %v, byte by byte: %v", errA, errB)
			}
			if errA != nil {
				return
			}
			if a.Type != b.Type || a.Value != b.Value || a.Block != b.Block || a.Start != b.Start || a.Length != b.Length || !bytes.Equal(a.Bitmap, b.Bitmap) {
				t.Fatalf("whole: %+v, byte by byte: %+v", a, b)
			}
			if a.Block < 0 || a.Block >= len(rpBlocks) || a.Start+a.Length > rpBlocks[a.Block].Length {
				t.Fatalf("%+v is outside", a)
			}
		}
	})
}
