// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"encoding/binary"

	"scattergather.io/scattergather/internal/pages"
)

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

// Type returns TypeResume.
func (*Resume) Type() Type { return TypeResume }

// Append appends the body to dst.
func (m *Resume) Append(dst []byte) ([]byte, error) {
	return binary.BigEndian.AppendUint64(appendBool(dst, m.Known), m.Applied), nil
}

// ParseResume reads the body of a Resume frame.
func ParseResume(body []byte) (Resume, error) {
	d := decoder{message: "Resume", rest: body}
	m := Resume{Known: d.bool("known"), Applied: d.u64("applied")}
	return m, d.end()
}

// Ready answers Setup: the destination's QEMU accepted it.
type Ready struct{}

// Type returns TypeReady.
func (Ready) Type() Type { return TypeReady }

// Append appends the body, which is empty.
func (Ready) Append(dst []byte) ([]byte, error) { return dst, nil }

// Records is a batch of page map records, 1 to MaxRecords, sent only after the holder
// of every data page in it has acknowledged that page.
type Records []pages.Record

// recordSize is the size of one record: first page in 8 bytes, count in 4, version in
// 2, holder in 1, and 1 that is 0.
const recordSize = 16

// Type returns TypeRecords.
func (Records) Type() Type { return TypeRecords }

// Append appends the body to dst.
func (m Records) Append(dst []byte) ([]byte, error) {
	if err := checkItems("Records", "records", len(m), MaxRecords); err != nil {
		return nil, err
	}
	for i := range m {
		r := &m[i]
		dst = binary.BigEndian.AppendUint64(dst, uint64(r.First))
		dst = binary.BigEndian.AppendUint32(dst, r.Count)
		dst = binary.BigEndian.AppendUint16(dst, uint16(r.Version))
		dst = append(dst, byte(r.Holder), 0)
	}
	return dst, nil
}

// ParseRecords appends the records of a Records frame to dst. Holders and the range of
// pages are checked by pages.Map, which knows the layout.
func ParseRecords(dst []pages.Record, body []byte) ([]pages.Record, error) {
	d := decoder{message: "Records", rest: body}
	for range d.items("records", MaxRecords, recordSize) {
		r := pages.Record{First: pages.Index(d.u64("first")), Count: d.u32("count")}
		r.Version, r.Holder = pages.Version(d.u16("version")), pages.Holder(d.u8("holder"))
		d.zero("padding")
		dst = append(dst, r)
	}
	return dst, d.end()
}

// Package is a chunk of QEMU's device-state package. Chunks come in order, without
// gaps.
type Package struct {
	// Total is the size of the whole package in bytes, at most MaxPackage.
	Total uint64
	// Offset is the place of Data in it.
	Offset uint64
	// Data is 1 to MaxPackageChunk bytes; after ParsePackage it aliases the body.
	Data []byte
}

// Type returns TypePackage.
func (*Package) Type() Type { return TypePackage }

// check is shared by both directions; it cannot overflow, because the order of the
// comparisons bounds Offset before it is subtracted.
func (m *Package) check(d *decoder) {
	n := uint64(len(m.Data))
	switch {
	case d.err != nil:
	case m.Total > MaxPackage:
		d.fail("total", "%d bytes, at most %d allowed", m.Total, uint64(MaxPackage))
	case n == 0 || n > MaxPackageChunk:
		d.fail("data", "%d bytes, 1 to %d allowed", n, MaxPackageChunk)
	case m.Offset >= m.Total || n > m.Total-m.Offset:
		d.fail("offset", "%d bytes from %d are not in a package of %d", n, m.Offset, m.Total)
	}
}

// Append appends the body to dst.
func (m *Package) Append(dst []byte) ([]byte, error) {
	d := decoder{message: "Package"}
	if m.check(&d); d.err != nil {
		return nil, d.err
	}
	dst = binary.BigEndian.AppendUint64(dst, m.Total)
	dst = binary.BigEndian.AppendUint64(dst, m.Offset)
	return append(dst, m.Data...), nil
}

// ParsePackage reads the body of a Package frame. Its Data aliases the body.
func ParsePackage(body []byte) (Package, error) {
	d := decoder{message: "Package", rest: body}
	m := Package{Total: d.u64("total"), Offset: d.u64("offset")}
	m.Data = d.take("data", len(d.rest))
	m.check(&d)
	return m, d.end()
}

