// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"scattergather.io/scattergather/internal/pages"
)

// DecoderOptions bounds a Decoder. Zero values mean the defaults.
type DecoderOptions struct {
	// MaxPackage is the most bytes of device state in one package; default
	// 64 MiB. Memory grows with what has arrived, not with what was announced.
	MaxPackage int
	// MaxTail is the same for the device state and its description at the end
	// of a pre-copy migration; default 64 MiB.
	MaxTail int
	// BufferBytes is the size of the read buffer; default 256 KiB, least
	// 16 KiB.
	BufferBytes int
	// Multifd tells that the caller reads the multifd channels. Without it a
	// MULTIFD_FLUSH record is refused, because pages would be missing.
	Multifd bool
	// Resume is set for the stream of a source that resumes a paused post-copy
	// migration: such a stream has no beginning, so what the first one said is
	// given here. It must not be changed afterwards.
	Resume *Setup
}

const defaultDeviceState = 64 << 20

// Decoder reads the main stream of a source QEMU. It is not safe for concurrent
// use. It reads no further than what has arrived: it never waits for more than
// the next event needs. Deadlines belong to whoever owns the connection.
type Decoder struct {
	r   reader
	opt DecoderOptions
	err error // sticky

	setup   *Setup
	advised uint64 // page sizes in POSTCOPY_ADVISE
	blocks  map[string]int
	block   int // block of the last page record, -1 for none

	stage     stage
	records   bool // inside a PART or END of the RAM section
	ending    bool // … and it is the END
	packaged  bool // the package was seen: the migration ends in post-copy
	footerDue bool // the EOS record of a section was read, its footer was not
	undecided bool // the START was read but its event not delivered
	flushes   int  // MULTIFD_FLUSH records in the START

	large  []byte  // package or tail
	ranges []Range // of the last discard
}

// stage is how far a stream has come.
type stage uint8

const (
	stageBegin  stage = iota // nothing read
	stageSetup               // configuration read
	stageStart               // block table read
	stageRAM                 // START of the RAM section read
	stageEnding              // END of the RAM section read
	stageTail                // tail delivered
	stageDone                // EventEnd delivered
)

// NewDecoder returns a decoder of the stream r.
func NewDecoder(r io.Reader, o DecoderOptions) *Decoder {
	if o.MaxPackage <= 0 {
		o.MaxPackage = defaultDeviceState
	}
	if o.MaxTail <= 0 {
		o.MaxTail = defaultDeviceState
	}
	if o.BufferBytes <= 0 {
		o.BufferBytes = defaultBuffer
	}
	d := &Decoder{
		r:      newReader(r, max(o.BufferBytes, leastBuffer)),
		opt:    o,
		setup:  &Setup{},
		blocks: make(map[string]int),
		block:  -1,
	}
	if o.Resume != nil {
		d.setup, d.stage, d.packaged = o.Resume, stageRAM, true
		for i := range o.Resume.RAM.Blocks {
			d.blocks[o.Resume.RAM.Blocks[i].Name] = i
		}
	}
	return d
}

// Setup returns what is known so far of the stream's beginning: Config, Machine
// and Capabilities from EventSetup on, all of it from EventRAMStart on. It must
// not be changed.
func (d *Decoder) Setup() *Setup { return d.setup }

// Buffered returns how many bytes have arrived and are not decoded yet. Less
// than a page record (pages.Size plus at most 264 bytes) means that Next may
// have to wait: the moment to flush half-full batches.
func (d *Decoder) Buffered() int { return d.r.buffered() }

// Offset returns the bytes of the stream decoded so far.
func (d *Decoder) Offset() uint64 { return d.r.offset() }

// Next reads the next event. It returns io.EOF after EventEnd. Any other error
// is final, names the place in the stream, and wraps ErrUnsupported if the
// stream is legal but not carried, io.ErrUnexpectedEOF if it ended early, or
// the reader's own error.
func (d *Decoder) Next(ev *Event) error {
	if d.err != nil {
		return d.err
	}
	*ev = Event{}
	at := d.r.offset()
	var err error
	if d.records {
		err = d.record(ev)
	} else {
		err = d.step(ev)
	}
	if err != nil {
		*ev = Event{}
		d.err = d.explain(err, at)
	}
	return d.err
}

// explain gives an error its place in the stream. An end of the stream is
// io.EOF only where the stream may end.
func (d *Decoder) explain(err error, at uint64) error {
	if err == io.EOF && d.stage == stageDone {
		return err
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("migration stream at byte %d: the source closed it early: %w", at, err)
	}
	return fmt.Errorf("migration stream at byte %d: %w", at, err)
}

