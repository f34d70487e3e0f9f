// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
	"scattergather.io/scattergather/internal/qemu/qemutest"
)

// decodeAll reads a stream to its end and returns what was told.
func decodeAll(r io.Reader, o qemu.DecoderOptions) ([]string, error) {
	d := qemu.NewDecoder(r, o)
	var told []string
	var ev qemu.Event
	for {
		err := d.Next(&ev)
		if err == io.EOF {
			return told, nil
		}
		if err != nil {
			return told, err
		}
		told = append(told, tell(&ev))
	}
}

func be64(v ...uint64) (out []byte) {
	for _, x := range v {
		out = binary.BigEndian.AppendUint64(out, x)
	}
	return out
}

func join(parts ...any) []byte {
	var out []byte
	for _, p := range parts {
		switch p := p.(type) {
		case []byte:
			out = append(out, p...)
		case string:
			out = append(out, p...)
		}
	}
	return out
}

// section is the header of a START or FULL of section 1, instance 0.
func section(kind byte, name string, version byte) []byte {
	return join([]byte{kind, 0, 0, 0, 1, byte(len(name))}, name, []byte{0, 0, 0, 0, 0, 0, 0, version})
}

// malformed are streams and what their error must say. They begin with a
// configuration; in those of the second half also with the START of a RAM
// section with one block "ram0" of 1 MiB. Unsupported ones must wrap
// ErrUnsupported, the others must not.
var malformed = []struct {
	name        string
	advised     bool // POSTCOPY_ADVISE(4096 and 2 MiB) came before
	started     bool // the START of the RAM section came before
	rest        []byte
	says        string
	unsupported bool
}{
	{name: "slirp", rest: section(1, "slirp", 4), says: `"slirp"`, unsupported: true},
	{name: "vfio", rest: section(1, "0000:00:05.0/vfio", 1), says: "detach the vfio device", unsupported: true},
	{name: "full section", rest: section(4, "cpu", 1), says: `"cpu"`, unsupported: true},
	{name: "early of newer version", rest: section(4, "virtio-mem-device-early", 2), says: "version 2", unsupported: true},
	{name: "early of no blocks", rest: join(section(4, "virtio-mem-device-early", 1), make([]byte, 36)), says: "blocks of 0"},
	{name: "early of endless blocks", rest: join(section(4, "virtio-mem-device-early", 1), be64(0, 1<<40, 1), make([]byte, 12)), says: "the most is"},
	{name: "ram of version 3", rest: section(1, "ram", 3), says: "version 3", unsupported: true},
	{name: "no name", rest: section(1, "", 4), says: "is not a name"},
	{name: "name with a line end", rest: section(1, "r\nm", 4), says: "is not a name"},
	{name: "no size", rest: join(section(1, "ram", 4), be64(0x1000)), says: "instead of the memory's size"},
	{name: "size of nothing", rest: join(section(1, "ram", 4), be64(4)), says: "instead of the memory's size"},
	{name: "size of everything", rest: join(section(1, "ram", 4), be64(1<<62|4)), says: "instead of the memory's size"},
	{name: "block larger than all", rest: join(section(1, "ram", 4), be64(0x1004), "\x01a", be64(0x2000)), says: "of the total"},
	{name: "block of part of a page", rest: join(section(1, "ram", 4), be64(0x1004), "\x01a", be64(0x800)), says: "of the total"},
	{name: "empty block", rest: join(section(1, "ram", 4), be64(0x1004), "\x01a", be64(0)), says: "of the total"},
	{name: "block twice", rest: join(section(1, "ram", 4), be64(0x2004), "\x01a", be64(0x1000), "\x01a", be64(0x1000)), says: "twice"},
	{name: "page size without advise", rest: join(section(1, "ram", 4), be64(0x200004), "\x01a", be64(0x200000, 0x200000, 0x10)), says: "behind the block table"},
	{name: "page size of nobody", advised: true, rest: join(section(1, "ram", 4), be64(0x200004), "\x01a", be64(0x200000, 0x40000000, 0x10)), says: "POSTCOPY_ADVISE said"},
	{name: "page size not advised", advised: true, rest: join(section(1, "ram", 4), be64(0x1004), "\x01a", be64(0x1000, 0x10)), says: "POSTCOPY_ADVISE said"},
	{name: "garbage behind the table", rest: join(section(1, "ram", 4), be64(0x1004), "\x01a", be64(0x1000, 0x33)), says: "behind the block table"},
	{name: "flush in the table", rest: join(section(1, "ram", 4), be64(0x1004), "\x01a", be64(0x1000, 0x200)), says: "multifd", unsupported: true},
	{name: "no footer", rest: join(section(1, "ram", 4), be64(0x1004), "\x01a", be64(0x1000, 0x10), "\x02\x00\x00\x00\x01"), says: "no footer"},
	{name: "part before start", rest: []byte{2, 0, 0, 0, 1}, says: "unexpected item"},
	{name: "end before start", rest: []byte{0}, says: "unexpected item"},
	{name: "discard before start", advised: true, rest: qemu.AppendDiscard(nil, "ram0", []qemu.Range{{Start: 0, Length: 4096}}), says: "not between"},
	{name: "package before start", advised: true, rest: qemu.AppendPackage(nil, []byte{1}), says: "not behind"},
	{name: "command 12", rest: []byte{8, 0, 12, 0, 0}, says: "newer QEMU", unsupported: true},
	{name: "command 0", rest: []byte{8, 0, 0, 0, 0}, says: "newer QEMU", unsupported: true},
	{name: "colo", rest: []byte{8, 0, 8, 0, 0}, says: "x-colo", unsupported: true},
	{name: "long ping", rest: []byte{8, 0, 2, 0, 5, 1, 2, 3, 4, 5}, says: "PING with 5 bytes"},
	{name: "naked listen", rest: []byte{8, 0, 4, 0, 0}, says: "outside a package"},
	{name: "naked run", rest: []byte{8, 0, 5, 0, 0}, says: "outside a package"},
	{name: "resume", rest: []byte{8, 0, 9, 0, 0}, says: "resumed"},
	{name: "advise of dirty bitmaps", rest: []byte{8, 0, 3, 0, 0}, says: "dirty-bitmaps off", unsupported: true},
	{name: "advise of 8 bytes", rest: join([]byte{8, 0, 3, 0, 8}, be64(4096)), says: "it has 16"},
	{name: "advise twice", advised: true, rest: qemu.AppendAdvise(nil, 4096, 4096), says: "twice"},
	{name: "advise of 64 KiB pages", rest: qemu.AppendAdvise(nil, 65536, 65536), says: "x86-64", unsupported: true},
	{name: "advise of small pages", rest: qemu.AppendAdvise(nil, 512, 4096), says: "impossible page sizes"},
	{name: "advise of no pages", rest: qemu.AppendAdvise(nil, 0, 4096), says: "impossible page sizes"},

	{name: "start again", started: true, rest: section(1, "ram", 4), says: "in the middle"},
	{name: "device among pages", started: true, rest: join([]byte{2, 0, 0, 0, 1}, be64(0x10), "\x7e\x00\x00\x00\x01", section(4, "cpu", 1)), says: `"cpu"`, unsupported: true},
	{name: "unknown section", started: true, rest: []byte{2, 0, 0, 0, 9}, says: "section 9 was never started"},
	{name: "continue from nothing", started: true, rest: join([]byte{2, 0, 0, 0, 1}, be64(0x28)), says: "names no block"},
	{name: "unknown block", started: true, rest: join([]byte{2, 0, 0, 0, 1}, be64(0x8), "\x04ram1"), says: `"ram1"`},
	{name: "page outside", started: true, rest: join([]byte{2, 0, 0, 0, 1}, be64(0x100000|0x8), "\x04ram0"), says: "1048576 bytes"},
	{name: "page far outside", started: true, rest: join([]byte{2, 0, 0, 0, 1}, be64(1<<63|0x2), "\x04ram0"), says: "1048576 bytes"},
	{name: "page of ones", started: true, rest: join([]byte{2, 0, 0, 0, 1}, be64(0x2), "\x04ram0\x01"), says: "0x01"},
	{name: "xbzrle", started: true, rest: join([]byte{2, 0, 0, 0, 1}, be64(0x40), "\x04ram0"), says: "turn the capability xbzrle off", unsupported: true},
	{name: "xbzrle of the same block", started: true, rest: join([]byte{2, 0, 0, 0, 1}, be64(0x2060)), says: "turn the capability xbzrle off", unsupported: true},
	{name: "compressed", started: true, rest: join([]byte{2, 0, 0, 0, 1}, be64(0x100), "\x04ram0"), says: "turn the capability compress off", unsupported: true},
	{name: "rdma", started: true, rest: join([]byte{2, 0, 0, 0, 1}, be64(0x80)), says: "rdma", unsupported: true},
	{name: "multifd", started: true, rest: join([]byte{2, 0, 0, 0, 1}, be64(0x200)), says: "turn the capability multifd off", unsupported: true},
	{name: "second table", started: true, rest: join([]byte{2, 0, 0, 0, 1}, be64(0x1004)), says: "second block table"},
	{name: "two flags", started: true, rest: join([]byte{2, 0, 0, 0, 1}, be64(0xa)), says: "is none"},
	{name: "end of a place", started: true, rest: join([]byte{2, 0, 0, 0, 1}, be64(0x1010)), says: "is none"},
	{name: "wrong footer", started: true, rest: join([]byte{2, 0, 0, 0, 1}, be64(0x10), "\x7e\x00\x00\x00\x02"), says: "no footer"},
	{name: "package without advise", started: true, rest: qemu.AppendPackage(nil, []byte{1}), says: "not behind POSTCOPY_ADVISE"},
	{name: "discard without advise", started: true, rest: qemu.AppendDiscard(nil, "ram0", []qemu.Range{{Start: 0, Length: 4096}}), says: "not between"},
	{name: "late advise", started: true, rest: qemu.AppendAdvise(nil, 4096, 4096), says: "behind the block table"},
	{name: "empty package", started: true, advised: true, rest: qemu.AppendPackage(nil, nil), says: "0 bytes of device state"},
	{name: "huge package", started: true, advised: true, rest: qemu.AppendPackageHeader(nil, 65<<20), says: "the most is"},
	{name: "two packages", started: true, advised: true, rest: qemu.AppendPackage(qemu.AppendPackage(nil, []byte{1}), []byte{1}), says: "twice"},
	{name: "discard of unknown", started: true, advised: true, rest: qemu.AppendDiscard(nil, "ram1", []qemu.Range{{Start: 0, Length: 4096}}), says: `"ram1"`},
	{name: "discard outside", started: true, advised: true, rest: qemu.AppendDiscard(nil, "ram0", []qemu.Range{{Start: 4096, Length: 1 << 20}}), says: "1048576 bytes"},
	{name: "discard after package", started: true, advised: true, rest: qemu.AppendDiscard(qemu.AppendPackage(nil, []byte{1}), "ram0", []qemu.Range{{Start: 0, Length: 4096}}), says: "not between"},
	{name: "item behind the end", started: true, advised: true, rest: qemu.AppendPing(qemu.AppendRAMEnd(qemu.AppendPackage(nil, []byte{1}), 1), 1), says: "after the end"},
	{name: "end without section end", started: true, advised: true, rest: []byte{0}, says: "unexpected item"},
}

