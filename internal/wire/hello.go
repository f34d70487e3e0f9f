// SPDX-License-Identifier: Apache-2.0

package wire

import "encoding/binary"

// hello opens a control lane, from the dialler.
type hello struct {
	minVersion, maxVersion uint16
	// features are bits of optional abilities; both sides use what both have.
	features  uint64
	role      Role
	lanes     uint8
	idle      uint32 // ms of silence after which the dialler gives up
	migration MigrationID
	group     [16]byte // random; names the connection to its other lanes
	software  string
}

const (
	helloMagic = 0x53474d31 // "SGM1"
	// maxSoftware bounds the name and version that a side gives for logs.
	maxSoftware = 63
)

func (h *hello) encode() []byte {
	dst := binary.BigEndian.AppendUint32(nil, helloMagic)
	dst = binary.BigEndian.AppendUint16(dst, h.minVersion)
	dst = binary.BigEndian.AppendUint16(dst, h.maxVersion)
	dst = binary.BigEndian.AppendUint64(dst, h.features)
	dst = append(dst, byte(h.role), h.lanes)
	dst = binary.BigEndian.AppendUint32(dst, h.idle)
	dst = append(dst, h.migration[:]...)
	dst = append(dst, h.group[:]...)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(h.software)))
	return append(dst, h.software...)
}

// parseHello checks only what all versions share when we speak none of the peer's: the
// rest may mean something else then. A peer that speaks later versions too may add to
// the end.
func parseHello(body []byte) (*hello, error) {
	d := decoder{message: "Hello", rest: body}
	if m := d.u32("magic"); d.err == nil && m != helloMagic {
		d.fail("magic", "%#x, want %#x: the peer is no agent of this kind", m, helloMagic)
	}
	h := &hello{minVersion: d.u16("lowest version"), maxVersion: d.u16("highest version")}
	if d.err != nil || h.minVersion > Version || h.maxVersion < Version {
		return h, d.err
	}
	h.features = d.u64("features")
	h.role = Role(d.u8("role"))
	h.lanes = d.u8("lanes")
	h.idle = d.u32("idle time")
	h.migration = d.array("migration")
	h.group = d.array("group")
	h.software = d.text("software", maxSoftware)
	if d.err == nil && (h.role < SourceToDestination || h.role > DestinationToIntermediary) {
		d.fail("role", "%d is none", h.role)
	}
	if d.err == nil && (h.lanes == 0 || h.lanes > MaxLanes) {
		d.fail("lanes", "%d bulk lanes, 1 to %d allowed", h.lanes, MaxLanes)
	}
	if d.err == nil && h.idle < minIdleMillis {
		d.fail("idle time", "%d ms, at least %d wanted", h.idle, minIdleMillis)
	}
	if h.maxVersion > Version {
		d.rest = nil
	}
	return h, d.end()
}

// welcome answers hello.
type welcome struct {
	version  uint16
	features uint64
	idle     uint32
	software string
}

func (w *welcome) encode() []byte {
	dst := binary.BigEndian.AppendUint16(nil, w.version)
	dst = binary.BigEndian.AppendUint64(dst, w.features)
	dst = binary.BigEndian.AppendUint32(dst, w.idle)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(w.software)))
	return append(dst, w.software...)
}

func parseWelcome(body []byte) (*welcome, error) {
	d := decoder{message: "Welcome", rest: body}
	w := &welcome{version: d.u16("version"), features: d.u64("features"), idle: d.u32("idle time")}
	w.software = d.text("software", maxSoftware)
	if d.err == nil && w.version != Version {
		d.fail("version", "%d was chosen, only %d was offered", w.version, Version)
	}
	if d.err == nil && w.idle < minIdleMillis {
		d.fail("idle time", "%d ms, at least %d wanted", w.idle, minIdleMillis)
	}
	return w, d.end()
}
