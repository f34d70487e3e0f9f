// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
)

// recorded reads a stream from testdata.
func recorded(tb testing.TB, name string) []byte {
	tb.Helper()
	f, err := os.Open(filepath.Join("testdata", name+".gz"))
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		tb.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// summary is what a recorded stream must contain.
type summary struct {
	Machine  string
	Blocks   []pages.Block
	Postcopy bool
	Early    int // bytes
	Commands string
	Pings    []uint32 // in the package
	Ending   string   // kinds of the events behind the last section, and how often
	Syncs    int
	Flushing bool // Setup.MultifdFlush
	Seen     int  // distinct pages
	Resent   int  // pages behind the package; they must be those discarded
}

type pageAt struct {
	block  int
	offset uint64
}

// tally fills a summary event by event.
type tally struct {
	summary
	seen, discarded map[pageAt]bool
	packaged        bool
}

func (s *tally) add(tb testing.TB, ev *qemu.Event) {
	switch ev.Kind {
	case qemu.EventCommand:
		s.Commands += " " + ev.Command.String()
		for _, r := range ev.Ranges {
			for o := r.Start; o < r.Start+r.Length; o += pages.Size {
				s.discarded[pageAt{ev.Block, o}] = true
			}
		}
	case qemu.EventPage, qemu.EventZero:
		p := pageAt{ev.Block, ev.Offset}
		s.seen[p] = true
		if ev.Kind == qemu.EventPage && bytes.Equal(ev.Data, make([]byte, pages.Size)) {
			tb.Errorf("page %v of zeros came as data", p)
		}
		if s.packaged && !s.discarded[p] {
			tb.Errorf("page %v came behind the package without a discard, or twice", p)
		}
		if s.packaged {
			s.Resent++
			delete(s.discarded, p)
		}
	case qemu.EventSync:
		s.Syncs++
	case qemu.EventPackage:
		s.packaged = true
		s.Commands += " PACKAGED"
		var err error
		if s.Pings, err = qemu.PackagePings(ev.Payload); err != nil {
			tb.Error(err)
		}
	case qemu.EventRAMEnd, qemu.EventTail, qemu.EventEnd:
		s.Ending += " " + ev.Kind.String()
	}
}

func summarise(tb testing.TB, d *qemu.Decoder) summary {
	tb.Helper()
	s := &tally{seen: make(map[pageAt]bool), discarded: make(map[pageAt]bool)}
	var ev qemu.Event
	for {
		err := d.Next(&ev)
		if err == io.EOF {
			break
		}
		if err != nil {
			tb.Fatal(err)
		}
		s.add(tb, &ev)
	}
	if len(s.discarded) > 0 {
		tb.Errorf("%d discarded pages never came again", len(s.discarded))
	}
	setup := d.Setup()
	s.Machine, s.Blocks, s.Postcopy = setup.Machine, setup.RAM.Blocks, setup.Postcopy
	s.Early, s.Seen, s.Flushing = len(setup.Early), len(s.seen), setup.MultifdFlush
	s.Commands = strings.TrimSpace(s.Commands)
	s.Ending = strings.TrimSpace(s.Ending)
	return s.summary
}

// blocksBehind adds the blocks that every recorded VM has behind its RAM.
func blocksBehind(ram ...pages.Block) []pages.Block {
	return append(ram,
		pages.Block{Name: "/rom@etc/acpi/tables", Length: 0x20000, PageSize: pages.Size},
		pages.Block{Name: "pc.rom", Length: 0x20000, PageSize: pages.Size},
		pages.Block{Name: "pc.bios", Length: 0x10000, PageSize: pages.Size},
		pages.Block{Name: "/rom@etc/table-loader", Length: 0x1000, PageSize: pages.Size},
		pages.Block{Name: "/rom@etc/acpi/rsdp", Length: 0x1000, PageSize: pages.Size})
}

const (
	advised  = "OPEN_RETURN_PATH PING POSTCOPY_ADVISE"
	discards = "POSTCOPY_RAM_DISCARD POSTCOPY_RAM_DISCARD POSTCOPY_RAM_DISCARD POSTCOPY_RAM_DISCARD POSTCOPY_RAM_DISCARD POSTCOPY_RAM_DISCARD"
	switched = " " + discards + " PING PACKAGED PING"
	start    = " SWITCHOVER_START"
	tailEnds = "ram end tail end"
)

// wantRecorded is keyed by the names of the files. Sources of one kind differ
// between the versions in SWITCHOVER_START and the pages dirtied meanwhile.
func wantRecorded() map[string]summary {
	plain := blocksBehind(pages.Block{Name: "pc.ram", Length: 2 << 20, PageSize: pages.Size})
	huge := blocksBehind(pages.Block{Name: "huge", Length: 6 << 20, PageSize: 2 << 20})
	withVMem := append([]pages.Block{{Name: "0000:00:01.0/vm0", Length: 4 << 20, PageSize: pages.Size}}, plain...)
	precopy := func(commands string, postcopy bool) summary {
		return summary{Blocks: plain, Commands: commands, Postcopy: postcopy, Ending: tailEnds, Seen: 594}
	}
	postcopy := func(blocks []pages.Block, commands string, early, seen, resent int) summary {
		return summary{Blocks: blocks, Commands: commands, Postcopy: true, Early: early,
			Pings: []uint32{3}, Ending: "ram end end", Seen: seen, Resent: resent}
	}
	// Up to machine type 8.2 zero pages travel on the main channel.
	multifd := summary{Blocks: plain, Ending: tailEnds, Syncs: 3, Seen: 428}
	return map[string]summary{
		"precopy-7.2":              precopy("", false),
		"precopy-10.0":             precopy(start, false),
		"precopy-returnpath-7.2":   precopy("OPEN_RETURN_PATH PING", false),
		"precopy-returnpath-10.0":  precopy("OPEN_RETURN_PATH PING"+start, false),
		"precopy-advised-7.2":      precopy(advised, true),
		"precopy-advised-10.0":     precopy(advised+start, true),
		"postcopy-7.2":             postcopy(plain, advised+switched, 0, 594, 591),
		"postcopy-10.0":            postcopy(plain, advised+start+switched, 0, 594, 532),
		"postcopy-hugepages-7.2":   postcopy(huge, advised+switched, 0, 1618, 1618),
		"postcopy-hugepages-10.0":  postcopy(huge, advised+start+switched, 0, 1618, 1618),
		"postcopy-virtio-mem-7.2":  postcopy(withVMem, advised+switched, 0, 594, 593),
		"postcopy-virtio-mem-10.0": postcopy(withVMem, advised+start+switched, 99, 594, 532),
		"multifd-7.2":              multifd,
		"multifd-10.0":             {Blocks: plain, Commands: start, Ending: tailEnds, Syncs: 4, Flushing: true},
		"multifd-old-sync-10.0":    multifd,
	}
}

func TestRecorded(t *testing.T) {
	for name, want := range wantRecorded() {
		t.Run(name, func(t *testing.T) {
			stream := recorded(t, name)
			want.Commands = strings.TrimSpace(want.Commands)
			want.Machine = "pc-q35-7.2"
			if strings.HasSuffix(name, "10.0") && name != "multifd-old-sync-10.0" {
				want.Machine = "pc-q35-10.0"
			}
			opt := qemu.DecoderOptions{Multifd: strings.HasPrefix(name, "multifd")}
			got := summarise(t, qemu.NewDecoder(bytes.NewReader(stream), opt))
			byteWise := summarise(t, qemu.NewDecoder(iotest.OneByteReader(bytes.NewReader(stream)), opt))
			if d := cmp.Diff(got, byteWise); d != "" {
				t.Errorf("read byte by byte (-whole +bytes):\n%s", d)
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}

func TestRecordedRefusals(t *testing.T) {
	for name, cure := range map[string]string{
		"block-7.2":                   "turn the capability block off",
		"compress-7.2":                "turn the capability compress off",
		"dirty-bitmaps-7.2":           "turn the capability dirty-bitmaps off",
		"dirty-bitmaps-10.0":          "turn the capability dirty-bitmaps off",
		"dirty-bitmaps-postcopy-7.2":  "turn the capability dirty-bitmaps off",
		"dirty-bitmaps-postcopy-10.0": "turn the capability dirty-bitmaps off",
		"ignore-shared-7.2":           "turn the capability x-ignore-shared off",
		"ignore-shared-10.0":          "turn the capability x-ignore-shared off",
	} {
		d := qemu.NewDecoder(bytes.NewReader(recorded(t, "refused-"+name)), qemu.DecoderOptions{})
		var ev qemu.Event
		var err error
		for err == nil {
			err = d.Next(&ev)
		}
		if !errors.Is(err, qemu.ErrUnsupported) || !strings.Contains(err.Error(), cure) {
			t.Errorf("%s: %v, want ErrUnsupported and %q", name, err, cure)
		}
	}
}
