// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"encoding/binary"

	"scattergather.io/scattergather/internal/pages"
)

var be = binary.BigEndian

// AppendSetup appends the stream's beginning: magic, version, configuration.
func AppendSetup(dst []byte, s *Setup) []byte { return append(dst, s.Config...) }

// AppendOpening appends all a destination with postcopy-ram on must read before
// its first page, discard or package: the stream's beginning, OPEN_RETURN_PATH,
// PING with the value given, ADVISE, the START of the RAM section and the early
// device state. ParseSetup is its inverse.
func AppendOpening(dst []byte, s *Setup, ping uint32) []byte {
	dst = AppendSetup(dst, s)
	dst = AppendCommand(dst, CommandOpenReturnPath, nil)
	dst = AppendPing(dst, ping)
	dst = AppendAdvise(dst, s.RAM.PageSizes(), pages.Size)
	dst = AppendRAMStart(dst, s, true)
	return append(dst, s.Early...)
}

// AppendCommand appends a command; the payload must be shorter than 64 KiB.
func AppendCommand(dst []byte, c Command, payload []byte) []byte {
	dst = appendCommandHeader(dst, c, len(payload))
	return append(dst, payload...)
}

func appendCommandHeader(dst []byte, c Command, n int) []byte {
	dst = append(dst, itemCommand)
	dst = be.AppendUint16(dst, uint16(c))
	return be.AppendUint16(dst, uint16(n))
}

// AppendPing appends a PING; the peer answers with a PONG of the same value
// when everything before it has been processed.
func AppendPing(dst []byte, value uint32) []byte {
	return be.AppendUint32(appendCommandHeader(dst, CommandPing, 4), value)
}

// AppendAdvise appends POSTCOPY_ADVISE. The summary is the bitwise OR of all
// blocks' page sizes (RAMStart.PageSizes), target the target's page size.
func AppendAdvise(dst []byte, summary, target uint64) []byte {
	dst = appendCommandHeader(dst, CommandPostcopyAdvise, 16)
	dst = be.AppendUint64(dst, summary)
	return be.AppendUint64(dst, target)
}

// AppendRAMStart appends the START of the RAM section with its block table.
// With postcopy, blocks whose page size is not pages.Size say so.
func AppendRAMStart(dst []byte, s *Setup, postcopy bool) []byte {
	r := &s.RAM
	dst = append(dst, itemStart)
	dst = be.AppendUint32(dst, r.Section)
	dst = appendName(dst, ramName)
	dst = be.AppendUint32(dst, r.Instance)
	dst = be.AppendUint32(dst, r.Version)
	dst = be.AppendUint64(dst, r.Total()|flagMemSize)
	for i := range r.Blocks {
		b := &r.Blocks[i]
		dst = appendName(dst, b.Name)
		dst = be.AppendUint64(dst, b.Length)
		if postcopy && b.PageSize != pages.Size {
			dst = be.AppendUint64(dst, b.PageSize)
		}
	}
	return AppendPartEnd(dst, r.Section)
}

// AppendDiscard appends POSTCOPY_RAM_DISCARD commands for ranges of one block,
// as many as the ranges need. A destination needs at least one before LISTEN.
func AppendDiscard(dst []byte, block string, ranges []Range) []byte {
	for len(ranges) > 0 {
		n := min(len(ranges), maxDiscardRanges)
		dst = appendCommandHeader(dst, CommandPostcopyDiscard, 3+len(block)+16*n)
		dst = append(dst, 0)
		dst = appendName(dst, block)
		dst = append(dst, 0)
		for _, r := range ranges[:n] {
			dst = be.AppendUint64(dst, r.Start)
			dst = be.AppendUint64(dst, r.Length)
		}
		ranges = ranges[n:]
	}
	return dst
}

// maxDiscardRanges is what AppendDiscard puts into one command: what stock QEMU
// does (migration/postcopy-ram.c, MAX_DISCARDS_PER_COMMAND).
const maxDiscardRanges = 12

// AppendPackage appends PACKAGED and the package. Only the 9 bytes in front of
// the package are new, so AppendPackageHeader serves who does not want a copy.
func AppendPackage(dst, pkg []byte) []byte {
	return append(AppendPackageHeader(dst, len(pkg)), pkg...)
}

// AppendPackageHeader appends PACKAGED for a package of n bytes that follows.
func AppendPackageHeader(dst []byte, n int) []byte {
	return be.AppendUint32(appendCommandHeader(dst, CommandPackaged, 4), uint32(n))
}

// AppendRecvBitmap appends RECV_BITMAP: the destination of a resumed migration
// answers with the bitmap of the pages of that block it has.
func AppendRecvBitmap(dst []byte, block string) []byte {
	dst = appendCommandHeader(dst, CommandRecvBitmap, 1+len(block))
	return appendName(dst, block)
}

// AppendPartStart appends the beginning of a PART of the RAM section.
func AppendPartStart(dst []byte, section uint32) []byte {
	return be.AppendUint32(append(dst, itemPart), section)
}

// AppendPartEnd appends the end of a PART: EOS record and footer.
func AppendPartEnd(dst []byte, section uint32) []byte {
	dst = AppendEOS(dst)
	return be.AppendUint32(append(dst, itemFooter), section)
}

// AppendEOS appends an EOS record alone; the preempt channel has no sections.
func AppendEOS(dst []byte) []byte { return be.AppendUint64(dst, flagEOS) }

// AppendRAMEnd appends an END of the RAM section without any page.
func AppendRAMEnd(dst []byte, section uint32) []byte {
	dst = be.AppendUint32(append(dst, itemEnd), section)
	return AppendPartEnd(dst, section)
}

// AppendEOF appends the mark that ends the stream.
func AppendEOF(dst []byte) []byte { return append(dst, itemEOF) }

// PageState is what one channel remembers from record to record: which block
// the last one was of. The zero value is the state of a new channel; a channel
// of a resumed migration is new.
type PageState struct {
	next int // block+1 of the last record, 0 for none
}

// AppendPageHeader appends the header of a page record; pages.Size bytes of
// data must follow. The name and index of the block and the page's offset are
// trusted: they are the caller's own.
func AppendPageHeader(dst []byte, st *PageState, name string, block int, offset uint64) []byte {
	return st.appendHeader(dst, name, block, offset|flagPage)
}

// AppendPage appends a whole page record; data must be pages.Size bytes.
func AppendPage(dst []byte, st *PageState, name string, block int, offset uint64, data []byte) []byte {
	return append(AppendPageHeader(dst, st, name, block, offset), data[:pages.Size]...)
}

// AppendZero appends the record of a page of zeros.
func AppendZero(dst []byte, st *PageState, name string, block int, offset uint64) []byte {
	return append(st.appendHeader(dst, name, block, offset|flagZero), 0)
}

func (st *PageState) appendHeader(dst []byte, name string, block int, header uint64) []byte {
	if st.next == block+1 {
		return be.AppendUint64(dst, header|flagContinue)
	}
	st.next = block + 1
	return appendName(be.AppendUint64(dst, header), name)
}

func appendName(dst []byte, name string) []byte {
	return append(append(dst, byte(len(name))), name...)
}
