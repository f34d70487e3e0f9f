// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"bytes"
	"fmt"
	"io"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
	"scattergather.io/scattergather/internal/qemu/qemutest"
)

// story is what a generated source does, and what a decoder must tell of it.
type story struct {
	setup  *qemu.Setup
	stream []byte
	want   []string
}

// tell says an event in a line; data and payloads by their sum.
func tell(ev *qemu.Event) string {
	sum := func(p []byte) (s uint32) {
		for i, b := range p {
			s = s*31 + uint32(b) + uint32(i)
		}
		return s
	}
	switch ev.Kind {
	case qemu.EventPage:
		return fmt.Sprintf("page %d %#x %d", ev.Block, ev.Offset, sum(ev.Data))
	case qemu.EventZero:
		return fmt.Sprintf("zero %d %#x", ev.Block, ev.Offset)
	case qemu.EventCommand:
		if len(ev.Ranges) > 0 {
			return fmt.Sprintf("discard %d %x", ev.Block, ev.Ranges)
		}
		return fmt.Sprintf("%v %x", ev.Command, ev.Payload)
	case qemu.EventPackage, qemu.EventTail:
		return fmt.Sprintf("%v %d %d", ev.Kind, len(ev.Payload), sum(ev.Payload))
	}
	return ev.Kind.String()
}

func drawBlocks(t *rapid.T) []pages.Block {
	var blocks []pages.Block
	for i := range rapid.IntRange(1, 4).Draw(t, "blocks") {
		size := rapid.SampledFrom([]uint64{pages.Size, pages.Size, 2 << 20, 1 << 30}).Draw(t, "page size")
		n := rapid.Uint64Range(1, 5).Draw(t, "length")
		blocks = append(blocks, pages.Block{Name: fmt.Sprintf("block/%d", i), Length: n * size, PageSize: size})
	}
	return blocks
}

func drawOffset(t *rapid.T, b pages.Block) uint64 {
	return rapid.Uint64Range(0, b.Length/pages.Size-1).Draw(t, "page") * pages.Size
}

func drawStory(t *rapid.T) *story {
	postcopy := rapid.Bool().Draw(t, "postcopy")
	blocks := drawBlocks(t)
	if !postcopy {
		for i := range blocks {
			blocks[i].PageSize = pages.Size // a stream without ADVISE does not say
		}
	}
	s := &story{setup: qemutest.NewSetup(postcopy, blocks...)}
	src := qemutest.NewSource(s.setup)
	s.want = append(s.want, "setup")
	if postcopy {
		s.want = append(s.want, "OPEN_RETURN_PATH ", "PING 00000001",
			fmt.Sprintf("POSTCOPY_ADVISE %016x%016x", s.setup.RAM.PageSizes(), pages.Size))
	}
	s.want = append(s.want, "ram start")
	s.drawParts(t, src)
	device := append([]byte{4}, rapid.SliceOf(rapid.Byte()).Draw(t, "device")...)
	if !postcopy {
		src.EndPrecopy(device)
		s.want = append(s.want, "ram end", tell(&qemu.Event{Kind: qemu.EventTail, Payload: device}), "end")
		s.stream = src.Take()
		return s
	}
	if rapid.Bool().Draw(t, "discard") {
		b := rapid.IntRange(0, len(blocks)-1).Draw(t, "block")
		start := drawOffset(t, blocks[b])
		r := qemu.Range{Start: start, Length: blocks[b].Length - start}
		src.Discard(b, r)
		s.want = append(s.want, tell(&qemu.Event{Kind: qemu.EventCommand, Block: b, Ranges: []qemu.Range{r}}))
	}
	src.Switch(device, 3)
	s.want = append(s.want, "PING 00000002",
		tell(&qemu.Event{Kind: qemu.EventPackage, Payload: qemu.WrapTail(device, 3)}), "PING 00000004")
	s.drawParts(t, src)
	src.EndPostcopy()
	s.want = append(s.want, "ram end", "end")
	s.stream = src.Take()
	return s
}

func (s *story) drawParts(t *rapid.T, src *qemutest.Source) {
	for range rapid.IntRange(0, 3).Draw(t, "parts") {
		var list []qemutest.Page
		for range rapid.IntRange(0, 20).Draw(t, "pages") {
			b := rapid.IntRange(0, len(s.setup.RAM.Blocks)-1).Draw(t, "block")
			p := qemutest.Page{Block: b, Offset: drawOffset(t, s.setup.RAM.Blocks[b])}
			ev := qemu.Event{Kind: qemu.EventZero, Block: b, Offset: p.Offset}
			if rapid.Bool().Draw(t, "data") {
				p.Data = bytes.Repeat([]byte{rapid.Byte().Draw(t, "byte"), 1}, pages.Size/2)
				ev.Kind, ev.Data = qemu.EventPage, p.Data
			}
			list = append(list, p)
			s.want = append(s.want, tell(&ev))
		}
		src.Part(list...)
		s.want = append(s.want, "section end")
	}
}

