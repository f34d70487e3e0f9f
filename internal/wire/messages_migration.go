// SPDX-License-Identifier: Apache-2.0

package wire

import "scattergather.io/scattergather/internal/pages"

// Resume is the destination's first frame on every control lane with a source. The
// source sends Setup when the migration is new, else it sends again, in order, every
// journalled frame after Applied.
type Resume struct {
	// Known is false when the destination has never seen the migration.
	Known bool
	// Applied is the number of the last journalled frame that the destination has
	// applied, 0 for none.
	Applied uint64
}

// Holder is one intermediary in the table of a migration. Its place in the table, 0
// first, is pages.FirstHolder+place in page map records.
type Holder struct {
	// Name is for people. At most 253 bytes.
	Name string
	// Addr is "host:port" to dial. At most 261 bytes.
	Addr string
	// Identity is what the intermediary must prove.
	Identity Identity
	// Session is the reservation that holds the pages.
	Session Session
}

// Setup tells the destination what comes: the first message of a source about a
// migration.
type Setup struct {
	// Key opens the pages. It never leaves source and destination.
	Key Key
	// Strategy is the name of the way of the migration, "immediate" or "hybrid"; at
	// most 63 bytes.
	Strategy string
	// Machine is the machine type, for a check before QEMU's own and for people. At
	// most 255 bytes.
	Machine string
	// Config is the beginning of QEMU's stream up to its configuration section,
	// verbatim; at most MaxSetupStream bytes together with Early.
	Config []byte
	// Early holds the device sections of the stream's set-up phase, verbatim.
	Early []byte
	// Section, Instance and Version are from the header of the RAM section.
	Section, Instance, Version uint32
	// Blocks are the RAM blocks in the stream's order. ParseSetup bounds them;
	// pages.NewLayout validates them.
	Blocks []pages.Block
	// Holders is the table of intermediaries as it is known now.
	Holders []Holder
}

// MaxSetupStream bounds Config and Early of a Setup in bytes, together.
const MaxSetupStream = 256 << 10

// Ready answers Setup: the destination's QEMU accepted it.
type Ready struct{}

// Holders adds intermediaries at the end of the table of Setup. Places never change
// their meaning. First must be the table's size; a repeated message is harmless.
type Holders struct {
	First   uint16
	Holders []Holder
}

// Records is a batch of page map records, at most MaxRecords, sent only after the
// holder of every data page in it has acknowledged that page.
type Records []pages.Record

// Package is a chunk of QEMU's device-state package. Chunks come in order, without
// gaps. Data aliases the frame.
type Package struct {
	// Total is the size of the whole package in bytes, at most MaxPackage.
	Total uint64
	// Offset is the place of Data in it.
	Offset uint64
	// Data is at most MaxPackageChunk bytes, at least 1.
	Data []byte
}

// Loaded reports that the destination's QEMU has loaded the package.
type Loaded struct{}

// Phase is how far the source is.
type Phase uint8

// The phases, in the order in which they are entered. A phase may be skipped.
const (
	// PhasePrecopy: pages are sent while the guest runs at the source.
	PhasePrecopy Phase = 1
	// PhaseSwitched: the guest's CPU has stopped at the source for good.
	PhaseSwitched Phase = 2
	// PhaseDrained: QEMU has sent its last page; acknowledgements are awaited.
	PhaseDrained Phase = 3
	// PhaseReleased: after Committed, the source's QEMU was told to end.
	PhaseReleased Phase = 4
)

// State tells the destination how far the source is. A later one replaces an earlier
// one.
type State struct{ Phase Phase }

// Credit grants the source room at the destination.
type Credit struct {
	// Bytes of sealed pages that the destination is ready to store, summed up since
	// the connection began. It only grows; grants never seen are never used.
	Bytes uint64
}

// Applied acknowledges the journalled frames of the control lane up to and including
// the frame's Seq: they need not be sent again, even to a restarted destination.
type Applied struct{}

