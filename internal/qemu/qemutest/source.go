// SPDX-License-Identifier: Apache-2.0

// Package qemutest writes legal migration streams of a source QEMU, for tests of
// whatever reads them.
package qemutest

import (
	"encoding/binary"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
)

// Machine is the machine type of the streams.
const Machine = "pc-q35-10.0"

// Section is the id of their RAM section.
const Section = 1

// NewSetup returns the setup of a VM with these blocks; postcopy says whether
// the source has postcopy-ram on.
func NewSetup(postcopy bool, blocks ...pages.Block) *qemu.Setup {
	config := binary.BigEndian.AppendUint32([]byte("QEVM\x00\x00\x00\x03\x07"), uint32(len(Machine)))
	return &qemu.Setup{
		Config:   append(config, Machine...),
		Machine:  Machine,
		Postcopy: postcopy,
		RAM:      qemu.RAMStart{Section: Section, Version: 4, Blocks: blocks},
	}
}

// Page is a page to send; nil data is a page of zeros.
type Page struct {
	Block  int
	Offset uint64
	Data   []byte
}

// Source builds a stream in memory.
type Source struct {
	Setup *qemu.Setup
	out   []byte
	state qemu.PageState
}

// NewSource begins a stream, up to and including the START of the RAM section.
// As with QEMU, a source with postcopy-ram opens the return path and sends
// PING 1.
func NewSource(s *qemu.Setup) *Source {
	if s.Postcopy {
		return &Source{Setup: s, out: qemu.AppendOpening(nil, s, 1)}
	}
	out := qemu.AppendRAMStart(qemu.AppendSetup(nil, s), s, false)
	return &Source{Setup: s, out: append(out, s.Early...)}
}

// Part appends a PART of the RAM section with these pages.
func (s *Source) Part(list ...Page) {
	s.out = qemu.AppendPartStart(s.out, s.Setup.RAM.Section)
	for _, p := range list {
		name := s.Setup.RAM.Blocks[p.Block].Name
		if p.Data == nil {
			s.out = qemu.AppendZero(s.out, &s.state, name, p.Block, p.Offset)
			continue
		}
		s.out = qemu.AppendPage(s.out, &s.state, name, p.Block, p.Offset, p.Data)
	}
	s.out = qemu.AppendPartEnd(s.out, s.Setup.RAM.Section)
}

// Discard appends the discard of ranges of a block.
func (s *Source) Discard(block int, ranges ...qemu.Range) {
	s.out = qemu.AppendDiscard(s.out, s.Setup.RAM.Blocks[block].Name, ranges)
}

// Switch appends what a source sends when it stops its guest to go on in
// post-copy: PING 2, the package with the device state and these PINGs, PING 4.
func (s *Source) Switch(device []byte, pings ...uint32) {
	pkg := qemu.AppendCommand(nil, qemu.CommandPostcopyListen, nil)
	pkg = append(pkg, device...)
	for _, p := range pings {
		pkg = qemu.AppendPing(pkg, p)
	}
	pkg = qemu.AppendCommand(pkg, qemu.CommandPostcopyRun, nil)
	s.out = qemu.AppendPing(s.out, 2)
	s.out = qemu.AppendPackage(s.out, pkg)
	s.out = qemu.AppendPing(s.out, 4)
}

// EndPostcopy appends the end of a stream after Switch.
func (s *Source) EndPostcopy() {
	s.out = qemu.AppendEOF(qemu.AppendRAMEnd(s.out, s.Setup.RAM.Section))
}

// EndPrecopy appends the end of a stream that never switched: the END of the
// RAM section, the device state, the EOF mark and the description.
func (s *Source) EndPrecopy(device []byte) {
	s.out = append(qemu.AppendRAMEnd(s.out, s.Setup.RAM.Section), device...)
	s.out = AppendDescription(qemu.AppendEOF(s.out), `{"devices": []}`)
}

// AppendDescription appends a description of the device state, JSON text.
func AppendDescription(dst []byte, text string) []byte {
	dst = binary.BigEndian.AppendUint32(append(dst, 0x06), uint32(len(text)))
	return append(dst, text...)
}

// Take returns what was appended since the last Take.
func (s *Source) Take() []byte {
	out := s.out
	s.out = nil
	return out
}