// pieces reads in pieces of the sizes given, over and over.
type pieces struct {
	data  []byte
	sizes []int
	turn  int
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.data) == 0 {
		return 0, io.EOF
	}
	n := min(p.sizes[p.turn%len(p.sizes)], len(p.data), len(b))
	p.turn++
	copy(b, p.data[:n])
	p.data = p.data[n:]
	return n, nil
}

func TestDecoderTellsWhatSourceDid(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawStory(t)
		sizes := rapid.SliceOfN(rapid.IntRange(1, 100000), 1, 5).Draw(t, "pieces")
		d := qemu.NewDecoder(&pieces{data: s.stream, sizes: sizes}, qemu.DecoderOptions{BufferBytes: 1})
		var got []string
		var ev qemu.Event
		for {
			err := d.Next(&ev)
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, tell(&ev))
		}
		if diff := cmp.Diff(s.want, got); diff != "" {
			t.Fatalf("(-did +told)\n%s", diff)
		}
		if diff := cmp.Diff(s.setup, d.Setup(), cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("setup (-source's +decoder's)\n%s", diff)
		}
	})
}

func TestParseSetupInvertsAppendOpening(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := qemutest.NewSetup(true, drawBlocks(t)...)
		opening := qemu.AppendOpening(nil, want, 1)
		got, err := qemu.ParseSetup(opening)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("(-want +got)\n%s", diff)
		}
		if _, err := qemu.ParseSetup(append(opening, 0)); err == nil {
			t.Fatal("a byte behind the opening went unnoticed")
		}
		if _, err := qemu.ParseSetup(opening[:len(opening)-1]); err == nil {
			t.Fatal("a byte missing at the end went unnoticed")
		}
	})
}

func TestReturnPathRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		blocks := drawBlocks(t)
		for i := range blocks {
			blocks[i].Length = min(blocks[i].Length, 64<<20) // bitmaps of a sane size
		}
		var stream []byte
		var want []qemu.RPMessage
		last := -1
		for range rapid.IntRange(1, 20).Draw(t, "messages") {
			m := qemu.RPMessage{Type: qemu.RPType(rapid.IntRange(1, 7).Draw(t, "type"))}
			if m.Type == qemu.RPReqPages && last < 0 {
				m.Type = qemu.RPReqPagesID
			}
			stream, last = drawMessage(t, stream, &m, blocks, last)
			want = append(want, m)
		}
		d := qemu.NewRPDecoder(&pieces{data: stream, sizes: []int{rapid.IntRange(1, 5000).Draw(t, "piece")}}, blocks)
		for i := range want {
			var got qemu.RPMessage
			if err := d.Next(&got); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want[i], got); diff != "" {
				t.Fatalf("message %d (-want +got)\n%s", i, diff)
			}
		}
		if err := d.Next(&qemu.RPMessage{}); err != io.EOF {
			t.Fatalf("at the end: %v, want EOF", err)
		}
	})
}

// drawMessage fills in a message of the type given and appends it.
func drawMessage(t *rapid.T, dst []byte, m *qemu.RPMessage, blocks []pages.Block, last int) ([]byte, int) {
	value := rapid.Uint32().Draw(t, "value")
	block := rapid.IntRange(0, len(blocks)-1).Draw(t, "block")
	switch m.Type {
	case qemu.RPShut:
		m.Value = value
		return qemu.AppendShut(dst, value), last
	case qemu.RPPong:
		m.Value = value
		return qemu.AppendPong(dst, value), last
	case qemu.RPResumeAck:
		m.Value = 1
		return qemu.AppendResumeAck(dst), last
	case qemu.RPSwitchoverAck:
		return qemu.AppendSwitchoverAck(dst), last
	case qemu.RPRecvBitmap:
		m.Block = block
		m.Bitmap = make([]byte, (blocks[block].Length/pages.Size+63)/64*8)
		m.Bitmap[len(m.Bitmap)/2] = byte(value)
		return qemu.AppendRecvBitmapReply(dst, blocks[block].Name, m.Bitmap), last
	case qemu.RPReqPages:
		block = last
	}
	m.Block = block
	m.Start = drawOffset(t, blocks[block])
	m.Length = min(blocks[block].Length-m.Start, 2<<20)
	if m.Type == qemu.RPReqPages {
		return qemu.AppendReqPages(dst, m.Start, uint32(m.Length)), last
	}
	return qemu.AppendReqPagesID(dst, blocks[block].Name, m.Start, uint32(m.Length)), block
}
