// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"fmt"
	"math/bits"
	"strings"

	"scattergather.io/scattergather/internal/pages"
)

// beginning reads magic, version and the configuration section.
func (d *Decoder) beginning() error {
	if err := d.magic(); err != nil {
		return err
	}
	s := d.setup
	p, err := d.keep(5)
	if err != nil {
		return err
	}
	if p[0] != itemConfiguration {
		return fmt.Errorf("stream without a configuration section (send-configuration=off): %w", ErrUnsupported)
	}
	n := be.Uint32(p[1:])
	if n == 0 || n > maxMachine {
		return fmt.Errorf("machine name of %d bytes, the most is %d", n, maxMachine)
	}
	if p, err = d.keep(int(n)); err != nil {
		return err
	}
	if !printable(p) {
		return fmt.Errorf("machine name %q is not a name", p)
	}
	s.Machine = string(p)
	for range maxSubsections {
		// The section has no length: it ends where no subsection follows.
		if p, err = d.r.need(1); err != nil {
			return err
		}
		if p[0] != itemSubsection {
			return nil
		}
		if err := d.subsection(); err != nil {
			return err
		}
	}
	return fmt.Errorf("configuration with more than %d subsections", maxSubsections)
}

// magic reads and names what else may come where a stream should begin.
func (d *Decoder) magic() error {
	p, err := d.r.need(2)
	if err != nil {
		return err
	}
	if p[0] == 0x16 && p[1] == 0x03 {
		return fmt.Errorf("the source speaks TLS; clear the parameter tls-creds, the stream must stay on a local socket: %w", ErrUnsupported)
	}
	if p, err = d.keep(8); err != nil {
		return err
	}
	switch magic := be.Uint32(p); {
	case magic == multifdMagic:
		return fmt.Errorf("this is a multifd channel, not the main one; turn the capability multifd off: %w", ErrUnsupported)
	case magic != streamMagic:
		return fmt.Errorf("not a QEMU migration stream (begins with %#08x)", magic)
	}
	if v := be.Uint32(p[4:]); v != streamVersion {
		return fmt.Errorf("stream version %d, known is %d: %w", v, streamVersion, ErrUnsupported)
	}
	return nil
}

// keep takes n bytes of the beginning and keeps them in Setup.Config.
func (d *Decoder) keep(n int) ([]byte, error) {
	p, err := d.r.take(n)
	d.setup.Config = append(d.setup.Config, p...)
	return p, err
}

// subsection reads one subsection of the configuration (QEMU migration/savevm.c,
// vmstate_configuration).
func (d *Decoder) subsection() error {
	p, err := d.keep(2)
	if err != nil {
		return err
	}
	if p, err = d.keep(int(p[1]) + 4); err != nil {
		return err
	}
	name, version := string(p[:len(p)-4]), be.Uint32(p[len(p)-4:])
	if version != 1 {
		return fmt.Errorf("subsection %q of version %d, known is 1: %w", name, version, ErrUnsupported)
	}
	switch name {
	case "configuration/target-page-bits":
		if p, err = d.keep(4); err != nil {
			return err
		}
		if b := be.Uint32(p); b != uint32(bits.TrailingZeros(pages.Size)) {
			return fmt.Errorf("target pages of 2^%d bytes; only x86-64's 4096 are carried: %w", b, ErrUnsupported)
		}
		return nil
	case "configuration/capabilities":
		return d.capabilities()
	case "configuration/uuid":
		p, err = d.keep(16)
		d.setup.UUID = bytes.Clone(p)
		return err
	}
	return fmt.Errorf("subsection %q of the configuration: %w", name, ErrUnsupported)
}

// capabilities reads the list of capabilities that both sides must agree on;
// QEMU lists only such as are on and change what the stream holds.
func (d *Decoder) capabilities() error {
	p, err := d.keep(4)
	if err != nil {
		return err
	}
	n := be.Uint32(p)
	if n > maxCapabilities {
		return fmt.Errorf("%d capabilities, the most is %d", n, maxCapabilities)
	}
	for range n {
		if p, err = d.keep(1); err != nil {
			return err
		}
		if p, err = d.keep(int(p[0])); err != nil {
			return err
		}
		d.setup.Capabilities = append(d.setup.Capabilities, string(p))
	}
	if n > 0 {
		return fmt.Errorf("turn the capability %s off: %w", strings.Join(d.setup.Capabilities, ", "), ErrUnsupported)
	}
	return nil
}

