// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"

	"scattergather.io/scattergather/internal/pages"
)

var errMultifd = fmt.Errorf("pages travel on multifd channels; turn the capability multifd off: %w", ErrUnsupported)

// record reads one record of a PART or END of the RAM section. This is the hot
// path: nothing in it allocates or copies.
func (d *Decoder) record(ev *Event) error {
	if d.footerDue {
		return d.sectionEnd(ev)
	}
	p, err := d.r.take(8)
	if err != nil {
		return err
	}
	header := be.Uint64(p)
	offset := header &^ (pages.Size - 1)
	flags := header & (pages.Size - 1)
	ev.Section = d.setup.RAM.Section
	switch flags &^ flagContinue {
	case flagPage:
		if err := d.place(ev, offset, flags); err != nil {
			return err
		}
		ev.Kind = EventPage
		ev.Data, err = d.r.take(pages.Size)
		return err
	case flagZero:
		if err := d.place(ev, offset, flags); err != nil {
			return err
		}
		ev.Kind = EventZero
		if p, err = d.r.take(1); err == nil && p[0] != 0 {
			err = fmt.Errorf("page filled with %#02x instead of zeros", p[0])
		}
		return err
	}
	return d.mark(ev, header)
}

// place finds which page a record is of.
func (d *Decoder) place(ev *Event, offset, flags uint64) error {
	if flags&flagContinue == 0 {
		name, err := d.name()
		if err != nil {
			return err
		}
		i, ok := d.blocks[string(name)]
		if !ok {
			return fmt.Errorf("page of unknown block %q", name)
		}
		d.block = i
	}
	if d.block < 0 {
		return fmt.Errorf("first page record names no block")
	}
	b := &d.setup.RAM.Blocks[d.block]
	if offset >= b.Length {
		return fmt.Errorf("page at offset %#x of block %q, which has %d bytes", offset, b.Name, b.Length)
	}
	ev.Block, ev.Offset = d.block, offset
	return nil
}

// mark reads a record that is not a page.
func (d *Decoder) mark(ev *Event, header uint64) error {
	switch header {
	case flagEOS:
		d.footerDue = true
		if d.syncsAtEOS() {
			ev.Kind = EventSync
			return nil
		}
		return d.sectionEnd(ev)
	case flagMultifdFlush:
		if !d.opt.Multifd {
			return errMultifd
		}
		ev.Kind = EventSync
		return nil
	}
	return refuseRecord(header)
}

// syncsAtEOS says whether each EOS record is a multifd synchronisation point.
func (d *Decoder) syncsAtEOS() bool { return d.opt.Multifd && !d.setup.MultifdFlush }

// sectionEnd reads the footer behind the EOS record of a PART or END.
func (d *Decoder) sectionEnd(ev *Event) error {
	if err := d.footer(d.setup.RAM.Section); err != nil {
		return err
	}
	d.records, d.footerDue = false, false
	ev.Kind, ev.Section = EventSectionEnd, d.setup.RAM.Section
	if d.ending {
		ev.Kind = EventRAMEnd
		d.stage = stageEnding
	}
	return nil
}

// refuseRecord names a record that is not carried.
func refuseRecord(header uint64) error {
	switch header & (pages.Size - 1) &^ flagContinue {
	case flagXBZRLE:
		return fmt.Errorf("page as XBZRLE delta; turn the capability xbzrle off: %w", ErrUnsupported)
	case flagCompress:
		return fmt.Errorf("compressed page; turn the capability compress off: %w", ErrUnsupported)
	case flagHook:
		return fmt.Errorf("RDMA hook; migrate over a unix socket, not rdma: %w", ErrUnsupported)
	case flagMemSize:
		return fmt.Errorf("second block table in the RAM section")
	case flagFull:
		return fmt.Errorf("FULL record of an ancient QEMU: %w", ErrUnsupported)
	}
	return fmt.Errorf("record %#x of the RAM section is none", header)
}
