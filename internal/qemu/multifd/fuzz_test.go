// SPDX-License-Identifier: Apache-2.0

package multifd

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// captures are the beginnings of channels of real QEMUs, each with a few packets.
func captures(tb testing.TB) map[string][]byte {
	tb.Helper()
	files, err := filepath.Glob("testdata/*.bin")
	if err != nil || len(files) == 0 {
		tb.Fatalf("no captures: %v", err)
	}
	all := make(map[string][]byte)
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			tb.Fatal(err)
		}
		all[filepath.Base(f)] = b
	}
	return all
}

func FuzzReceiver(f *testing.F) {
	// Short seeds: the fuzzer's minimising takes minutes for a page of data.
	for _, b := range captures(f) {
		f.Add(b[:helloBytes+headerBytes])
		f.Add(append(bytes.Clone(b[:helloBytes]), b[helloBytes+headerBytes:][:2*headerBytes]...))
	}
	f.Add(append(hello(0), twoPages().bytes()[:headerBytes]...))
	f.Fuzz(func(t *testing.T, stream []byte) {
		rx := NewReceiver(bytes.NewReader(stream), Options{})
		taken := 0
		_, err := rx.Hello()
		if err == nil {
			taken += helloBytes
		}
		var p Packet
		for err == nil {
			if err = rx.Next(&p); err != nil {
				break
			}
			taken += headerBytes
			if n := len(p.Normal) + len(p.Zero); n > MaxPages || (n == 0) != (p.BlockName == "") || len(p.BlockName) >= nameBytes {
				t.Fatalf("packet %+v", p)
			}
			for range p.Normal {
				var page []byte
				if page, err = rx.Page(); err != nil {
					break
				}
				if !bytes.Equal(page, stream[taken:taken+PageSize]) {
					t.Fatalf("page at byte %d is another one", taken)
				}
				taken += PageSize
			}
		}
		if err == io.EOF && taken != len(stream) {
			t.Fatalf("end after %d of %d bytes", taken, len(stream))
		}
	})
}

// What the two formats have in common and where they differ: since 9.0 zero pages
// are in the packets and a SYNC packet is empty; before, a SYNC packet may carry
// pages, and one without pages keeps the size and the name of an earlier one.
func TestCapturesAreRead(t *testing.T) {
	type summary struct {
		Sync         bool
		Normal, Zero int
		Block        string
	}
	want := map[string][]summary{
		"qemu-10.0.bin": {{true, 0, 0, ""}, {false, 1, 0, "pc.ram"}, {false, 0, 128, "pc.ram"}},
		"qemu-7.2.bin": {
			{true, 0, 0, ""}, {true, 0, 0, ""}, {false, 4, 0, "pc.ram"}, {false, 1, 0, "pc.ram"},
			{true, 1, 0, "pc.ram"}, {false, 0, 0, ""}, {true, 3, 0, "pc.ram"},
		},
	}
	got := make(map[string][]summary)
	for name, stream := range captures(t) {
		rx := NewReceiver(bytes.NewReader(stream), Options{})
		if _, err := rx.Hello(); err != nil {
			t.Fatal(err)
		}
		var p Packet
		for {
			if err := rx.Next(&p); err == io.EOF {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			got[name] = append(got[name], summary{p.Flags.Sync(), len(p.Normal), len(p.Zero), p.BlockName})
			for range p.Normal {
				if _, err := rx.Page(); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
			}
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