func TestMalformed(t *testing.T) {
	for _, c := range malformed {
		setup := qemutest.NewSetup(c.advised, pages.Block{Name: "ram0", Length: 1 << 20, PageSize: pages.Size})
		stream := qemu.AppendSetup(nil, setup)
		switch {
		case c.started:
			stream = qemutest.NewSource(setup).Take()
		case c.advised:
			stream = qemu.AppendAdvise(stream, 4096|2<<20, 4096)
		}
		at := len(stream)
		_, err := decodeAll(bytes.NewReader(append(stream, c.rest...)), qemu.DecoderOptions{})
		switch {
		case err == nil:
			t.Errorf("%s: no error", c.name)
		case !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "at byte "):
			t.Errorf("%s: %q does not say %q and where", c.name, err, c.says)
		case errors.Is(err, qemu.ErrUnsupported) != c.unsupported:
			t.Errorf("%s: %q wraps ErrUnsupported: %v, want %v", c.name, err, !c.unsupported, c.unsupported)
		case errors.Is(err, io.ErrUnexpectedEOF):
			t.Errorf("%s: %q: the stream was read to its end at %d", c.name, err, at)
		}
	}
}

// TestMalformedBeginning has streams that are wrong before the configuration's
// end.
func TestMalformedBeginning(t *testing.T) {
	good := string(qemutest.NewSetup(false).Config)
	subsection := func(name string, version byte, data string) string {
		return good + "\x05" + string(byte(len(name))) + name + "\x00\x00\x00" + string(version) + data
	}
	for _, c := range []struct {
		name, stream, says string
		unsupported        bool
	}{
		{"tls", "\x16\x03\x01\x02\x00\x01\x00\x01", "clear the parameter tls-creds", true},
		{"multifd channel", "\x11\x22\x33\x44\x00\x00\x00\x01", "turn the capability multifd off", true},
		{"http", "GET / HTTP/1.0\r\n", "not a QEMU migration stream", false},
		{"version 2", "QEVM\x00\x00\x00\x02", "version 2", true},
		{"no configuration", "QEVM\x00\x00\x00\x03\x01\x00\x00\x00\x01", "send-configuration", true},
		{"no machine", "QEVM\x00\x00\x00\x03\x07\x00\x00\x00\x00", "of 0 bytes", false},
		{"endless machine", "QEVM\x00\x00\x00\x03\x07\xff\xff\xff\xff", "the most is", false},
		{"odd machine", "QEVM\x00\x00\x00\x03\x07\x00\x00\x00\x01\x00", "is not a name", false},
		{"other subsection", subsection("configuration/new", 1, ""), "configuration/new", true},
		{"newer subsection", subsection("configuration/uuid", 2, ""), "version 2", true},
		{"page bits", subsection("configuration/target-page-bits", 1, "\x00\x00\x00\x10"), "2^16", true},
		{"mapped-ram", subsection("configuration/capabilities", 1, "\x00\x00\x00\x01\x0amapped-ram"), "turn the capability mapped-ram off", true},
		{"endless capabilities", subsection("configuration/capabilities", 1, "\xff\xff\xff\xff"), "the most is 64", false},
		{"endless subsections", good + strings.Repeat(subsection("configuration/uuid", 1, "0123456789abcdef")[len(good):], 20), "more than 16", false},
	} {
		_, err := decodeAll(strings.NewReader(c.stream), qemu.DecoderOptions{})
		if err == nil || !strings.Contains(err.Error(), c.says) || errors.Is(err, qemu.ErrUnsupported) != c.unsupported {
			t.Errorf("%s: %v, want %q, unsupported: %v", c.name, err, c.says, c.unsupported)
		}
	}
}

