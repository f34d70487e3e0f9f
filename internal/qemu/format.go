// SPDX-License-Identifier: Apache-2.0

package qemu

// The types of the items a stream consists of (QEMU migration/savevm.h).
const (
	itemEOF           = 0x00
	itemStart         = 0x01
	itemPart          = 0x02
	itemEnd           = 0x03
	itemFull          = 0x04
	itemSubsection    = 0x05
	itemDescription   = 0x06
	itemConfiguration = 0x07
	itemCommand       = 0x08
	itemFooter        = 0x7e
)

const (
	streamMagic   = 0x5145564d // "QEVM"
	streamVersion = 3
	multifdMagic  = 0x11223344
	ramName       = "ram"
	ramVersion    = 4
)

// The flags in the low bits of a page record's header (QEMU migration/ram.c).
const (
	flagFull         = 0x001
	flagZero         = 0x002
	flagMemSize      = 0x004
	flagPage         = 0x008
	flagEOS          = 0x010
	flagContinue     = 0x020
	flagXBZRLE       = 0x040
	flagHook         = 0x080
	flagCompress     = 0x100
	flagMultifdFlush = 0x200
)

// Bounds on what a peer may say. A stock QEMU stays far below each of them.
const (
	maxMachine      = 1 << 10  // bytes of a machine type's name
	maxSubsections  = 16       // of the configuration
	maxCapabilities = 64       // in the configuration
	maxEarlyBytes   = 16 << 20 // device state in the set-up phase
	maxStartFlushes = 16       // MULTIFD_FLUSH records behind the block table
	maxPackagePings = 16       // PINGs at the end of a package
	maxTailEnds     = 64       // places where a tail's description could begin
)
