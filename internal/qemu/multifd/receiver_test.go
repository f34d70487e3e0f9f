// SPDX-License-Identifier: Apache-2.0

package multifd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
)

// raw is a packet as a source would build it, or would not.
type raw struct {
	magic, version, flags, room, normal, size uint32
	num                                       uint64
	zero                                      uint32
	name                                      string
	offsets                                   []uint64
	data                                      []byte
}

func (p raw) bytes() []byte {
	b := make([]byte, headerBytes)
	for i, v := range []uint32{p.magic, p.version, p.flags, p.room, p.normal, p.size} {
		binary.BigEndian.PutUint32(b[4*i:], v)
	}
	binary.BigEndian.PutUint64(b[24:], p.num)
	binary.BigEndian.PutUint32(b[32:], p.zero)
	copy(b[namesAt:offsetsAt], p.name)
	for i, o := range p.offsets {
		binary.BigEndian.PutUint64(b[offsetsAt+8*i:], o)
	}
	return append(b, p.data...)
}

func hello(id byte) []byte {
	b := make([]byte, helloBytes)
	binary.BigEndian.PutUint32(b, Magic)
	binary.BigEndian.PutUint32(b[4:], version)
	copy(b[8:], "0123456789abcdef")
	b[24] = id
	return b
}

// twoPages has two pages with data and one of zeros, as QEMU 10.0 sends it.
func twoPages() raw {
	return raw{
		magic: Magic, version: version, flags: uint32(FlagSync), room: MaxPages, normal: 2, size: 2 * PageSize,
		num: 7, zero: 1, name: "pc.ram", offsets: []uint64{0x3000, 0x1000, 0x8000},
		data: append(bytes.Repeat([]byte{3}, PageSize), bytes.Repeat([]byte{1}, PageSize)...),
	}
}

// reader returns a receiver behind the hello of channel 5.
func reader(t *testing.T, r io.Reader) *Receiver {
	t.Helper()
	rx := NewReceiver(io.MultiReader(bytes.NewReader(hello(5)), r), Options{})
	h, err := rx.Hello()
	if err != nil {
		t.Fatal(err)
	}
	if want := (Hello{5, [16]byte([]byte("0123456789abcdef"))}); h != want {
		t.Fatalf("hello %v, want %v", h, want)
	}
	return rx
}

func TestPacketsAreRead(t *testing.T) {
	stale := raw{magic: Magic, version: version, room: MaxPages, size: 99, num: 9, name: "left over", offsets: []uint64{1}}
	empty := raw{magic: Magic, version: version, flags: uint32(FlagSync), num: 10}
	stream := append(append(twoPages().bytes(), stale.bytes()...), empty.bytes()...)
	for name, r := range map[string]io.Reader{
		"whole": bytes.NewReader(stream), "bytes": iotest.OneByteReader(bytes.NewReader(stream)),
		"late EOF": iotest.DataErrReader(bytes.NewReader(stream)),
	} {
		t.Run(name, func(t *testing.T) {
			rx := reader(t, r)
			var p Packet
			if err := rx.Next(&p); err != nil {
				t.Fatal(err)
			}
			want := Packet{Num: 7, Flags: FlagSync, BlockName: "pc.ram", Normal: []uint64{0x3000, 0x1000}, Zero: []uint64{0x8000}}
			if diff := cmp.Diff(want, p); diff != "" || !p.Flags.Sync() {
				t.Error(diff)
			}
			for _, o := range p.Normal {
				page, err := rx.Page()
				if err != nil || !bytes.Equal(page, bytes.Repeat([]byte{byte(o >> 12)}, PageSize)) {
					t.Fatalf("page %#x: %v", o, err)
				}
			}
			if _, err := rx.Page(); err == nil {
				t.Error("a third page of two")
			}
			for _, want := range []Packet{{Num: 9}, {Num: 10, Flags: FlagSync}} {
				if err := rx.Next(&p); err != nil || len(p.Normal)+len(p.Zero) > 0 || p.BlockName != "" || p.Num != want.Num || p.Flags != want.Flags {
					t.Errorf("%+v, %v, want %+v", p, err, want)
				}
			}
			for range 2 {
				if err := rx.Next(&p); err != io.EOF {
					t.Errorf("at the end: %v", err)
				}
			}
		})
	}
}