func TestConfigurationSubsections(t *testing.T) {
	s := qemutest.NewSetup(false, pages.Block{Name: "ram0", Length: 4096, PageSize: 4096})
	s.Config = append(s.Config, "\x05\x1econfiguration/target-page-bits\x00\x00\x00\x01\x00\x00\x00\x0c"...)
	s.Config = append(s.Config, "\x05\x1aconfiguration/capabilities\x00\x00\x00\x01\x00\x00\x00\x00"...)
	s.Config = append(s.Config, "\x05\x12configuration/uuid\x00\x00\x00\x010123456789abcdef"...)
	d := qemu.NewDecoder(bytes.NewReader(qemutest.NewSource(s).Take()), qemu.DecoderOptions{})
	var ev qemu.Event
	for ev.Kind != qemu.EventRAMStart {
		if err := d.Next(&ev); err != nil {
			t.Fatal(err)
		}
	}
	if got := d.Setup(); !bytes.Equal(got.Config, s.Config) || string(got.UUID) != "0123456789abcdef" || got.Machine != qemutest.Machine {
		t.Errorf("setup %+v", got)
	}
}

// TestCutAnywhere cuts a stream at every byte: always an early end, never a
// panic, an end or another error.
func TestCutAnywhere(t *testing.T) {
	setup := qemutest.NewSetup(true, pages.Block{Name: "m", Length: 8 << 20, PageSize: 2 << 20}, pages.Block{Name: "r", Length: 4096, PageSize: 4096})
	setup.Early = recordedEarly(t)
	for _, postcopy := range []bool{true, false} {
		s := qemutest.NewSource(setup)
		s.Part(qemutest.Page{Block: 0, Offset: 4096}, qemutest.Page{Block: 1, Data: make([]byte, 4096)})
		if postcopy {
			s.Discard(0, qemu.Range{Start: 0, Length: 2 << 20})
			s.Switch([]byte("device"), 3, 0x42)
			s.EndPostcopy()
		} else {
			s.EndPrecopy([]byte("device\x00\x06\x00\x00"))
		}
		stream := s.Take()
		if _, err := decodeAll(bytes.NewReader(stream), qemu.DecoderOptions{}); err != nil {
			t.Fatal(err)
		}
		for n := range stream {
			_, err := decodeAll(bytes.NewReader(stream[:n]), qemu.DecoderOptions{BufferBytes: 1})
			if !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("cut at %d of %d: %v", n, len(stream), err)
			}
		}
	}
}