// ramStart reads the START of the RAM section, of which the type has been read.
func (d *Decoder) ramStart() error {
	ram := &d.setup.RAM
	name, err := d.sectionHeader(ram)
	if err != nil {
		return err
	}
	if name != ramName {
		return foreignSection(name)
	}
	if ram.Instance != 0 || ram.Version != ramVersion {
		return fmt.Errorf("RAM section of instance %d, version %d; known is 0, %d: %w", ram.Instance, ram.Version, ramVersion, ErrUnsupported)
	}
	header, err := d.u64()
	if err != nil {
		return err
	}
	total := header &^ (pages.Size - 1)
	if header&(pages.Size-1) != flagMemSize || total == 0 || total > pages.MaxBytes {
		return fmt.Errorf("RAM section begins with %#x instead of the memory's size", header)
	}
	for total > 0 {
		if total, err = d.ramBlock(total); err != nil {
			return err
		}
	}
	if s := ram.PageSizes(); d.setup.Postcopy && s != d.advised {
		return fmt.Errorf("blocks with page sizes %#x, but POSTCOPY_ADVISE said %#x", s, d.advised)
	}
	d.stage = stageStart
	return nil
}

// sectionHeader reads what follows the type of a START or FULL item.
func (d *Decoder) sectionHeader(h *RAMStart) (string, error) {
	id, err := d.u32()
	if err != nil {
		return "", err
	}
	p, err := d.name()
	if err != nil {
		return "", err
	}
	name := string(p)
	if p, err = d.r.take(8); err != nil {
		return "", err
	}
	h.Section, h.Instance, h.Version = id, be.Uint32(p), be.Uint32(p[4:])
	return name, nil
}

// ramBlock reads one entry of the block table, with left bytes of memory still
// to come, and returns what is left after it.
func (d *Decoder) ramBlock(left uint64) (uint64, error) {
	ram := &d.setup.RAM
	p, err := d.name()
	if err != nil {
		return 0, fmt.Errorf("block %d of the RAM section: %w", len(ram.Blocks), err)
	}
	b := pages.Block{Name: string(p), PageSize: pages.Size}
	if b.Length, err = d.u64(); err != nil {
		return 0, err
	}
	if b.Length == 0 || !aligned(b.Length) || b.Length > left {
		return 0, fmt.Errorf("block %q of %d bytes, with %d left of the total", b.Name, b.Length, left)
	}
	if _, ok := d.blocks[b.Name]; ok || len(ram.Blocks) == pages.MaxBlocks {
		return 0, fmt.Errorf("block %q twice, or more than %d blocks", b.Name, pages.MaxBlocks)
	}
	if d.setup.Postcopy {
		if b.PageSize, err = d.pageSize(); err != nil {
			return 0, fmt.Errorf("block %q: %w", b.Name, err)
		}
	}
	d.blocks[b.Name] = len(ram.Blocks)
	ram.Blocks = append(ram.Blocks, b)
	return left - b.Length, nil
}

// pageSize reads the page size of a block if there is one. QEMU writes it for
// blocks whose pages are not the target's, and nothing says which. But its first
// byte is zero, which no name's length is; and the record that follows the last
// block is smaller than a page (a flag), which no page size is.
func (d *Decoder) pageSize() (uint64, error) {
	p, err := d.r.need(1)
	if err != nil || p[0] != 0 {
		return pages.Size, err
	}
	if p, err = d.r.need(8); err != nil {
		return 0, err
	}
	size := be.Uint64(p)
	if size < pages.Size {
		return pages.Size, nil
	}
	if size == pages.Size || bits.OnesCount64(size) != 1 || size&d.advised == 0 {
		return 0, fmt.Errorf("page size %d; POSTCOPY_ADVISE said %#x", size, d.advised)
	}
	d.r.r += 8
	return size, nil
}

// startRecord reads one of the records behind the block table: perhaps multifd
// flushes, then the EOS record and the footer.
func (d *Decoder) startRecord(ev *Event) error {
	if !d.footerDue {
		header, err := d.u64()
		if err != nil {
			return err
		}
		if err := d.startMark(header); err != nil {
			return err
		}
		if header == flagMultifdFlush || d.syncsAtEOS() {
			ev.Kind, ev.Section = EventSync, d.setup.RAM.Section
			return nil
		}
	}
	if err := d.footer(d.setup.RAM.Section); err != nil {
		return err
	}
	d.stage, d.footerDue, d.undecided = stageRAM, false, true
	return nil
}

func (d *Decoder) startMark(header uint64) error {
	switch {
	case header == flagEOS:
		d.footerDue = true
		return nil
	case header != flagMultifdFlush:
		return fmt.Errorf("record %#x behind the block table; are the blocks' page sizes what POSTCOPY_ADVISE said?", header)
	case !d.opt.Multifd:
		return errMultifd
	case d.flushes == maxStartFlushes:
		return fmt.Errorf("more than %d MULTIFD_FLUSH records behind the block table", maxStartFlushes)
	}
	d.flushes++
	d.setup.MultifdFlush = true
	return nil
}
