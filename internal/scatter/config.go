// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/go-logr/logr"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// Strategy says when the CPU moves.
type Strategy uint8

const (
	// Immediate moves the CPU first and the memory after it, as the paper does.
	Immediate Strategy = iota
	// Hybrid sends one pass of memory while the guest still runs at the source, then
	// moves the CPU, then sends what was dirtied meanwhile.
	Hybrid
)

// String returns "immediate" or "hybrid".
func (s Strategy) String() string {
	if s == Hybrid {
		return "hybrid"
	}
	return "immediate"
}

// ParseStrategy is the inverse of Strategy.String.
func ParseStrategy(s string) (Strategy, error) {
	for _, st := range []Strategy{Immediate, Hybrid} {
		if s == st.String() {
			return st, nil
		}
	}
	return 0, fmt.Errorf("strategy %q is neither %q nor %q", s, Immediate, Hybrid)
}

// MarshalText makes a strategy readable in JSON.
func (s Strategy) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText is the inverse of MarshalText.
func (s *Strategy) UnmarshalText(text []byte) error {
	st, err := ParseStrategy(string(text))
	*s = st
	return err
}

// Peer is another node's agent.
type Peer struct {
	// Name is for people.
	Name string
	// Identity is what the peer's certificate must prove.
	Identity wire.Identity
	// Address is the host:port of the peer's data plane.
	Address string
	// Bytes of guest memory that an intermediary is asked to lend. Not used for the
	// destination.
	Bytes uint64
}

// Switcher asks the hypervisor to stop the guest and to go on in post-copy mode (QMP
// migrate-start-postcopy, or libvirt's equivalent). It is called once, after the
// destination accepted the VM, and must return when ctx ends.
type Switcher func(ctx context.Context) error

// Acceptor returns the source QEMU's next connection: first the main stream, then its
// multifd channels. It must return when ctx ends. The engine owns what it returns.
type Acceptor func(ctx context.Context) (net.Conn, error)

// Config describes one migration. Zero values of the limits mean the defaults.
type Config struct {
	// Migration names the migration to all peers.
	Migration wire.MigrationID
	Strategy  Strategy
	// Destination will run the VM.
	Destination Peer
	// Intermediaries may be empty. One that cannot be reached or has no memory to
	// lend is left out.
	Intermediaries []Peer
	// Wire configures the connections to all of them.
	Wire   wire.Options
	Accept Acceptor
	Switch Switcher
	Log    logr.Logger

	// MultifdChannels is the number of multifd channels that the source QEMU opens
	// beside its main stream; 0 when multifd is off.
	MultifdChannels int
	// PageSizes gives the host page size in bytes of RAM blocks by name where the
	// stream does not say it: a source without post-copy does not. Blocks that are
	// not named have 4096.
	PageSizes map[string]uint64

	// ConnectTimeout bounds dialling and reserving; default 10 s.
	ConnectTimeout time.Duration
	// AcceptTimeout bounds the wait for QEMU's connection; default 60 s.
	AcceptTimeout time.Duration
	// ReadyTimeout bounds the wait for the destination's QEMU to accept the VM;
	// default 60 s.
	ReadyTimeout time.Duration
	// Grace is how long intermediaries keep pages when neither source nor
	// destination is connected; default 10 min.
	Grace time.Duration
	// FlightBytes bounds the bytes under way that are not acknowledged; default 64 MiB.
	FlightBytes int
	// DirectTarget and IntermediaryTarget are the queueing delays that the engine
	// tolerates to the destination and to an intermediary; defaults 5 ms and 3 ms.
	// Where both share a bottleneck, the larger one gets nearly all of it: that
	// keeps the direct path full.
	DirectTarget, IntermediaryTarget time.Duration
}

// Failures that callers branch on.
var (
	// ErrRolledBack is wrapped by every error of Run after which the guest still
	// runs at the source.
	ErrRolledBack = errors.New("rolled back, the guest runs on at the source")
	// ErrStalled is wrapped by the error of Run when its context ended after the
	// device state was handed over and before the commit. The stream of the source
	// QEMU was not closed then: it leaks on purpose and lives as long as the process.
	ErrStalled = errors.New("the guest has left the source but its memory has not")
)

func (c *Config) setDefaults() {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&c.ConnectTimeout, 10*time.Second)
	def(&c.AcceptTimeout, time.Minute)
	def(&c.ReadyTimeout, time.Minute)
	def(&c.Grace, 10*time.Minute)
	def(&c.DirectTarget, 5*time.Millisecond)
	def(&c.IntermediaryTarget, 3*time.Millisecond)
	if c.FlightBytes <= 0 {
		c.FlightBytes = 64 << 20
	}
}

func (c *Config) validate() error {
	switch {
	case c.Migration == wire.MigrationID{}:
		return errors.New("scatter: the migration has no id")
	case c.Strategy > Hybrid:
		return fmt.Errorf("scatter: unknown strategy %d", c.Strategy)
	case c.Accept == nil || c.Switch == nil:
		return errors.New("scatter: Accept and Switch are required")
	case c.Destination.Address == "" || c.Destination.Identity == "":
		return errors.New("scatter: the destination needs an address and an identity")
	case len(c.Intermediaries) > pages.MaxHolders:
		return fmt.Errorf("scatter: %d intermediaries are more than %d", len(c.Intermediaries), pages.MaxHolders)
	case c.MultifdChannels < 0 || c.MultifdChannels > maxChannels:
		return fmt.Errorf("scatter: %d multifd channels are not within 0 to %d", c.MultifdChannels, maxChannels)
	}
	for i, p := range c.Intermediaries {
		if p.Address == "" || p.Identity == "" {
			return fmt.Errorf("scatter: intermediary %d (%q) needs an address and an identity", i, p.Name)
		}
	}
	return nil
}

// maxChannels is the most multifd channels QEMU itself allows (migration/options.c).
const maxChannels = 255
