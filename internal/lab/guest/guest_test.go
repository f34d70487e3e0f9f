// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestPatternTellsEveryGenerationApart(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := Pattern{Seed: rapid.Uint64().Draw(t, "seed"), Mix: DefaultMix}
		page := rapid.Uint32().Draw(t, "page")
		generation := rapid.Uint32Max(1<<30).Draw(t, "generation")
		var got Page
		p.Fill(&got, page, generation)
		if word, want := p.Check(&got, page, generation); word >= 0 {
			t.Fatalf("page %d just filled: word %d is wrong, want %#x", page, word, want)
		}
		if word, _ := p.Check(&got, page, generation+1); word < 0 {
			t.Fatalf("page %d: generations %d and %d look the same", page, generation, generation+1)
		}
		at := rapid.IntRange(0, PageWords-1).Draw(t, "word")
		got[at] ^= 1 << rapid.IntRange(0, 63).Draw(t, "bit")
		if word, _ := p.Check(&got, page, generation); word != at {
			t.Fatalf("page %d with a bit flipped in word %d: Check found word %d", page, at, word)
		}
	})
}

func TestPatternKeepsTheShares(t *testing.T) {
	p := Pattern{Seed: 3, Mix: DefaultMix}
	var got Mix
	const pages = 100_000
	for i := range uint32(pages) {
		got[p.Kind(i)]++
	}
	for kind, share := range DefaultMix {
		if drawn := got[kind] * 100 / pages; drawn < share-1 || drawn > share+1 {
			t.Errorf("kind %d: %d %% of the pages, want %d %%", kind, drawn, share)
		}
	}
}

func TestCommandLineRoundTrip(t *testing.T) {
	want := Config{Seed: 1 << 63, FillMiB: 512, Mix: DefaultMix, WorkingSet: 64, DirtyRate: 2000, VerifyRate: 1, Requests: 500, Touches: 4, CPUs: 2}
	got, err := ParseCommandLine("console=ttyS0 quiet " + want.CommandLine() + "\n")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("parameters after the kernel's command line (-want +got):\n%s", diff)
	}
	for _, bad := range []string{"sg.fill=1 sg.ws=2 sg.cpus=1", "sg.fill=x", "sg.mix=1:2:3", "sg.mix=50:50:50:0", "sg.nonsense=1", "sg.fill=2 sg.ws=1 sg.cpus=3"} {
		if _, err := ParseCommandLine(bad); err == nil {
			t.Errorf("ParseCommandLine(%q) accepted it", bad)
		}
	}
}

func TestDecoderFindsFramesInAnyPieces(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var line []byte
		var want, got []Beat
		for i := range rapid.IntRange(1, 20).Draw(t, "frames") {
			b := Beat{Seq: uint32(i), Nanos: rapid.Uint64().Draw(t, "nanos"), Served: rapid.Uint32().Draw(t, "served")}
			want = append(want, b)
			line = AppendBeat(line, b)
		}
		var d Decoder
		for len(line) > 0 {
			n := rapid.IntRange(1, len(line)).Draw(t, "piece")
			d.Feed(line[:n], func(_ Type, payload []byte) {
				var b Beat
				if err := Decode(payload, &b); err != nil {
					t.Fatal(err)
				}
				got = append(got, b)
			})
			line = line[n:]
		}
		if diff := cmp.Diff(want, got); diff != "" || d.Skipped() != 0 {
			t.Errorf("%d bytes skipped, frames (-want +got):\n%s", d.Skipped(), diff)
		}
	})
}

func TestAppendBeatIsAppend(t *testing.T) {
	b := Beat{Seq: 1, Nanos: 2, Served: 3, Dirtied: 4}
	if diff := cmp.Diff(Append(nil, TypeBeat, b), AppendBeat(nil, b)); diff != "" {
		t.Errorf("the two ways to encode a beat differ:\n%s", diff)
	}
}

func FuzzDecoder(f *testing.F) {
	f.Add(AppendBeat(nil, Beat{Seq: 1}), 7)
	f.Add(Append([]byte("noise\xa5"), TypeWrong, Wrong{Page: 3}), 1)
	f.Fuzz(func(t *testing.T, line []byte, piece int) {
		var d Decoder
		taken := 0
		for rest := line; len(rest) > 0; {
			n := max(1, min(piece, len(rest)))
			d.Feed(rest[:n], func(_ Type, payload []byte) { taken += overhead + len(payload) })
			rest = rest[n:]
		}
		if left := len(line) - taken - d.Skipped(); left < 0 || left >= maxFrameLen {
			t.Errorf("%d bytes in frames, %d skipped, %d kept, of %d", taken, d.Skipped(), left, len(line))
		}
	})
}