// recordedEarly returns the early section of a recorded stream.
func recordedEarly(tb testing.TB) []byte {
	d := qemu.NewDecoder(bytes.NewReader(recorded(tb, "postcopy-virtio-mem-10.0")), qemu.DecoderOptions{})
	var ev qemu.Event
	for ev.Kind != qemu.EventRAMStart {
		if err := d.Next(&ev); err != nil {
			tb.Fatal(err)
		}
	}
	return d.Setup().Early
}

// TestDoesNotWaitForMore writes a stream event by event and wants each before
// the next is written.
func TestDoesNotWaitForMore(t *testing.T) {
	ours, theirs := net.Pipe()
	defer ours.Close()
	defer theirs.Close()
	_ = ours.SetDeadline(time.Now().Add(10 * time.Second))
	setup := qemutest.NewSetup(true, pages.Block{Name: "m", Length: 1 << 20, PageSize: 4096})
	part := qemu.AppendPartStart(nil, 1)
	var st qemu.PageState
	d := qemu.NewDecoder(ours, qemu.DecoderOptions{})
	var ev qemu.Event
	for i, step := range []struct {
		write []byte
		want  []string
	}{
		{qemu.AppendOpening(nil, setup, 1), []string{"setup", "OPEN_RETURN_PATH ", "PING 00000001", "POSTCOPY_ADVISE 00000000000010000000000000001000"}},
		{part[:1], []string{"ram start"}},
		{qemu.AppendZero(part[1:], &st, "m", 0, 0x1000), []string{"zero 0 0x1000"}},
		{qemu.AppendZero(nil, &st, "m", 0, 0x2000), []string{"zero 0 0x2000"}},
		{qemu.AppendPartEnd(nil, 1), []string{"section end"}},
		{qemu.AppendPing(nil, 2), []string{"PING 00000002"}},
		{qemu.AppendPackage(nil, []byte{1, 2}), []string{"package 2 34"}},
		{qemu.AppendRAMEnd(nil, 1), []string{"ram end"}},
		{qemu.AppendEOF(nil), []string{"end"}},
	} {
		go func() { _, _ = theirs.Write(step.write) }()
		for _, want := range step.want {
			if err := d.Next(&ev); err != nil {
				t.Fatalf("step %d: %v", i, err)
			}
			if got := tell(&ev); got != want {
				t.Fatalf("step %d: %q, want %q", i, got, want)
			}
		}
		if n := d.Buffered(); i > 0 && n > 1 {
			t.Fatalf("step %d: %d bytes left", i, n)
		}
	}
	if err := d.Next(&ev); err != io.EOF {
		t.Fatalf("behind the end: %v", err)
	}
}