func TestBadPacketsAreNamed(t *testing.T) {
	for _, tc := range []struct {
		change      func(*raw)
		says        string
		unsupported bool
	}{
		{func(p *raw) { p.magic = 0x5145564d }, "magic 0x5145564d instead of 0x11223344", false},
		{func(p *raw) { p.version = 2 }, "version 2, known is 1", true},
		{func(p *raw) { p.flags |= 1 << 1 }, "zlib", true},
		{func(p *raw) { p.flags |= 2 << 1 }, "zstd", true},
		{func(p *raw) { p.flags |= 4 << 1 }, "qpl", true},
		{func(p *raw) { p.flags |= 8 << 1 }, "uadk", true},
		{func(p *raw) { p.flags |= 16 << 1 }, "qatzip", true},
		{func(p *raw) { p.flags |= 3 << 1 }, "0x6", true},
		{func(p *raw) { p.flags = 32 << 1 }, "device state", true},
		{func(p *raw) { p.flags |= 1 << 31 }, "unknown flags 0x80000000", true},
		{func(p *raw) { p.room = MaxPages + 1 }, "room for 129 pages, the most is 128", false},
		{func(p *raw) { p.room = 1 }, "2 pages and 1 of zeros with room for 1", false},
		{func(p *raw) { p.normal = 1<<32 - 1 }, "4294967295 pages", false},
		{func(p *raw) { p.zero = 1<<32 - 1 }, "4294967295 of zeros", false},
		{func(p *raw) { p.size-- }, "8191 bytes of data for 2 pages", false},
		{func(p *raw) { p.name = "" }, "without a block name", false},
		{func(p *raw) { p.name = strings.Repeat("n", 256) }, "has no end", false},
		{func(p *raw) { p.offsets[1]++ }, "page 1 at offset 0x1001", false},
		{func(p *raw) { p.offsets[2] = 1 << 63 }, "page 0 at offset 0x8000000000000000", false},
	} {
		bad := twoPages()
		tc.change(&bad)
		rx := reader(t, bytes.NewReader(bad.bytes()))
		var p Packet
		err := rx.Next(&p)
		if err == nil || !strings.Contains(err.Error(), tc.says) || errors.Is(err, errors.ErrUnsupported) != tc.unsupported {
			t.Errorf("error %v, want %q, unsupported: %v", err, tc.says, tc.unsupported)
		}
		if again := rx.Next(&p); again != err {
			t.Errorf("the error is not final: %v", again)
		}
		if _, again := rx.Page(); again != err {
			t.Errorf("the error is not final: %v", again)
		}
	}
}

// A packet of device state is shorter than one of pages, and may be the last.
func TestDeviceStateIsNamedThoughShort(t *testing.T) {
	short := raw{magic: Magic, version: version, flags: uint32(flagDeviceState)}.bytes()[:276]
	var p Packet
	if err := reader(t, bytes.NewReader(short)).Next(&p); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("error %v", err)
	}
}

func TestTornChannelIsNamed(t *testing.T) {
	whole := twoPages().bytes()
	for _, n := range []int{1, 11, 12, 700, headerBytes, headerBytes + 1, len(whole) - 1} {
		rx := reader(t, bytes.NewReader(whole[:n]))
		var p Packet
		err := rx.Next(&p)
		for err == nil {
			_, err = rx.Page()
		}
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut at %d: %v", n, err)
		}
	}
	for n := range hello(0) {
		if _, err := NewReceiver(bytes.NewReader(hello(0)[:n]), Options{}).Hello(); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("hello cut at %d: %v", n, err)
		}
	}
	broken := errors.New("broken")
	var p Packet
	if err := reader(t, iotest.ErrReader(broken)).Next(&p); !errors.Is(err, broken) {
		t.Errorf("error %v", err)
	}
}

func TestMisuseIsAnError(t *testing.T) {
	var p Packet
	if err := NewReceiver(bytes.NewReader(hello(0)), Options{}).Next(&p); err == nil {
		t.Error("a packet before the hello")
	}
	rx := reader(t, bytes.NewReader(append(twoPages().bytes(), twoPages().bytes()...)))
	if err := rx.Next(&p); err != nil {
		t.Fatal(err)
	}
	if _, err := rx.Page(); err != nil {
		t.Fatal(err)
	}
	if err := rx.Next(&p); err == nil || !strings.Contains(err.Error(), "1 pages of the one before") {
		t.Errorf("pages were lost silently: %v", err)
	}
	if _, err := NewReceiver(strings.NewReader(strings.Repeat("QEVM", 16)), Options{}).Hello(); err == nil {
		t.Error("the main connection passes for a channel")
	}
}

func TestBlockNamesAreBounded(t *testing.T) {
	var stream bytes.Buffer
	for i := range maxBlocks + 1 {
		stream.Write(raw{magic: Magic, version: version, room: 1, zero: 1, name: string(rune('a' + i))}.bytes())
	}
	rx := reader(t, &stream)
	var p Packet
	for range maxBlocks {
		if err := rx.Next(&p); err != nil {
			t.Fatal(err)
		}
	}
	if err := rx.Next(&p); err == nil || !strings.Contains(err.Error(), "4096 different block names") {
		t.Errorf("error %v", err)
	}
}

// endless repeats one packet.
type endless struct {
	packet []byte
	at     int
}

func (e *endless) Read(p []byte) (int, error) {
	n := copy(p, e.packet[e.at:])
	e.at = (e.at + n) % len(e.packet)
	return n, nil
}

func fullPacket() []byte {
	p := raw{magic: Magic, version: version, room: MaxPages, normal: 100, size: 100 * PageSize, zero: 28, name: "pc.ram"}
	for i := range MaxPages {
		p.offsets = append(p.offsets, uint64(i)*PageSize)
	}
	p.data = make([]byte, 100*PageSize)
	return p.bytes()
}

func TestPacketsAllocateNothing(t *testing.T) {
	rx := reader(t, &endless{packet: fullPacket()})
	var p Packet
	packet := func() {
		if err := rx.Next(&p); err != nil {
			t.Fatal(err)
		}
		for range p.Normal {
			if _, err := rx.Page(); err != nil {
				t.Fatal(err)
			}
		}
	}
	packet()
	if n := testing.AllocsPerRun(100, packet); n != 0 {
		t.Errorf("%v allocations a packet", n)
	}
}
