// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"fmt"
	"math/bits"

	"scattergather.io/scattergather/internal/pages"
)

// commandLengths are the lengths of the payloads, -1 where they vary.
var commandLengths = [...]int{
	CommandOpenReturnPath: 0, CommandPing: 4, CommandPostcopyAdvise: -1,
	CommandPostcopyListen: 0, CommandPostcopyRun: 0, CommandPostcopyDiscard: -1,
	CommandPackaged: 4, CommandEnableCOLO: 0, CommandPostcopyResume: 0,
	CommandRecvBitmap: -1, CommandSwitchoverStart: 0,
}

// command reads a command, of which the item's type has been read.
func (d *Decoder) command(ev *Event) error {
	p, err := d.r.take(4)
	if err != nil {
		return err
	}
	c, n := Command(be.Uint16(p)), int(be.Uint16(p[2:]))
	if c == 0 || int(c) >= len(commandLengths) {
		return fmt.Errorf("command %d of %d bytes, the last known is %d; is the source a newer QEMU?: %w", c, n, len(commandLengths)-1, ErrUnsupported)
	}
	if want := commandLengths[c]; want >= 0 && n != want {
		return fmt.Errorf("%v with %d bytes, it has %d", c, n, want)
	}
	if n <= leastBuffer {
		p, err = d.r.take(n)
	} else {
		d.large, err = d.r.takeLarge(d.large, n)
		p = d.large
	}
	if err != nil {
		return endOf(err, 1)
	}
	ev.Kind, ev.Command, ev.Payload = EventCommand, c, p
	if err := d.understand(ev); err != nil {
		return fmt.Errorf("%v: %w", c, err)
	}
	return nil
}

// understand checks a command's payload and its place in the stream.
func (d *Decoder) understand(ev *Event) error {
	switch ev.Command {
	case CommandPing:
		ev.Ping = be.Uint32(ev.Payload)
	case CommandPostcopyAdvise:
		return d.advise(ev.Payload)
	case CommandPostcopyDiscard:
		return d.discard(ev)
	case CommandPackaged:
		return d.packageBody(ev)
	case CommandRecvBitmap, CommandPostcopyResume:
		if d.opt.Resume == nil {
			return errors.New("in a stream that is not a resumed one")
		}
		if ev.Command == CommandRecvBitmap {
			return d.recvBitmap(ev)
		}
	case CommandPostcopyListen, CommandPostcopyRun:
		return errors.New("outside a package")
	case CommandEnableCOLO:
		return fmt.Errorf("turn the capability x-colo off: %w", ErrUnsupported)
	}
	return nil
}

// advise reads POSTCOPY_ADVISE, which tells what the block table looks like.
func (d *Decoder) advise(p []byte) error {
	if len(p) == 0 {
		return fmt.Errorf("of dirty bitmaps alone; turn the capability dirty-bitmaps off: %w", ErrUnsupported)
	}
	if len(p) != 16 || d.stage != stageSetup || d.setup.Postcopy {
		return fmt.Errorf("with %d bytes (it has 16), twice, or behind the block table", len(p))
	}
	summary, target := be.Uint64(p), be.Uint64(p[8:])
	if target != pages.Size {
		return fmt.Errorf("target pages of %d bytes; only x86-64's %d are carried: %w", target, pages.Size, ErrUnsupported)
	}
	if summary == 0 || bits.TrailingZeros64(summary) < bits.TrailingZeros(pages.Size) || bits.Len64(summary) > 48 {
		return fmt.Errorf("impossible page sizes %#x", summary)
	}
	d.setup.Postcopy, d.advised = true, summary
	return nil
}

// discard reads POSTCOPY_RAM_DISCARD: pages the source will send again.
func (d *Decoder) discard(ev *Event) error {
	if d.stage != stageRAM || d.packaged || !d.setup.Postcopy {
		return errors.New("not between POSTCOPY_ADVISE and the package")
	}
	name, err := d.parseDiscard(ev.Payload)
	if err != nil {
		return err
	}
	i, ok := d.blocks[string(name)]
	if !ok {
		return fmt.Errorf("unknown block %q", name)
	}
	for _, r := range d.ranges {
		if n := d.setup.RAM.Blocks[i].Length; r.Start >= n || r.Length > n-r.Start {
			return fmt.Errorf("range %#x+%#x of block %q, which has %d bytes", r.Start, r.Length, name, n)
		}
	}
	ev.Block, ev.Ranges = i, d.ranges
	return nil
}

func (d *Decoder) parseDiscard(payload []byte) (name []byte, err error) {
	name, d.ranges, err = parseDiscard(payload, d.ranges[:0])
	return name, err
}

// packageBody reads the package that follows PACKAGED.
func (d *Decoder) packageBody(ev *Event) error {
	if d.stage != stageRAM || d.packaged || !d.setup.Postcopy {
		return errors.New("twice, or not behind POSTCOPY_ADVISE and the block table")
	}
	n := uint64(be.Uint32(ev.Payload))
	if n == 0 || n > uint64(d.opt.MaxPackage) {
		return fmt.Errorf("%d bytes of device state, the most is %d", n, d.opt.MaxPackage)
	}
	var err error
	if d.large, err = d.r.takeLarge(nil, int(n)); err != nil {
		return endOf(err, 1)
	}
	d.packaged = true
	ev.Kind, ev.Payload = EventPackage, d.large
	return nil
}

// recvBitmap reads RECV_BITMAP, the question of a resuming source which pages
// of a block were received.
func (d *Decoder) recvBitmap(ev *Event) error {
	name, rest, ok := cutName(ev.Payload)
	if !ok || len(rest) > 0 {
		return errors.New("malformed block name")
	}
	i, ok := d.blocks[string(name)]
	if !ok {
		return fmt.Errorf("unknown block %q", name)
	}
	ev.Block = i
	return nil
}

// ParseDiscard decodes the payload of a POSTCOPY_RAM_DISCARD command. Decoder
// does so itself; the ranges are not checked against the block's length here.
func ParseDiscard(payload []byte) (block string, ranges []Range, err error) {
	name, ranges, err := parseDiscard(payload, nil)
	return string(name), ranges, err
}

// parseDiscard appends the ranges to dst (QEMU migration/savevm.c,
// loadvm_postcopy_ram_handle_discard).
func parseDiscard(p []byte, dst []Range) ([]byte, []Range, error) {
	if len(p) == 0 || p[0] != 0 {
		return nil, dst, fmt.Errorf("discard of unknown version (% x)", p[:min(1, len(p))])
	}
	name, p, ok := cutName(p[1:])
	if !ok || len(p) == 0 || p[0] != 0 {
		return nil, dst, errors.New("discard with a malformed block name")
	}
	if p = p[1:]; len(p) == 0 || len(p)%16 != 0 {
		return nil, dst, fmt.Errorf("discard with %d bytes of ranges", len(p))
	}
	for ; len(p) > 0; p = p[16:] {
		r := Range{Start: be.Uint64(p), Length: be.Uint64(p[8:])}
		if !aligned(r.Start, r.Length) || r.Length == 0 || r.Start+r.Length < r.Start {
			return nil, dst, fmt.Errorf("discard of the impossible range %#x+%#x", r.Start, r.Length)
		}
		dst = append(dst, r)
	}
	return name, dst, nil
}

// cutName splits a name with a one-byte length from what follows it.
func cutName(p []byte) (name, rest []byte, ok bool) {
	if len(p) == 0 || len(p) < 1+int(p[0]) {
		return nil, nil, false
	}
	name, rest = p[1:1+int(p[0])], p[1+int(p[0]):]
	return name, rest, printable(name)
}