// Commit asks the destination to take the whole VM over.
type Commit struct {
	// Pages is the number of pages that are not Absent in the source's view.
	Pages uint64
}

// Committed answers Commit: the destination has the whole map and the loaded package;
// nothing of the VM is needed from the source any more. If it does not, it answers
// with an Error of CodeIncomplete and the source may send Commit again.
type Committed struct{ Pages uint64 }

// Abort ends the migration before the switch, from either side.
type Abort struct {
	// Reason is for people, at most MaxText bytes.
	Reason string
}

// Type returns the frame type of each message.
func (*Resume) Type() Type    { return TypeResume }
func (*Setup) Type() Type     { return TypeSetup }
func (Ready) Type() Type      { return TypeReady }
func (*Holders) Type() Type   { return TypeHolders }
func (Records) Type() Type    { return TypeRecords }
func (*Package) Type() Type   { return TypePackage }
func (Loaded) Type() Type     { return TypeLoaded }
func (*State) Type() Type     { return TypeState }
func (*Credit) Type() Type    { return TypeCredit }
func (Applied) Type() Type    { return TypeApplied }
func (*Commit) Type() Type    { return TypeCommit }
func (*Committed) Type() Type { return TypeCommitted }
func (*Abort) Type() Type     { return TypeAbort }

func (*Resume) Append(dst []byte) ([]byte, error)    { return nil, errSkeleton }
func (*Setup) Append(dst []byte) ([]byte, error)     { return nil, errSkeleton }
func (Ready) Append(dst []byte) ([]byte, error)      { return nil, errSkeleton }
func (*Holders) Append(dst []byte) ([]byte, error)   { return nil, errSkeleton }
func (Records) Append(dst []byte) ([]byte, error)    { return nil, errSkeleton }
func (*Package) Append(dst []byte) ([]byte, error)   { return nil, errSkeleton }
func (Loaded) Append(dst []byte) ([]byte, error)     { return nil, errSkeleton }
func (*State) Append(dst []byte) ([]byte, error)     { return nil, errSkeleton }
func (*Credit) Append(dst []byte) ([]byte, error)    { return nil, errSkeleton }
func (Applied) Append(dst []byte) ([]byte, error)    { return nil, errSkeleton }
func (*Commit) Append(dst []byte) ([]byte, error)    { return nil, errSkeleton }
func (*Committed) Append(dst []byte) ([]byte, error) { return nil, errSkeleton }
func (*Abort) Append(dst []byte) ([]byte, error)     { return nil, errSkeleton }

// ParseResume reads the body of a Resume frame.
func ParseResume(body []byte) (Resume, error) { return Resume{}, errSkeleton }

// ParseSetup reads the body of a Setup frame and copies it.
func ParseSetup(body []byte) (*Setup, error) { return nil, errSkeleton }

// ParseHolders reads the body of a Holders frame and copies it.
func ParseHolders(body []byte) (*Holders, error) { return nil, errSkeleton }

// ParseRecords appends the records of a Records frame to dst. Holders and the range of
// pages are checked by pages.Map, which knows the layout.
func ParseRecords(dst []pages.Record, body []byte) ([]pages.Record, error) {
	return nil, errSkeleton
}

// ParsePackage reads the body of a Package frame. Its Data aliases the body.
func ParsePackage(body []byte) (Package, error) { return Package{}, errSkeleton }

// ParseState reads the body of a State frame.
func ParseState(body []byte) (State, error) { return State{}, errSkeleton }

// ParseCredit reads the body of a Credit frame.
func ParseCredit(body []byte) (Credit, error) { return Credit{}, errSkeleton }

// ParseCommit reads the body of a Commit frame.
func ParseCommit(body []byte) (Commit, error) { return Commit{}, errSkeleton }

// ParseCommitted reads the body of a Committed frame.
func ParseCommitted(body []byte) (Committed, error) { return Committed{}, errSkeleton }

// ParseAbort reads the body of an Abort frame.
func ParseAbort(body []byte) (Abort, error) { return Abort{}, errSkeleton }
