// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"strings"

	"scattergather.io/scattergather/internal/pages"
)

// virtioMemEarly is the only device state QEMU sends before the memory
// (hw/virtio/virtio-mem.c, vmstate_virtio_mem_device_early); in front of it may
// stand the device's path.
const (
	virtioMemEarly        = "virtio-mem-device-early"
	virtioMemEarlyVersion = 1
	// virtioMemFixed: address, region size, block size (be64 each), node
	// (be32), size (be64).
	virtioMemFixed = 8 + 8 + 8 + 4 + 8
)

// early reads, and keeps verbatim, a FULL section of the set-up phase, of which
// the type has been read. It has no length, so its content must be known.
func (d *Decoder) early() error {
	var h RAMStart
	name, err := d.sectionHeader(&h)
	if err != nil {
		return err
	}
	if name != virtioMemEarly && !strings.HasSuffix(name, "/"+virtioMemEarly) {
		return foreignSection(name)
	}
	if h.Version != virtioMemEarlyVersion {
		return fmt.Errorf("section %q of version %d, known is %d: %w", name, h.Version, virtioMemEarlyVersion, ErrUnsupported)
	}
	out := be.AppendUint32(append(d.setup.Early, itemFull), h.Section)
	out = appendName(out, name)
	out = be.AppendUint32(be.AppendUint32(out, h.Instance), h.Version)
	p, err := d.r.take(virtioMemFixed)
	if err != nil {
		return err
	}
	region, block := be.Uint64(p[8:]), be.Uint64(p[16:])
	if block == 0 || region%block != 0 || region > pages.MaxBytes {
		return fmt.Errorf("section %q: a region of %d bytes in blocks of %d", name, region, block)
	}
	words := (region/block + 63) / 64
	if n := words*8 + uint64(len(out)); n > maxEarlyBytes {
		return fmt.Errorf("section %q: early device state of %d bytes, the most is %d", name, n, maxEarlyBytes)
	}
	out = append(out, p...)
	bitmap, err := d.r.takeLarge(nil, int(words*8))
	if err != nil {
		return endOf(err, 1)
	}
	out = append(out, bitmap...)
	if err := d.footer(h.Section); err != nil {
		return fmt.Errorf("section %q: %w", name, err)
	}
	d.setup.Early = be.AppendUint32(append(out, itemFooter), h.Section)
	return nil
}

// refuseSection names the section of a START or FULL item, of which the type
// has been read, in an error.
func (d *Decoder) refuseSection(item string) error {
	var h RAMStart
	name, err := d.sectionHeader(&h)
	if err != nil {
		return err
	}
	if name == ramName {
		return fmt.Errorf("%s of section %q in the middle of the stream", item, name)
	}
	return foreignSection(name)
}

// foreignSection is the refusal of a section other than "ram": sections have no
// length, so one that is not understood cannot be passed over.
func foreignSection(name string) error {
	cure := "detach that device before migrating"
	switch {
	case name == "block":
		cure = "turn the capability block off and mirror the disks by other means"
	case name == "dirty-bitmap":
		cure = "turn the capability dirty-bitmaps off"
	case strings.HasSuffix(name, "vfio"):
		cure = "detach the vfio device"
	case name == "slirp":
		cure = "use another network backend than user-mode networking"
	}
	return fmt.Errorf("state of %q travels with the memory; %s: %w", name, cure, ErrUnsupported)
}