// Loaded reports that the destination's QEMU has loaded the package.
type Loaded struct{}

// Type returns TypeLoaded.
func (Loaded) Type() Type { return TypeLoaded }

// Append appends the body, which is empty.
func (Loaded) Append(dst []byte) ([]byte, error) { return dst, nil }

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
// one. Phases that a receiver does not know are for it to ignore.
type State struct{ Phase Phase }

// Type returns TypeState.
func (*State) Type() Type { return TypeState }

// Append appends the body to dst.
func (m *State) Append(dst []byte) ([]byte, error) { return append(dst, byte(m.Phase)), nil }

// ParseState reads the body of a State frame.
func ParseState(body []byte) (State, error) {
	d := decoder{message: "State", rest: body}
	m := State{Phase: Phase(d.u8("phase"))}
	return m, d.end()
}

// Credit grants the source room at the destination.
type Credit struct {
	// Bytes of sealed pages that the destination is ready to store, summed up since
	// the connection began. It only grows. A source spends it by the payload of
	// Pages frames on bulk lanes; what the urgent lane carries is free.
	Bytes uint64
}

// Type returns TypeCredit.
func (*Credit) Type() Type { return TypeCredit }

// Append appends the body to dst.
func (m *Credit) Append(dst []byte) ([]byte, error) {
	return binary.BigEndian.AppendUint64(dst, m.Bytes), nil
}

// ParseCredit reads the body of a Credit frame.
func ParseCredit(body []byte) (Credit, error) {
	d := decoder{message: "Credit", rest: body}
	m := Credit{Bytes: d.u64("bytes")}
	return m, d.end()
}

// Applied acknowledges the journalled frames of the control lane up to and including
// the frame's Seq: they need not be sent again, even to a restarted destination.
type Applied struct{}

// Type returns TypeApplied.
func (Applied) Type() Type { return TypeApplied }

// Append appends the body, which is empty.
func (Applied) Append(dst []byte) ([]byte, error) { return dst, nil }

// Commit asks the destination to take the whole VM over.
type Commit struct {
	// Pages is the number of pages that are not Absent in the source's view.
	Pages uint64
}

// Type returns TypeCommit.
func (*Commit) Type() Type { return TypeCommit }

// Append appends the body to dst.
func (m *Commit) Append(dst []byte) ([]byte, error) {
	return binary.BigEndian.AppendUint64(dst, m.Pages), nil
}

// ParseCommit reads the body of a Commit frame.
func ParseCommit(body []byte) (Commit, error) {
	d := decoder{message: "Commit", rest: body}
	m := Commit{Pages: d.u64("pages")}
	return m, d.end()
}

// Committed answers Commit: the destination has the whole map and the loaded package;
// nothing of the VM is needed from the source any more. If that is not so, it answers
// with an Error of CodeIncomplete, and the source may send Commit again.
type Committed struct{ Pages uint64 }

// Type returns TypeCommitted.
func (*Committed) Type() Type { return TypeCommitted }

// Append appends the body to dst.
func (m *Committed) Append(dst []byte) ([]byte, error) {
	return binary.BigEndian.AppendUint64(dst, m.Pages), nil
}

// ParseCommitted reads the body of a Committed frame.
func ParseCommitted(body []byte) (Committed, error) {
	d := decoder{message: "Committed", rest: body}
	m := Committed{Pages: d.u64("pages")}
	return m, d.end()
}

// Abort ends the migration before the switch, from either side.
type Abort struct {
	// Reason is for people. Append cuts it to MaxText bytes.
	Reason string
}

// Type returns TypeAbort.
func (*Abort) Type() Type { return TypeAbort }

// Append appends the body to dst.
func (m *Abort) Append(dst []byte) ([]byte, error) {
	return appendText(dst, "Abort", "reason", cut(m.Reason), MaxText)
}

// ParseAbort reads the body of an Abort frame.
func ParseAbort(body []byte) (Abort, error) {
	d := decoder{message: "Abort", rest: body}
	m := Abort{Reason: d.text("reason", MaxText)}
	return m, d.end()
}
