// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"encoding/binary"
	"fmt"
)

// All integers on the wire are big endian. Strings and byte strings carry their
// length in front, in two or four bytes.

// decoder reads one message body. The first failure sticks, names the field, and
// makes all later reads return zero values, so that a parser checks once, in end.
type decoder struct {
	message string
	rest    []byte
	err     error
}

func (d *decoder) fail(field, format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("%w: %s: %s: %s", ErrProtocol, d.message, field, fmt.Sprintf(format, args...))
	}
	d.rest = nil
}

// take returns the next n bytes without copying, or nil after a failure.
func (d *decoder) take(field string, n int) []byte {
	if d.err != nil {
		return nil
	}
	if n > len(d.rest) {
		d.fail(field, "%d bytes wanted, %d left", n, len(d.rest))
		return nil
	}
	b := d.rest[:n:n]
	d.rest = d.rest[n:]
	return b
}

func (d *decoder) u8(field string) uint8 {
	if b := d.take(field, 1); b != nil {
		return b[0]
	}
	return 0
}

func (d *decoder) u16(field string) uint16 {
	if b := d.take(field, 2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (d *decoder) u32(field string) uint32 {
	if b := d.take(field, 4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (d *decoder) u64(field string) uint64 {
	if b := d.take(field, 8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// array copies the next 16 bytes.
func (d *decoder) array(field string) (a [16]byte) {
	copy(a[:], d.take(field, len(a)))
	return a
}

// text copies a string of at most max bytes with a length of two bytes.
func (d *decoder) text(field string, max int) string {
	n := int(d.u16(field))
	if n > max {
		d.fail(field, "%d bytes, at most %d allowed", n, max)
	}
	return string(d.take(field, n))
}

// bytes copies a byte string of at most max bytes with a length of four bytes.
func (d *decoder) bytes(field string, max int) []byte {
	n := d.u32(field)
	if uint64(n) > uint64(max) {
		d.fail(field, "%d bytes, at most %d allowed", n, max)
		return nil
	}
	return append([]byte(nil), d.take(field, int(n))...)
}

// count reads the two bytes of a number of items of at least size bytes each, and
// checks that so many can follow, so that it bounds what may be allocated.
func (d *decoder) count(field string, max, size int) int {
	n := int(d.u16(field))
	switch {
	case n > max:
		d.fail(field, "%d items, at most %d allowed", n, max)
		return 0
	case n*size > len(d.rest):
		d.fail(field, "%d items do not fit into the %d bytes left", n, len(d.rest))
		return 0
	}
	return n
}

// items returns how many items of size bytes the whole rest is, 1 to max.
func (d *decoder) items(field string, max, size int) int {
	n := len(d.rest) / size
	switch {
	case d.err != nil:
		return 0
	case n*size != len(d.rest):
		d.fail(field, "%d bytes are no multiple of %d", len(d.rest), size)
		return 0
	case n == 0 || n > max:
		d.fail(field, "%d items, 1 to %d allowed", n, max)
		return 0
	}
	return n
}

// end returns the first failure, or an error when bytes are left over.
func (d *decoder) end() error {
	if d.err == nil && len(d.rest) != 0 {
		d.fail("end", "%d bytes too many", len(d.rest))
	}
	return d.err
}

// tooMany is the error of an Append whose message exceeds a limit.
func tooMany(message, field string, have, max int) error {
	return fmt.Errorf("%s: %s: %d, at most %d allowed", message, field, have, max)
}

// checkItems is for the messages that are one list, which must not be empty.
func checkItems(message, field string, have, max int) error {
	if have == 0 || have > max {
		return fmt.Errorf("%s: %s: %d, 1 to %d allowed", message, field, have, max)
	}
	return nil
}

func appendText(dst []byte, message, field, s string, max int) ([]byte, error) {
	if len(s) > max {
		return nil, tooMany(message, "bytes of "+field, len(s), max)
	}
	return append(binary.BigEndian.AppendUint16(dst, uint16(len(s))), s...), nil
}

// cut shortens free text to MaxText bytes; people lose the end of it at worst.
func cut(s string) string {
	if len(s) > MaxText {
		return s[:MaxText]
	}
	return s
}

func appendBool(dst []byte, b bool) []byte {
	if b {
		return append(dst, 1)
	}
	return append(dst, 0)
}

// bool reads a byte that must be 0 or 1, so that every message has one form only.
func (d *decoder) bool(field string) bool {
	v := d.u8(field)
	if v > 1 {
		d.fail(field, "%d, want 0 or 1", v)
	}
	return v == 1
}

// zero reads a byte that must be 0 in this version.
func (d *decoder) zero(field string) {
	if v := d.u8(field); v != 0 {
		d.fail(field, "%d, want 0", v)
	}
}

func (d *decoder) identity(field string) Identity {
	id := Identity(d.text(field, MaxIdentity))
	if d.err == nil {
		if err := id.check(); err != nil {
			d.fail(field, "%v", err)
		}
	}
	return id
}
