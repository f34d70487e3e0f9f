// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
)

func allocated() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.TotalAlloc
}

// TestRecordedReturnPath reads what stock destinations answered: first one that
// was broken off, then the resumed one.
func TestRecordedReturnPath(t *testing.T) {
	want := wantRecorded()
	for name, say := range map[string]string{
		"postcopy":            "PONG 1|PONG 2|PONG 3|REQ_PAGES_ID 3 0x0+0x1000|PONG 4393|BITMAPS|RESUME_ACK 1|PONG 4690|SHUT 0",
		"postcopy-hugepages":  "PONG 1|PONG 2|PONG 3|REQ_PAGES_ID 3 0x0+0x1000|REQ_PAGES_ID 0 0x0+0x200000|PONG 4905|BITMAPS|RESUME_ACK 1|PONG 5714|SHUT 0",
		"postcopy-virtio-mem": "PONG 1|PONG 2|PONG 3|REQ_PAGES_ID 4 0x0+0x1000|PONG 4393|BITMAPS|RESUME_ACK 1|PONG 4690|SHUT 0",
	} {
		for _, version := range []string{"7.2", "10.0"} {
			name := name + "-" + version
			blocks := want[name].Blocks
			d := qemu.NewRPDecoder(bytes.NewReader(recorded(t, "returnpath-"+name)), blocks)
			var told []string
			bitmaps := 0
			var m qemu.RPMessage
			for {
				err := d.Next(&m)
				if err == io.EOF {
					break
				}
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				switch m.Type {
				case qemu.RPRecvBitmap:
					if m.Block != bitmaps {
						t.Errorf("%s: bitmap of block %d, want %d", name, m.Block, bitmaps)
					}
					if bitmaps++; bitmaps == len(blocks) {
						told = append(told, "BITMAPS")
					}
				case qemu.RPReqPages, qemu.RPReqPagesID:
					told = append(told, fmt.Sprintf("%v %d %#x+%#x", m.Type, m.Block, m.Start, m.Length))
				default:
					told = append(told, fmt.Sprintf("%v %d", m.Type, m.Value))
				}
			}
			if diff := cmp.Diff(strings.Split(say, "|"), told); diff != "" {
				t.Errorf("%s (-want +got)\n%s", name, diff)
			}
		}
	}
}

var rpBlocks = []pages.Block{
	{Name: "pc.ram", Length: 1 << 20, PageSize: pages.Size},
	{Name: "pc.rom", Length: 70 * pages.Size, PageSize: pages.Size},
}

func TestReturnPathMalformed(t *testing.T) {
	bitmap := func(length uint64, trailer uint64) []byte {
		return join("\x00\x05\x00\x07\x06pc.rom", be64(length), make([]byte, 16), be64(trailer))
	}
	for _, c := range []struct {
		name   string
		stream []byte
		says   string
	}{
		{"type 0", []byte{0, 0, 0, 0}, "unknown type 0"},
		{"type 8", []byte{0, 8, 0, 0}, "unknown type 8"},
		{"long pong", []byte{0, 2, 0, 5, 1, 2, 3, 4, 5}, "PONG of 5 bytes"},
		{"endless request", []byte{0, 3, 2, 1}, "REQ_PAGES_ID of 513 bytes"},
		{"short request", []byte{0, 3, 0, 2, 0, 0}, "2 bytes"},
		{"request of nothing", qemu.AppendReqPages(nil, 0, 4096), "no block was named"},
		{"request of unknown", qemu.AppendReqPagesID(nil, "other", 0, 4096), `unknown block "other"`},
		{"request of nameless", qemu.AppendReqPagesID(nil, "", 0, 4096), "malformed block name"},
		{"request outside", qemu.AppendReqPagesID(nil, "pc.ram", 1<<20, 4096), "impossible range"},
		{"request too long", qemu.AppendReqPagesID(nil, "pc.ram", 4096, 1<<20), "impossible range"},
		{"request of no length", qemu.AppendReqPagesID(nil, "pc.ram", 4096, 0), "impossible range"},
		{"request askew", qemu.AppendReqPagesID(nil, "pc.ram", 100, 4096), "impossible range"},
		{"bitmap of unknown", qemu.AppendRecvBitmapReply(nil, "other", nil), "unknown block"},
		{"bitmap without name", []byte{0, 5, 0, 0}, "malformed block name"},
		{"endless bitmap", bitmap(1<<60, 0), "needs 16"},
		{"short bitmap", bitmap(8, 0), "needs 16"},
		{"bitmap with another end", bitmap(16, 1), "ends with 0x1"},
	} {
		err := qemu.NewRPDecoder(bytes.NewReader(c.stream), rpBlocks).Next(&qemu.RPMessage{})
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", c.name, err, c.says)
		}
	}
}

func TestReturnPathCutAnywhere(t *testing.T) {
	for _, message := range [][]byte{
		qemu.AppendPong(nil, 1),
		qemu.AppendReqPagesID(nil, "pc.ram", 0, 4096),
		qemu.AppendRecvBitmapReply(nil, "pc.rom", make([]byte, 9)),
	} {
		for n := 1; n < len(message); n++ {
			err := qemu.NewRPDecoder(bytes.NewReader(message[:n]), rpBlocks).Next(&qemu.RPMessage{})
			if !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%x cut at %d: %v", message, n, err)
			}
		}
	}
}
