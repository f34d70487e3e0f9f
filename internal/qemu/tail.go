// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
)

// tailEnd is how the description of the device state begins, right behind the
// EOF mark: the item's type; a length and JSON text follow.
var tailEnd = []byte{itemEOF, itemDescription}

// tailHeader is tailEnd and the length.
const tailHeader = 6

// tail reads the device state of a migration that ended in pre-copy. Its
// sections have no lengths, and with a return path the source does not close
// the connection. But it says last what it has sent: EOF mark, description
// (length and JSON). A description that ends where the stream has come to is the
// end. Without one the stream was cut, by a source that failed or was cancelled
// and may go on running: never to be taken for the end.
func (d *Decoder) tail(ev *Event) error {
	var find tailFinder
	data, err := d.r.takeLarge(nil, min(d.r.buffered(), d.opt.MaxTail+1))
	for {
		if len(data) > d.opt.MaxTail {
			return fmt.Errorf("device state of more than %d bytes", d.opt.MaxTail)
		}
		end, ferr := find.end(data)
		switch {
		case ferr != nil:
			return ferr
		case end >= 0:
			d.stage = stageTail
			ev.Kind, ev.Payload = EventTail, data[:end]
			return nil
		case err == io.EOF:
			return fmt.Errorf("device state without its description at the end: %w", io.ErrUnexpectedEOF)
		case err != nil:
			return err
		}
		data, err = d.r.readMore(data, d.opt.MaxTail+1)
	}
}

// tailFinder looks for the end of a tail in data that grows. Every byte is
// looked at once.
type tailFinder struct {
	seen  int   // data[:seen] has been searched for beginnings of descriptions
	found []int // beginnings whose descriptions end behind what was seen so far
}

// end returns where the EOF mark stands, or -1 if the data is not complete.
func (f *tailFinder) end(data []byte) (int, error) {
	for f.seen+tailHeader < len(data) {
		i := bytes.Index(data[f.seen:], tailEnd)
		if i < 0 {
			f.seen = len(data) - 1
			break
		}
		i += f.seen
		if i+tailHeader >= len(data) {
			f.seen = i
			break
		}
		f.seen = i + 1
		if data[i+tailHeader] != '{' {
			continue
		}
		if len(f.found) == maxTailEnds {
			return -1, fmt.Errorf("device state with more than %d beginnings of a description", maxTailEnds)
		}
		f.found = append(f.found, i)
	}
	kept := f.found[:0]
	for _, i := range f.found {
		text := data[i+tailHeader:]
		n := uint64(be.Uint32(data[i+2:]))
		if n == uint64(len(text)) && json.Valid(text) {
			return i, nil
		}
		if n > uint64(len(text)) {
			kept = append(kept, i)
		}
	}
	f.found = kept
	return -1, nil
}
