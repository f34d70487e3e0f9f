// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"scattergather.io/scattergather/internal/qemu"
)

// encoder writes back what a decoder found.
type encoder struct {
	setup *qemu.Setup
	state qemu.PageState
	out   []byte
	open  bool   // within a section
	like  []byte // what out must become
}

func (e *encoder) add(ev *qemu.Event) {
	name := func() string { return e.setup.RAM.Blocks[ev.Block].Name }
	switch ev.Kind {
	case qemu.EventSetup:
		e.out = qemu.AppendSetup(e.out, e.setup)
	case qemu.EventCommand:
		e.out = qemu.AppendCommand(e.out, ev.Command, ev.Payload)
	case qemu.EventRAMStart:
		e.out = append(qemu.AppendRAMStart(e.out, e.setup, e.setup.Postcopy), e.setup.Early...)
	case qemu.EventPage:
		e.begin(ev.Section)
		e.out = qemu.AppendPage(e.out, &e.state, name(), ev.Block, ev.Offset, ev.Data)
	case qemu.EventZero:
		e.begin(ev.Section)
		e.out = qemu.AppendZero(e.out, &e.state, name(), ev.Block, ev.Offset)
	case qemu.EventSectionEnd:
		e.begin(ev.Section)
		e.out = qemu.AppendPartEnd(e.out, ev.Section)
		e.open = false
	case qemu.EventRAMEnd:
		e.end(ev.Section)
	case qemu.EventPackage:
		e.out = qemu.AppendPackage(e.out, ev.Payload)
	case qemu.EventTail:
		e.out = append(e.out, ev.Payload...)
	case qemu.EventEnd:
		e.out = qemu.AppendEOF(e.out)
	}
}

func (e *encoder) begin(section uint32) {
	if e.open {
		return
	}
	e.out, e.open = qemu.AppendPartStart(e.out, section), true
	// QEMU is free to name the block again at the beginning of a section.
	const continues = 0x20
	if first := e.like[len(e.out):]; len(first) >= 8 && first[7]&continues == 0 {
		e.state = qemu.PageState{}
	}
}

// end writes the END. One with pages was begun as if it were a PART.
func (e *encoder) end(section uint32) {
	if !e.open {
		e.out = qemu.AppendRAMEnd(e.out, section)
		return
	}
	part := qemu.AppendPartStart(nil, section)
	i := bytes.LastIndex(e.out, part)
	e.out[i] = qemu.AppendRAMEnd(nil, section)[0]
	e.out, e.open = qemu.AppendPartEnd(e.out, section), false
}

// TestRecordedRoundTrip encodes what was decoded, and wants the same bytes.
func TestRecordedRoundTrip(t *testing.T) {
	for name := range wantRecorded() {
		if strings.HasPrefix(name, "multifd") {
			continue // MULTIFD_FLUSH is read, never written
		}
		stream := recorded(t, name)
		d := qemu.NewDecoder(bytes.NewReader(stream), qemu.DecoderOptions{})
		e := &encoder{setup: d.Setup(), like: stream}
		var ev qemu.Event
		for {
			err := d.Next(&ev)
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			e.add(&ev)
			if !e.open && !bytes.HasPrefix(stream, e.out) {
				t.Fatalf("%s: differs before %v, byte %d of %d", name, ev.Kind, len(e.out), len(stream))
			}
		}
		if rest := stream[len(e.out):]; len(rest) > 0 && (rest[0] != 0x06 || rest[5] != '{') {
			t.Errorf("%s: %d bytes are missing: %.20x", name, len(rest), rest)
		}
	}
}
