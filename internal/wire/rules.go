// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"fmt"

	"scattergather.io/scattergather/internal/pages"
)

// A party is one end of a conversation, as sender of a frame. The bits make sets.
type party uint8

const (
	sourceToDestination party = 1 << iota
	destinationToSource
	sourceToIntermediary
	intermediaryToSource
	destinationToIntermediary
	intermediaryToDestination

	anyone = 1<<iota - 1
)

// party returns who sends in a conversation: its dialler or its listener.
func (r Role) party(dialler bool) party {
	p := sourceToDestination << (2 * (r - SourceToDestination))
	if !dialler {
		p <<= 1
	}
	return p
}

// Bits of lanes.
const (
	onControl = 1 << LaneControl
	onUrgent  = 1 << LaneUrgent
	onBulk    = 1 << LaneBulk
	onPages   = onUrgent | onBulk
)

// rule says who may send a type of frame, on which lanes, and how large its body may
// be. It is checked by the sender before sending and by the receiver before reading.
type rule struct {
	from  party
	lanes uint8
	// max is the size of the largest body in bytes.
	max int
}

const (
	maxHolder = minHolder + maxName + maxAddr + MaxIdentity
	maxTable  = 2 + MaxHolders*maxHolder
	maxSetup  = 16 + 2 + maxStrategy + 2 + maxMachine + 2*4 + MaxSetupStream +
		3*4 + 1 + 2 + pages.MaxBlocks*(minBlock+pages.MaxName) + maxTable
)

// It does not compile unless the largest Setup fits.
const _ = uint(MaxControlBody - maxSetup)

// rules holds all types that are sent on an open lane.
var rules = [...]rule{
	TypePing:  {anyone, onControl | onPages, 0},
	TypeError: {anyone, onControl | onPages, 2 + 2 + MaxText},

	TypeResume:    {destinationToSource, onControl, 1 + 8},
	TypeSetup:     {sourceToDestination, onControl, maxSetup},
	TypeReady:     {destinationToSource, onControl, 0},
	TypeHolders:   {sourceToDestination, onControl, 2 + maxTable},
	TypeRecords:   {sourceToDestination, onControl, MaxRecords * recordSize},
	TypePackage:   {sourceToDestination, onControl, 8 + 8 + MaxPackageChunk},
	TypeLoaded:    {destinationToSource, onControl, 0},
	TypeState:     {sourceToDestination, onControl, 1},
	TypeCredit:    {destinationToSource, onControl, 8},
	TypeApplied:   {destinationToSource, onControl, 0},
	TypeCommit:    {sourceToDestination, onControl, 8},
	TypeCommitted: {destinationToSource, onControl, 8},
	TypeAbort:     {sourceToDestination | destinationToSource, onControl, 2 + MaxText},

	TypePages: {sourceToDestination | sourceToIntermediary | intermediaryToDestination, onPages, maxPagesBody},
	TypeAck:   {destinationToSource | intermediaryToSource, onPages, 0},
	TypeNack:  {destinationToSource | intermediaryToSource, onPages, 2},
	TypeWant:  {destinationToSource, onUrgent, MaxWant * wantSize},
	TypeRead:  {destinationToIntermediary, onPages, MaxBatch * refSize},

	TypeReserve:   {sourceToIntermediary, onControl, 8 + 4 + 2 + MaxIdentity},
	TypeReserved:  {intermediaryToSource, onControl, 16 + 8},
	TypeAttach:    {destinationToIntermediary, onControl, 16},
	TypeAttached:  {intermediaryToDestination, onControl, 8 + 8},
	TypeFree:      {sourceToIntermediary | destinationToIntermediary, onControl, MaxRuns * runSize},
	TypeDissolve:  {sourceToIntermediary | destinationToIntermediary, onControl, 0},
	TypeDissolved: {intermediaryToSource | intermediaryToDestination, onControl, 0},
}

// known reports whether this version has the type on open lanes.
func (t Type) known() bool { return int(t) < len(rules) && rules[t].from != 0 }

// allowed returns why a party may not send such a frame on such a lane, or nil. size is
// the size of the body.
func allowed(t Type, from party, kind LaneKind, size int) error {
	switch {
	case !t.known():
		return fmt.Errorf("%w: %v on an open lane", ErrProtocol, t)
	case rules[t].from&from == 0:
		return fmt.Errorf("%w: %v from this side of the conversation", ErrProtocol, t)
	case rules[t].lanes&(1<<kind) == 0:
		return fmt.Errorf("%w: %v on a lane of kind %v", ErrProtocol, t, kind)
	case size > rules[t].max:
		return fmt.Errorf("%w: %v of %d bytes, at most %d allowed", ErrProtocol, t, size, rules[t].max)
	}
	return nil
}

// maxSkipped returns the size of the largest frame of an unknown, optional type that a
// receiver skips.
func maxSkipped(kind LaneKind) int {
	if kind == LaneControl {
		return MaxControlBody
	}
	return maxPagesBody
}
