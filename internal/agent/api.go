// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"scattergather.io/scattergather/internal/gather"
	"scattergather.io/scattergather/internal/pool"
	"scattergather.io/scattergather/internal/scatter"
	"scattergather.io/scattergather/internal/wire"
)

// Role says which half of a migration an agent is asked to do.
type Role string

const (
	// RoleSource scatters the memory of a VM that runs on the agent's node.
	RoleSource Role = "source"
	// RoleDestination gathers the memory of a VM that will run on the agent's node.
	RoleDestination Role = "destination"
)

// Peer is another node's agent as a Spec names it.
type Peer struct {
	// Name is the node's name; the peer's certificate must carry it.
	Name string `json:"name"`
	// Address is the host:port of the peer's data plane.
	Address string `json:"address"`
	// Bytes is the memory asked of an intermediary, in bytes of guest pages. For
	// the destination it is not used.
	Bytes uint64 `json:"bytes,omitempty"`
}

// Spec asks an agent for its half of one migration of a VM whose QEMU the agent
// drives itself through QEMU's monitor.
type Spec struct {
	// ID is the migration's UUID; both halves carry the same.
	ID string `json:"id"`
	// Role is "source" or "destination".
	Role Role `json:"role"`
	// QMP is the path of the QEMU monitor's unix socket.
	QMP string `json:"qmp"`
	// Stream is the path of the unix socket that carries the migration stream. At
	// the source the agent listens there, at the destination QEMU does.
	Stream string `json:"stream"`
	// Strategy is "immediate" (the CPU moves first; the default) or "hybrid" (one
	// pass of memory first). Only the source's counts.
	Strategy string `json:"strategy,omitempty"`
	// Destination is the peer that will run the VM; only the source's Spec has it.
	Destination Peer `json:"destination,omitzero"`
	// Intermediaries lend memory, in no particular order; at most 64.
	Intermediaries []Peer `json:"intermediaries,omitempty"`
	// Capabilities are set on QEMU before the migration, on top of postcopy-ram
	// and return-path; false turns one of these off.
	Capabilities map[string]bool `json:"capabilities,omitempty"`
	// Parameters are set on QEMU before the migration, on top of an unlimited
	// max-bandwidth.
	Parameters map[string]any `json:"parameters,omitempty"`
	// StoreBytes bounds the pages that the destination keeps before its QEMU takes
	// them; 0 is the VM's own size.
	StoreBytes uint64 `json:"storeBytes,omitempty"`
}

// multifdChannels is how many connections the source QEMU opens beside its main
// stream: none without multifd, else as many as asked for, QEMU's default being 2.
func (s *Spec) multifdChannels() int {
	if !s.Capabilities["multifd"] {
		return 0
	}
	if n, ok := s.Parameters["multifd-channels"].(float64); ok && n >= 1 && n <= 255 {
		return int(n)
	}
	return 2
}

// MaxIntermediaries bounds Spec.Intermediaries.
const MaxIntermediaries = 64

// maxSocketPath is what sockaddr_un holds, less the final NUL.
const maxSocketPath = 107

// Validate returns an error that names the first field that cannot be served.
func (s *Spec) Validate() error {
	if _, err := wire.ParseMigrationID(s.ID); err != nil {
		return fmt.Errorf("id: %w", err)
	}
	for name, path := range map[string]string{"qmp": s.QMP, "stream": s.Stream} {
		if !filepath.IsAbs(path) || len(path) > maxSocketPath {
			return fmt.Errorf("%s: %q is not an absolute path of at most %d bytes", name, path, maxSocketPath)
		}
	}
	switch s.Role {
	case RoleDestination:
		return nil
	case RoleSource:
		return s.validateSource()
	default:
		return fmt.Errorf("role: %q is neither %q nor %q", s.Role, RoleSource, RoleDestination)
	}
}

func (s *Spec) validateSource() error {
	if s.Strategy != "" {
		if _, err := scatter.ParseStrategy(s.Strategy); err != nil {
			return fmt.Errorf("strategy: %w", err)
		}
	}
	if err := s.Destination.validate(); err != nil {
		return fmt.Errorf("destination: %w", err)
	}
	if len(s.Intermediaries) > MaxIntermediaries {
		return fmt.Errorf("intermediaries: %d are more than the %d that one migration may use",
			len(s.Intermediaries), MaxIntermediaries)
	}
	seen := map[string]bool{s.Destination.Name: true}
	for i, p := range s.Intermediaries {
		if err := p.validate(); err != nil {
			return fmt.Errorf("intermediaries[%d]: %w", i, err)
		}
		if p.Bytes == 0 {
			return fmt.Errorf("intermediaries[%d]: bytes is 0: say how much memory node %q lends", i, p.Name)
		}
		if seen[p.Name] {
			return fmt.Errorf("intermediaries[%d]: node %q is named twice", i, p.Name)
		}
		seen[p.Name] = true
	}
	return nil
}

func (p *Peer) validate() error {
	if p.Name == "" || strings.ContainsAny(p.Name, "/ \t\n") {
		return fmt.Errorf("name: %q is not a node's name", p.Name)
	}
	if p.Address == "" {
		return fmt.Errorf("address of node %q is empty: give the host:port of its data plane", p.Name)
	}
	return nil
}

// State is where a half of a migration stands as a whole.
type State string

const (
	// StateRunning means that the engine works, or is stalled and will go on.
	StateRunning State = "running"
	// StateDone means that the engine has finished its half.
	StateDone State = "done"
	// StateFailed means that the engine gave up; Status.Error says why.
	StateFailed State = "failed"
)

// Status is what an agent tells of one half of a migration.
type Status struct {
	Spec  Spec      `json:"spec"`
	State State     `json:"state"`
	Since time.Time `json:"since"`
	// Error is why the half failed; empty unless State is "failed".
	Error string `json:"error,omitempty"`
	// Scatter is set at a source.
	Scatter *scatter.Progress `json:"scatter,omitempty"`
	// Gather is set at a destination.
	Gather *gather.Progress `json:"gather,omitempty"`
	// ScatterResult and GatherResult are set once State is "done".
	ScatterResult *scatter.Result `json:"scatterResult,omitempty"`
	GatherResult  *gather.Result  `json:"gatherResult,omitempty"`
}

// NodeStatus is what an agent tells of itself.
type NodeStatus struct {
	Node       string     `json:"node"`
	Address    string     `json:"address"`
	Pool       pool.Stats `json:"pool"`
	Migrations []Status   `json:"migrations"`
}

// problem is the body of every answer that is not a success.
type problem struct {
	Error string `json:"error"`
}

// decodeStrict refuses fields that it does not know, so that a misspelt option is
// an error and not a surprise.
func decodeStrict(data []byte, into any) error {
	dec := json.NewDecoder(strings.NewReader(string(data)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return fmt.Errorf("reading the request: %w", err)
	}
	return nil
}