func TestReaderErrorsAreKept(t *testing.T) {
	stream := qemutest.NewSource(qemutest.NewSetup(true, pages.Block{Name: "m", Length: 4096, PageSize: 4096})).Take()
	broken := errors.New("broken")
	_, err := decodeAll(io.MultiReader(bytes.NewReader(stream), iotest.ErrReader(broken)), qemu.DecoderOptions{})
	if !errors.Is(err, broken) || errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%v, want the reader's error", err)
	}
	if _, err = decodeAll(&pieces{data: stream, sizes: []int{0}}, qemu.DecoderOptions{}); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("%v, want no progress", err)
	}
	d := qemu.NewDecoder(strings.NewReader("nonsense"), qemu.DecoderOptions{})
	var ev qemu.Event
	first, second := d.Next(&ev), d.Next(&ev)
	if first == nil || first != second {
		t.Errorf("%v, then %v: an error is final", first, second)
	}
}

// TestResumedStream reads what a source sends that resumes a paused migration.
func TestResumedStream(t *testing.T) {
	setup := qemutest.NewSetup(true, pages.Block{Name: "m", Length: 1 << 20, PageSize: 4096}, pages.Block{Name: "n", Length: 4096, PageSize: 4096})
	var st qemu.PageState
	stream := qemu.AppendRecvBitmap(nil, "n")
	stream = qemu.AppendCommand(stream, qemu.CommandPostcopyResume, nil)
	stream = qemu.AppendZero(qemu.AppendPartStart(stream, 1), &st, "n", 1, 0)
	stream = qemu.AppendEOF(qemu.AppendRAMEnd(qemu.AppendPartEnd(stream, 1), 1))
	told, err := decodeAll(bytes.NewReader(stream), qemu.DecoderOptions{Resume: setup})
	if want := "RECV_BITMAP 016e|POSTCOPY_RESUME |zero 1 0x0|section end|ram end|end"; err != nil || strings.Join(told, "|") != want {
		t.Errorf("%q %v, want %q", told, err, want)
	}
	_, err = decodeAll(bytes.NewReader(qemu.AppendRecvBitmap(nil, "other")), qemu.DecoderOptions{Resume: setup})
	if err == nil || !strings.Contains(err.Error(), `"other"`) {
		t.Errorf("bitmap of an unknown block: %v", err)
	}
}

