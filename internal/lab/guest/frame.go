// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Type says what a telemetry frame carries.
type Type uint8

// Frames from the guest, then commands from the host.
const (
	TypeHello    Type = 1 // the guest's loop is about to fill memory
	TypeFilled   Type = 2 // memory is filled; work begins
	TypeBeat     Type = 3 // about every 2 ms
	TypeStatus   Type = 4 // five times a second
	TypeWrong    Type = 5 // a page does not hold what it must
	TypeVerified Type = 6 // answers TypeVerify
	TypeFaults   Type = 7 // answers TypeReport
	TypeVerify   Type = 32
	TypeReport   Type = 33
)

// Beat is the guest's sign of life. Time is the guest's monotonic clock.
type Beat struct {
	Seq     uint32
	Nanos   uint64 // guest's monotonic clock, since the loop began
	Served  uint32 // requests served so far, wrapping
	Dirtied uint32 // pages dirtied so far, wrapping
}

// Filled tells how the guest's memory was filled.
type Filled struct {
	Pages  uint32
	Zeros  uint32 // of them, pages that hold only zeros
	Millis uint32 // time it took
}

// Status is the state of the continuous verification.
type Status struct {
	Verified uint64 // pages verified so far, each visit counted
	Wrong    uint32 // distinct pages ever found wrong
}

// Damage says what a wrong page holds instead of its content.
type Damage uint8

// What may be wrong with a page.
const (
	DamageOther Damage = iota // something else
	DamageZero                // zeros where there should be data
	DamageStale               // the content of the generation before
)

func (d Damage) String() string {
	switch d {
	case DamageZero:
		return "reads as zero"
	case DamageStale:
		return "is stale by one generation"
	default:
		return "holds something else"
	}
}

// Wrong names a page that does not hold what it must.
type Wrong struct {
	Page       uint32
	Generation uint32 // the one expected
	Word       uint16 // the first 64-bit word that differs
	Damage     Damage
	Got, Want  uint64
}

func (w Wrong) String() string {
	return fmt.Sprintf("page %d (generation %d) %s: word %d is %#x, want %#x", w.Page, w.Generation, w.Damage, w.Word, w.Got, w.Want)
}

// Verify asks for every page to be verified from now on. Token comes back.
type Verify struct{ Token uint32 }

// Verified tells that every page was verified since the request of the token.
type Verified struct {
	Token    uint32
	Pages    uint32 // distinct pages verified since
	Wrong    uint32 // distinct pages ever found wrong
	Finished uint64 // guest's clock, ns
}

// Report asks for the accesses slower than SlowAccess between two moments of the
// guest's clock.
type Report struct{ Since, Until uint64 }

// SlowAccess is the time in nanoseconds from which the first touch of a page
// counts as a fault.
const SlowAccess = 200_000

// Faults sums up first touches slower than SlowAccess in the time asked for.
type Faults struct {
	Count    uint32
	P50, P99 uint32 // microseconds
	Max      uint32 // microseconds
	Lost     uint32 // slow accesses that did not fit the guest's log
	Sum      uint64 // microseconds
}

// Every frame is sync | type | length | payload | checksum.
const (
	sync        = 0xa5
	overhead    = 4
	maxPayload  = 64
	maxFrameLen = overhead + maxPayload
)

// Append appends a frame whose payload is one of the structs of this package.
// It panics on anything else, which is an error of the program.
func Append(dst []byte, t Type, payload any) []byte {
	start := len(dst)
	dst = append(dst, sync, byte(t), 0)
	dst, err := binary.Append(dst, binary.LittleEndian, payload)
	if err != nil {
		panic("guest: " + err.Error())
	}
	dst[start+2] = byte(len(dst) - start - 3)
	return append(dst, checksum(dst[start+1:]))
}

// AppendBeat is Append for the frame that must not allocate.
func AppendBeat(dst []byte, b Beat) []byte {
	start := len(dst)
	dst = append(dst, sync, byte(TypeBeat), 20)
	dst = binary.LittleEndian.AppendUint32(dst, b.Seq)
	dst = binary.LittleEndian.AppendUint64(dst, b.Nanos)
	dst = binary.LittleEndian.AppendUint32(dst, b.Served)
	dst = binary.LittleEndian.AppendUint32(dst, b.Dirtied)
	return append(dst, checksum(dst[start+1:]))
}

// checksum is an 8-bit rotate-and-add: enough to find the frame borders again
// after bytes were lost on the line.
func checksum(b []byte) byte {
	var sum byte = 0x5a
	for _, c := range b {
		sum = (sum<<1 | sum>>7) + c
	}
	return sum
}

// Decoder cuts a stream of bytes into frames. Bytes may arrive in any pieces,
// also from two ports one after the other: a frame that a migration cut in two
// is put together again. Damaged frames are skipped.
type Decoder struct {
	buf     []byte
	skipped int
}

// Skipped is the number of bytes that belonged to no frame.
func (d *Decoder) Skipped() int { return d.skipped }

// Feed takes bytes and calls f for every frame that they complete. The payload
// is valid during the call.
func (d *Decoder) Feed(data []byte, f func(Type, []byte)) {
	d.buf = append(d.buf, data...)
	rest := d.buf
	for len(rest) >= overhead {
		size := int(rest[2]) + overhead
		if rest[0] != sync || size > maxFrameLen {
			rest = rest[1:]
			d.skipped++
			continue
		}
		if len(rest) < size {
			break
		}
		if checksum(rest[1:size-1]) != rest[size-1] {
			rest = rest[1:]
			d.skipped++
			continue
		}
		f(Type(rest[1]), rest[3:size-1])
		rest = rest[size:]
	}
	d.buf = append(d.buf[:0], rest...)
}

// Decode reads a payload into the struct it is for.
func Decode(payload []byte, into any) error {
	n, err := binary.Decode(payload, binary.LittleEndian, into)
	if err != nil {
		return fmt.Errorf("guest frame %T of %d bytes: %w", into, len(payload), io.ErrUnexpectedEOF)
	}
	if n != len(payload) {
		return fmt.Errorf("guest frame %T: %d bytes left over", into, len(payload)-n)
	}
	return nil
}
