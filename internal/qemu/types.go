// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"fmt"

	"scattergather.io/scattergather/internal/pages"
)

// ErrUnsupported is wrapped by every error that tells of a legal stream this
// package does not carry. The error's text names the thing and the cure.
var ErrUnsupported = errors.New("unsupported by scatter-gather")

// EventKind says what Decoder.Next found.
type EventKind uint8

// The events, in the order in which a stream brings them: Setup, commands,
// RAMStart, then pages in sections, and at the end either a Package and further
// pages (post-copy) or a Tail (pre-copy), and End.
const (
	// EventSetup: magic, version and configuration were read; Decoder.Setup
	// now has Config, Machine and Capabilities.
	EventSetup EventKind = iota + 1
	// EventCommand: a command other than PACKAGED. Event.Command and
	// Event.Payload are set; for CommandPing also Event.Ping, for
	// CommandPostcopyDiscard also Event.Block and Event.Ranges.
	EventCommand
	// EventRAMStart: the set-up phase is over, Decoder.Setup is complete. It is
	// delivered when the item behind the set-up has begun to arrive, which a
	// source sends without waiting for anything but that EventSync is acted upon.
	EventRAMStart
	// EventPage: a page with data. Event.Block, Offset and Data are set.
	EventPage
	// EventZero: a page of zeros. Event.Block and Offset are set.
	EventZero
	// EventSectionEnd: a PART of the RAM section ended (EOS record and footer).
	EventSectionEnd
	// EventSync: a multifd synchronisation point, given by a MULTIFD_FLUSH
	// record or, without Setup.MultifdFlush, by an EOS record. Whatever was sent
	// on the multifd channels before their next SYNC packet comes before what
	// follows here. It is delivered when the record has arrived, not a byte
	// later, because the source may send no more before the channels move on; so
	// those of the START come before EventRAMStart. Setup.RAM is known at the
	// first one, but Setup.Early is not.
	EventSync
	// EventRAMEnd: the END of the RAM section (EOS record and footer).
	EventRAMEnd
	// EventPackage: a PACKAGED command; Event.Payload is the package.
	EventPackage
	// EventTail: the device state of a migration that ended in pre-copy.
	// Event.Payload is everything from the END of the RAM section to, but not
	// including, the final EOF mark; see WrapTail.
	EventTail
	// EventEnd: the stream is complete. Next then returns io.EOF.
	EventEnd
)

var eventNames = [...]string{
	EventSetup: "setup", EventCommand: "command", EventRAMStart: "ram start",
	EventPage: "page", EventZero: "zero page", EventSectionEnd: "section end",
	EventSync: "multifd sync", EventRAMEnd: "ram end", EventPackage: "package",
	EventTail: "tail", EventEnd: "end",
}

// String returns the event's name for logs and errors.
func (k EventKind) String() string {
	if int(k) < len(eventNames) && eventNames[k] != "" {
		return eventNames[k]
	}
	return fmt.Sprintf("event %d", uint8(k))
}

// Event is one thing found in a stream. Next overwrites all of it. The slices
// belong to the Decoder and are valid until the next call of Next.
type Event struct {
	Kind    EventKind
	Command Command // EventCommand
	Ping    uint32  // EventCommand with CommandPing: the value a PONG must carry
	Section uint32  // id of the section an event of the RAM section lies in
	Block   int     // index into Setup.Blocks: EventPage, EventZero, a discard
	Offset  uint64  // bytes from the beginning of the block, a multiple of pages.Size
	Data    []byte  // EventPage: pages.Size bytes
	Payload []byte  // EventCommand, EventPackage, EventTail
	Ranges  []Range // a discard: never empty, each within its block
}

// Range is a range of bytes of one block; both numbers are multiples of
// pages.Size.
type Range struct {
	Start, Length uint64
}

// Command is the number of a command of the stream (QEMU migration/savevm.c,
// enum qemu_vm_cmd).
type Command uint16

// The commands.
const (
	CommandOpenReturnPath  Command = 1
	CommandPing            Command = 2
	CommandPostcopyAdvise  Command = 3
	CommandPostcopyListen  Command = 4
	CommandPostcopyRun     Command = 5
	CommandPostcopyDiscard Command = 6
	CommandPackaged        Command = 7
	CommandEnableCOLO      Command = 8
	CommandPostcopyResume  Command = 9
	CommandRecvBitmap      Command = 10
	// CommandSwitchoverStart is sent by machine types from 10.0 on. It need not
	// be forwarded, and QEMU before 10.0 rejects it.
	CommandSwitchoverStart Command = 11
)

var commandNames = [...]string{
	CommandOpenReturnPath: "OPEN_RETURN_PATH", CommandPing: "PING",
	CommandPostcopyAdvise: "POSTCOPY_ADVISE", CommandPostcopyListen: "POSTCOPY_LISTEN",
	CommandPostcopyRun: "POSTCOPY_RUN", CommandPostcopyDiscard: "POSTCOPY_RAM_DISCARD",
	CommandPackaged: "PACKAGED", CommandEnableCOLO: "ENABLE_COLO",
	CommandPostcopyResume: "POSTCOPY_RESUME", CommandRecvBitmap: "RECV_BITMAP",
	CommandSwitchoverStart: "SWITCHOVER_START",
}

// String returns QEMU's name of the command.
func (c Command) String() string {
	if int(c) < len(commandNames) && commandNames[c] != "" {
		return commandNames[c]
	}
	return fmt.Sprintf("command %d", uint16(c))
}

// Setup is what a stream says before its first page.
type Setup struct {
	// Config is the stream's beginning, verbatim: magic, version and
	// configuration section.
	Config []byte
	// Machine is the machine type in Config, with its alias resolved
	// ("pc-q35-10.0").
	Machine string
	// Capabilities are those listed in Config. Only capabilities that this
	// package refuses can ever be listed, so it is empty once decoded.
	Capabilities []string
	// UUID is the VM's identity when Config carries it (16 bytes), else nil.
	UUID []byte
	// Postcopy is true if the source has postcopy-ram on (it sent
	// POSTCOPY_ADVISE). Only then are the blocks' page sizes known from the
	// stream; else they are pages.Size and the truth must come from elsewhere.
	Postcopy bool
	// MultifdFlush is true if the source marks multifd synchronisation points by
	// MULTIFD_FLUSH records, false if each EOS record is one, as
	// with machine types up to 8.0. Without multifd it is false.
	MultifdFlush bool
	// RAM is the START of the RAM section.
	RAM RAMStart
	// Early holds, verbatim with header and footer, the device-state sections
	// of the set-up phase (virtio-mem's). The destination needs them right
	// behind the START of the RAM section.
	Early []byte
}

// RAMStart is the START of the RAM section. Its header is replayed to the
// destination as it was, because QEMU maps the section's id by it.
type RAMStart struct {
	Section  uint32
	Instance uint32
	Version  uint32
	Blocks   []pages.Block
}

// Total returns the bytes of all blocks.
func (r *RAMStart) Total() uint64 {
	var n uint64
	for i := range r.Blocks {
		n += r.Blocks[i].Length
	}
	return n
}

// PageSizes returns the bitwise OR of the blocks' page sizes, the summary that
// POSTCOPY_ADVISE carries and that must equal the destination's own.
func (r *RAMStart) PageSizes() uint64 {
	var s uint64
	for i := range r.Blocks {
		s |= r.Blocks[i].PageSize
	}
	return s
}
