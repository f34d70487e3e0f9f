// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
	"scattergather.io/scattergather/internal/qemu/qemutest"
)

// untilTail returns a stream that has come to its tail.
func untilTail() []byte {
	s := qemutest.NewSetup(false, pages.Block{Name: "m", Length: 1 << 20, PageSize: 4096})
	return qemu.AppendRAMEnd(qemutest.NewSource(s).Take(), qemutest.Section)
}

// TestTailOnOpenConnection wants the tail of a source that does not close, in
// pieces of many sizes, and none before its last byte.
func TestTailOnOpenConnection(t *testing.T) {
	real := recorded(t, "precopy-returnpath-10.0")
	i := bytes.LastIndex(real, []byte("\x03\x00\x00\x00\x01")) // … of a RAM END
	for i >= 0 && !bytes.Contains(real[i:], []byte("\x7e\x00\x00\x00\x01\x04")) {
		i = bytes.LastIndex(real[:i], []byte("\x03\x00\x00\x00\x01"))
	}
	rest := real[i:]
	rest = rest[bytes.Index(rest, []byte("\x7e\x00\x00\x00\x01\x04"))+5:]
	want := rest[:bytes.LastIndex(rest, []byte("\x00\x06\x00"))]
	for _, size := range []int{1000, 4096, 70000, len(rest) - 1, len(rest)} {
		ours, theirs := net.Pipe()
		_ = ours.SetDeadline(time.Now().Add(10 * time.Second))
		d := qemu.NewDecoder(ours, qemu.DecoderOptions{})
		go func() {
			_, _ = theirs.Write(untilTail())
			for p := rest; len(p) > 0; p = p[min(size, len(p)):] {
				_, _ = theirs.Write(p[:min(size, len(p))])
			}
		}()
		var ev qemu.Event
		for ev.Kind != qemu.EventTail {
			if err := d.Next(&ev); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(ev.Payload, want) {
			t.Errorf("in pieces of %d: tail of %d bytes, want %d", size, len(ev.Payload), len(want))
		}
		if err := d.Next(&ev); err != nil || ev.Kind != qemu.EventEnd {
			t.Errorf("behind the tail: %v %v", ev.Kind, err)
		}
		_ = ours.Close()
		_ = theirs.Close()
	}
}

func TestTailEnds(t *testing.T) {
	for _, c := range []struct {
		name, tail, want string
	}{
		{"plain", "device\x00" + string(qemutest.AppendDescription(nil, "{}")), "device"},
		{"false beginnings", "\x04\x00\x06\x00\x00\x00\x04{\x00\x06\x00\x06\x00\x00\x00\x09{dev\x00" + string(qemutest.AppendDescription(nil, `{"a":1}`)), "\x04\x00\x06\x00\x00\x00\x04{\x00\x06\x00\x06\x00\x00\x00\x09{dev"},
		{"false end", "dev\x00\x06\x00\x00\x00\x0d{}\x00" + string(qemutest.AppendDescription(nil, `{"a"}`)), ""},
		{"marks in a row", "dev\x00\x00\x00" + string(qemutest.AppendDescription(nil, `{}`)), "dev\x00\x00"},
		{"no description", "device\x00", ""},
		{"nothing", "", ""},
		{"no JSON", "device\x00" + string(qemutest.AppendDescription(nil, "{]")), ""},
		{"JSON too short", "device\x00" + string(qemutest.AppendDescription(nil, "{}")) + " ", ""},
		{"no object", "device\x00" + string(qemutest.AppendDescription(nil, "[]")), ""},
	} {
		d := qemu.NewDecoder(bytes.NewReader(append(untilTail(), c.tail...)), qemu.DecoderOptions{})
		var ev qemu.Event
		var err error
		for err == nil && ev.Kind != qemu.EventTail {
			err = d.Next(&ev)
		}
		if c.want == "" {
			if !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%s: %v %q, want an early end", c.name, err, ev.Payload)
			}
			continue
		}
		if err != nil || string(ev.Payload) != c.want {
			t.Errorf("%s: %q %v, want %q", c.name, ev.Payload, err, c.want)
		}
	}
}

// zeros is a tail without end.
type zeros struct{ n int }

func (z *zeros) Read(p []byte) (int, error) {
	clear(p)
	z.n += len(p)
	return len(p), nil
}

func TestTailIsBounded(t *testing.T) {
	const most = 1 << 20
	z := &zeros{}
	_, err := decodeAll(io.MultiReader(bytes.NewReader(untilTail()), z), qemu.DecoderOptions{MaxTail: most})
	if err == nil || !strings.Contains(err.Error(), "more than 1048576 bytes") || z.n > 3*most {
		t.Errorf("%v after %d bytes", err, z.n)
	}
	starts := strings.Repeat("\x00\x06\x7f\xff\xff\xff{", 100)
	_, err = decodeAll(strings.NewReader(string(untilTail())+starts), qemu.DecoderOptions{})
	if err == nil || !strings.Contains(err.Error(), "beginnings") {
		t.Errorf("many beginnings: %v", err)
	}
}

// TestPackageMemoryFollowsData announces a large package and sends little.
func TestPackageMemoryFollowsData(t *testing.T) {
	s := qemutest.NewSource(qemutest.NewSetup(true, pages.Block{Name: "m", Length: 1 << 20, PageSize: 4096}))
	stream := append(qemu.AppendPackageHeader(s.Take(), 64<<20), make([]byte, 100)...)
	var before, after uint64
	before = allocated()
	_, err := decodeAll(bytes.NewReader(stream), qemu.DecoderOptions{})
	after = allocated()
	if !errors.Is(err, io.ErrUnexpectedEOF) || after-before > 2<<20 {
		t.Errorf("%v with %d bytes allocated", err, after-before)
	}
}

func TestWrapTail(t *testing.T) {
	pkg := qemu.WrapTail([]byte("\x04device\x7e\x00\x00\x00\x05"), 3)
	const want = "\x08\x00\x04\x00\x00" + "\x04device\x7e\x00\x00\x00\x05" + "\x08\x00\x02\x00\x04\x00\x00\x00\x03" + "\x08\x00\x05\x00\x00"
	if d := cmp.Diff(want, string(pkg)); d != "" {
		t.Error(d)
	}
}

func TestPackagePings(t *testing.T) {
	const listen, run, ping = "\x08\x00\x04\x00\x00", "\x08\x00\x05\x00\x00", "\x08\x00\x02\x00\x04\x00\x00\x00"
	for _, c := range []struct {
		pkg  string
		want []uint32
		says string
	}{
		{listen + run, nil, ""},
		{listen + ping + "\x03" + run, []uint32{3}, ""},
		{listen + "\x04dev\x7e\x00\x00\x00\x09" + ping + "\x03" + ping + "\x42" + run, []uint32{3, 0x42}, ""},
		{listen + ping + "\x03\x04dev\x7e\x00\x00\x00\x09" + run, nil, ""},
		{ping + "\x03" + run, nil, "begin with POSTCOPY_LISTEN"},
		{listen + ping + "\x03", nil, "end with POSTCOPY_RUN"},
		{listen, nil, "end with POSTCOPY_RUN"},
		{"", nil, "begin with POSTCOPY_LISTEN"},
		{listen + strings.Repeat(ping+"\x03", 17) + run, nil, "more than 16"},
	} {
		got, err := qemu.PackagePings([]byte(c.pkg))
		if c.says != "" {
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%q: %v, want %q", c.pkg, err, c.says)
			}
			continue
		}
		if d := cmp.Diff(c.want, got); d != "" || err != nil {
			t.Errorf("%q: %v %s", c.pkg, err, d)
		}
	}
}