// step reads the next event outside the records of a section.
func (d *Decoder) step(ev *Event) error {
	switch d.stage {
	case stageBegin:
		if err := d.beginning(); err != nil {
			return err
		}
		d.stage = stageSetup
		ev.Kind = EventSetup
		return nil
	case stageEnding:
		if !d.packaged {
			return d.tail(ev)
		}
	case stageTail:
		return d.end(ev)
	case stageDone:
		return io.EOF
	}
	return d.items(ev)
}

// items reads items until one of them makes an event.
func (d *Decoder) items(ev *Event) error {
	for ev.Kind == 0 && !d.records {
		if d.stage == stageStart {
			if err := d.startRecord(ev); err != nil {
				return err
			}
			continue
		}
		p, err := d.r.need(1)
		if d.undecided && (err != nil || p[0] != itemFull) {
			// Nothing of the set-up follows any more.
			d.undecided = false
			ev.Kind, ev.Section = EventRAMStart, d.setup.RAM.Section
			return nil //nolint:nilerr // the next call meets an error again
		}
		if err != nil {
			return err
		}
		kind := p[0]
		d.r.r++
		if err := d.item(ev, kind); err != nil {
			return err
		}
	}
	if ev.Kind == 0 {
		return d.record(ev)
	}
	return nil
}

// item reads one item, of which the type has been read.
func (d *Decoder) item(ev *Event, kind byte) error {
	switch {
	case d.stage == stageEnding && kind != itemEOF:
		return fmt.Errorf("item of type %#02x after the end of the RAM section", kind)
	case kind == itemEOF && d.stage == stageEnding:
		return d.end(ev)
	case kind == itemCommand:
		return d.command(ev)
	case kind == itemStart && d.stage == stageSetup:
		return d.ramStart()
	case kind == itemStart:
		return d.refuseSection("START")
	case kind == itemFull && (d.stage == stageSetup || d.undecided):
		return d.early()
	case kind == itemFull:
		return d.refuseSection("FULL")
	case (kind == itemPart || kind == itemEnd) && d.stage == stageRAM:
		return d.sectionStart(kind == itemEnd)
	}
	return fmt.Errorf("unexpected item of type %#02x", kind)
}

// sectionStart reads the header of a PART or END, which must be of the RAM
// section: no other could be told from its neighbour, having no length.
func (d *Decoder) sectionStart(end bool) error {
	id, err := d.u32()
	if err != nil {
		return err
	}
	if id != d.setup.RAM.Section {
		return fmt.Errorf("section %d was never started; the RAM section is %d", id, d.setup.RAM.Section)
	}
	d.records, d.ending = true, end
	return nil
}

func (d *Decoder) end(ev *Event) error {
	d.stage = stageDone
	ev.Kind = EventEnd
	return nil
}

// footer reads the footer of a section.
func (d *Decoder) footer(section uint32) error {
	p, err := d.r.take(5)
	if err != nil {
		return err
	}
	if p[0] != itemFooter || be.Uint32(p[1:]) != section {
		return fmt.Errorf("section %d has no footer (found % x)", section, p)
	}
	return nil
}

func (d *Decoder) u32() (uint32, error) {
	p, err := d.r.take(4)
	if err != nil {
		return 0, err
	}
	return be.Uint32(p), nil
}

func (d *Decoder) u64() (uint64, error) {
	p, err := d.r.take(8)
	if err != nil {
		return 0, err
	}
	return be.Uint64(p), nil
}

// name reads a name with a one-byte length; the slice is the buffer's.
func (d *Decoder) name() ([]byte, error) {
	p, err := d.r.need(1)
	if err != nil {
		return nil, err
	}
	n := int(p[0])
	p, err = d.r.take(1 + n)
	if err != nil {
		return nil, err
	}
	if p = p[1:]; !printable(p) {
		return nil, fmt.Errorf("name %q is not a name", p)
	}
	return p, nil
}

// printable says whether p can be a name of QEMU's: printable ASCII, not empty.
func printable(p []byte) bool {
	for _, c := range p {
		if c < ' ' || c > '~' {
			return false
		}
	}
	return len(p) > 0
}

// ParseSetup decodes the opening built by AppendOpening, and nothing behind it.
func ParseSetup(opening []byte) (*Setup, error) {
	d := NewDecoder(bytes.NewReader(opening), DecoderOptions{BufferBytes: leastBuffer})
	var ev Event
	for ev.Kind != EventRAMStart {
		if err := d.Next(&ev); err != nil {
			return nil, fmt.Errorf("opening of a migration: %w", err)
		}
	}
	if n := uint64(len(opening)) - d.Offset(); n != 0 {
		return nil, fmt.Errorf("opening of a migration: %d bytes behind its end", n)
	}
	return d.Setup(), nil
}

// aligned says whether every number is a multiple of the stream's page.
func aligned(v ...uint64) bool {
	for _, x := range v {
		if x%pages.Size != 0 {
			return false
		}
	}
	return true
}
