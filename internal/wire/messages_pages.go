// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"encoding/binary"

	"scattergather.io/scattergather/internal/pages"
)

// Ack says that the pages of the frame with the same Seq on this lane are stored: at
// an intermediary in its pool, at the destination in its store and its map.
type Ack struct{}

// Type returns TypeAck.
func (Ack) Type() Type { return TypeAck }

// Append appends the body, which is empty.
func (Ack) Append(dst []byte) ([]byte, error) { return dst, nil }

// Nack says that none of the pages of the frame with the same Seq on this lane may be
// counted on.
type Nack struct{ Code Code }

// Type returns TypeNack.
func (*Nack) Type() Type { return TypeNack }

// Append appends the body to dst.
func (m *Nack) Append(dst []byte) ([]byte, error) {
	return binary.BigEndian.AppendUint16(dst, uint16(m.Code)), nil
}

// ParseNack reads the body of a Nack frame.
func ParseNack(body []byte) (Nack, error) {
	d := decoder{message: "Nack", rest: body}
	m := Nack{Code: Code(d.u16("code"))}
	return m, d.end()
}

// Want asks the source for pages that the guest at the destination waits for and the
// map does not have, 1 to MaxWant. It is not answered: the pages come as soon as QEMU
// gives them out, on any lane.
type Want []pages.Index

const wantSize = 8

// Type returns TypeWant.
func (Want) Type() Type { return TypeWant }

// Append appends the body to dst.
func (m Want) Append(dst []byte) ([]byte, error) {
	if err := checkItems("Want", "pages", len(m), MaxWant); err != nil {
		return nil, err
	}
	for _, i := range m {
		dst = binary.BigEndian.AppendUint64(dst, uint64(i))
	}
	return dst, nil
}

// ParseWant appends the pages of a Want frame to dst.
func ParseWant(dst []pages.Index, body []byte) ([]pages.Index, error) {
	d := decoder{message: "Want", rest: body}
	for range d.items("pages", MaxWant, wantSize) {
		dst = append(dst, pages.Index(d.u64("page")))
	}
	return dst, d.end()
}

// PageRef names the content of a page.
type PageRef struct {
	Index   pages.Index
	Version pages.Version
}

// Read asks an intermediary for pages, 1 to MaxBatch. The answer is one Pages frame
// with the same Seq on the same lane, with the same pages in the same order; those
// not held in that version are marked missing.
type Read []PageRef

const refSize = 8 + 2

// Type returns TypeRead.
func (Read) Type() Type { return TypeRead }

// Append appends the body to dst.
func (m Read) Append(dst []byte) ([]byte, error) {
	if err := checkItems("Read", "pages", len(m), MaxBatch); err != nil {
		return nil, err
	}
	for _, r := range m {
		dst = binary.BigEndian.AppendUint64(dst, uint64(r.Index))
		dst = binary.BigEndian.AppendUint16(dst, uint16(r.Version))
	}
	return dst, nil
}

// ParseRead appends the page references of a Read frame to dst.
func ParseRead(dst []PageRef, body []byte) ([]PageRef, error) {
	d := decoder{message: "Read", rest: body}
	for range d.items("pages", MaxBatch, refSize) {
		dst = append(dst, PageRef{pages.Index(d.u64("page")), pages.Version(d.u16("version"))})
	}
	return dst, d.end()
}

// Run is a run of pages.
type Run struct {
	First pages.Index
	Count uint32
}

// Free tells an intermediary that it may forget all versions of these pages, 1 to
// MaxRuns runs. It is not answered.
type Free []Run

const runSize = 8 + 4

// Type returns TypeFree.
func (Free) Type() Type { return TypeFree }

// Append appends the body to dst.
func (m Free) Append(dst []byte) ([]byte, error) {
	if err := checkItems("Free", "runs", len(m), MaxRuns); err != nil {
		return nil, err
	}
	for _, r := range m {
		dst = binary.BigEndian.AppendUint64(dst, uint64(r.First))
		dst = binary.BigEndian.AppendUint32(dst, r.Count)
	}
	return dst, nil
}

// ParseFree appends the runs of a Free frame to dst. First+Count does not overflow.
func ParseFree(dst []Run, body []byte) ([]Run, error) {
	d := decoder{message: "Free", rest: body}
	for range d.items("runs", MaxRuns, runSize) {
		r := Run{First: pages.Index(d.u64("first")), Count: d.u32("count")}
		if d.err == nil && uint64(r.First) > pages.MaxBytes/pages.Size {
			d.fail("first", "page %d, no VM has more than %d", r.First, uint64(pages.MaxBytes/pages.Size))
		}
		dst = append(dst, r)
	}
	return dst, d.end()
}