// TestMultifdSyncs wants each synchronisation point told when its record has
// arrived: the source may send nothing more before it was acted upon.
func TestMultifdSyncs(t *testing.T) {
	footer := "\x7e\x00\x00\x00\x01"
	begin := join(qemutest.NewSetup(false).Config, section(1, "ram", 4), be64(0x1004), "\x01a", be64(0x1000))
	part := []byte{2, 0, 0, 0, 1}
	for name, tc := range map[string]struct {
		upToSync [][]byte // each ends with a synchronisation point
		rest     []byte
		want     string
	}{
		"flush records": {
			[][]byte{join(begin, be64(0x200)), join(be64(0x10), footer, part, be64(0x200))}, join(be64(0x10), footer),
			"setup|multifd sync|ram start|multifd sync|section end",
		},
		"end of section": {
			[][]byte{join(begin, be64(0x10)), join(footer, part, be64(0x10))}, join(footer),
			"setup|multifd sync|ram start|multifd sync|section end",
		},
	} {
		var stream []byte
		for i, piece := range tc.upToSync {
			stream = append(stream, piece...)
			told, _ := decodeAll(bytes.NewReader(stream), qemu.DecoderOptions{Multifd: true})
			if n := strings.Count(strings.Join(told, "|"), "multifd sync"); n != i+1 {
				t.Errorf("%s: after record %d: %q", name, i, told)
			}
		}
		told, _ := decodeAll(bytes.NewReader(append(stream, tc.rest...)), qemu.DecoderOptions{Multifd: true})
		if strings.Join(told, "|") != tc.want {
			t.Errorf("%s: %q, want %q", name, told, tc.want)
		}
	}
}
