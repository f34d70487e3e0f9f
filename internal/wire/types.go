// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
)

// MigrationID names one migration of one VM. Kubernetes gives it as a UID.
type MigrationID [16]byte

// NewMigrationID returns a random identifier in the form of a version 4 UUID.
func NewMigrationID() MigrationID {
	var id MigrationID
	// rand.Read never fails: it crashes the process instead.
	rand.Read(id[:])
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	return id
}

// ParseMigrationID reads the 36 characters of the UUID text form, in either case.
func ParseMigrationID(s string) (MigrationID, error) {
	var id MigrationID
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return id, fmt.Errorf("migration id %.40q is no UUID", s)
	}
	text := []byte(s[0:8] + s[9:13] + s[14:18] + s[19:23] + s[24:36])
	if _, err := hex.Decode(id[:], text); err != nil {
		return MigrationID{}, fmt.Errorf("migration id %q is no UUID: %w", s, err)
	}
	return id, nil
}

// String returns the UUID text form in lower case.
func (id MigrationID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", id[0:4], id[4:6], id[6:8], id[8:10], id[10:16])
}

// Session names one reservation at an intermediary. It survives a restart of the
// intermediary's agent, as the pages do; once they are lost, a reservation gets a new
// name, which is how peers learn of it.
type Session [16]byte

// Role is the conversation that a connection carries. The agent named first dials.
type Role uint8

// The roles.
const (
	SourceToDestination       Role = 1
	SourceToIntermediary      Role = 2
	DestinationToIntermediary Role = 3
)

// String returns "source to destination" and the like.
func (r Role) String() string {
	switch r {
	case SourceToDestination:
		return "source to destination"
	case SourceToIntermediary:
		return "source to intermediary"
	case DestinationToIntermediary:
		return "destination to intermediary"
	}
	return fmt.Sprintf("role %d", uint8(r))
}

// LaneKind says what a lane is for.
type LaneKind uint8

// The kinds of lane.
const (
	LaneControl LaneKind = 0
	LaneUrgent  LaneKind = 1
	LaneBulk    LaneKind = 2
)

// String returns "control", "urgent" or "bulk".
func (k LaneKind) String() string {
	switch k {
	case LaneControl:
		return "control"
	case LaneUrgent:
		return "urgent"
	case LaneBulk:
		return "bulk"
	}
	return fmt.Sprintf("lane kind %d", uint8(k))
}

// Version is the only version of the protocol that this package speaks.
const Version = 1

// minIdleMillis bounds the pings that a peer can ask for by a short idle time.
const minIdleMillis = 100

// Limits of the protocol. A peer that exceeds one is cut off.
const (
	// MaxLanes bounds the bulk lanes of a connection.
	MaxLanes = 16
	// MaxControlBody bounds the body of a frame on a control lane in bytes. Setup
	// is what needs it: 4096 RAM blocks and 250 holders.
	MaxControlBody = 2 << 20
	// MaxBatch bounds the pages of one Pages frame, and the page references of one
	// Read frame.
	MaxBatch = 64
	// MaxRecords bounds the records of one Records frame.
	MaxRecords = 4096
	// MaxWant bounds the pages of one Want frame.
	MaxWant = 1024
	// MaxRuns bounds the runs of one Free frame.
	MaxRuns = 4096
	// MaxPackageChunk bounds the data of one Package frame in bytes.
	MaxPackageChunk = 1 << 20
	// MaxPackage bounds the device-state package in bytes: QEMU gives its size in
	// four bytes (migration/savevm.c). Do not allocate so much for a peer's word.
	MaxPackage = 1<<32 - 1
	// MaxHolders bounds the table of intermediaries of a migration.
	MaxHolders = 250
	// MaxText bounds free text, such as reasons, in bytes. Longer text is cut.
	MaxText = 1024
)

// Sentinels. Errors of this package wrap them where callers have to branch.
var (
	// ErrClosed is returned by calls on a Conn or Listener that this side closed.
	ErrClosed = errors.New("connection closed")
	// ErrPeer means that the peer's certificate is missing, not valid, or that it
	// names another node than the wanted one.
	ErrPeer = errors.New("peer not trusted")
	// ErrVersion means that no protocol version is spoken by both sides.
	ErrVersion = errors.New("no common protocol version")
	// ErrProtocol means that the peer sent bytes that the protocol does not allow.
	ErrProtocol = errors.New("protocol violation")
	// ErrTimeout means that the peer was silent, or did not take data, for longer
	// than Options.IdleTimeout.
	ErrTimeout = errors.New("peer is silent")
	// ErrSealed means that a sealed page does not open: it was changed, or is not
	// the page and version it is said to be, or the key is another.
	ErrSealed = errors.New("sealed page does not open")
)
