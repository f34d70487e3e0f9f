// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"github.com/go-logr/logr"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// Stream connects to the socket on which the destination QEMU waits for its
// migration. The engine owns what it returns. It must return when ctx ends.
type Stream func(ctx context.Context) (net.Conn, error)

// Recover makes a destination QEMU whose stream broke wait for a new one (QMP
// migrate-recover, out of band) and connects to it. The engine owns what it returns.
// It must return when ctx ends; its other failures are retried. It returns
// ErrCompleted when QEMU says that its migration was completed.
type Recover func(ctx context.Context) (net.Conn, error)

// Config describes one gather. Zero values of the limits mean the defaults.
type Config struct {
	// Migration names the migration to all peers.
	Migration wire.MigrationID
	// StateDir is a directory that belongs to this gather alone. It should lie on
	// tmpfs. New makes it, and it is removed when the gather is over.
	StateDir string
	// Source is what the source agent must prove to be; empty means that the first
	// source that attaches is the one.
	Source wire.Identity
	// Wire configures the connections to intermediaries.
	Wire    wire.Options
	Connect Stream
	Recover Recover
	// Suits returns why the destination QEMU cannot take a VM of that machine type and
	// those RAM blocks, or nil if nothing speaks against it; may be nil. QEMU itself
	// says to whoever feeds it only that its argument is invalid.
	Suits func(ctx context.Context, machine string, blocks []pages.Block) error
	// Explain adds to an error what the hypervisor itself says about it; may be nil.
	Explain func(error) error
	Log     logr.Logger

	// StoreBytes bounds the pages that came from the source and were not placed yet,
	// in bytes; default is the size of the VM.
	StoreBytes uint64
	// PackageBytes bounds the device state; default 256 MiB.
	PackageBytes uint64
	// SourceGrace is how long a source that was lost before it handed the device
	// state over may stay away; default 2 min.
	SourceGrace time.Duration
	// OpenTimeout bounds the wait for QEMU to accept the VM; default 60 s.
	OpenTimeout time.Duration
	// DissolveTimeout bounds the wait for intermediaries to zero their memory at the
	// end; default 10 s. One that does not answer frees it after its grace period.
	DissolveTimeout time.Duration
	// PrepageTarget is the queueing delay that prepaging tolerates on the way from the
	// intermediaries, which every demand fault pays; default 3 ms.
	PrepageTarget time.Duration
	// Pivots is the number of fault pivots of prepaging; 0 means pages.DefaultPivots.
	Pivots int
}

// Failures that callers branch on.
var (
	// ErrCompleted is what Recover returns when there is nothing to recover because
	// QEMU has completed its migration.
	ErrCompleted = errors.New("the destination QEMU has completed its migration")
	// ErrNotResumable is wrapped by Reopen's error when the earlier process ended
	// before QEMU had the device state: that QEMU cannot be fed again. Recover returns
	// it when the QEMU is gone, and the guest with it; then Run's error wraps it.
	ErrNotResumable = errors.New("the gather cannot be resumed")
	// ErrInterrupted is wrapped by Run's error when the gather did not end, but only
	// this process's part of it: its state waits for Reopen.
	ErrInterrupted = errors.New("the gather was interrupted")
	// ErrSwitched is returned by Cancel when the device state is here already.
	ErrSwitched = errors.New("the CPU has moved already: the gather must be allowed to end")
	// ErrCancelled is wrapped by Run's error after Cancel.
	ErrCancelled = errors.New("the gather was cancelled")
	// ErrAborted is wrapped by Run's error when the source gave the migration up
	// before the switch of the CPU.
	ErrAborted = errors.New("the source aborted the migration")
	// ErrRefused is wrapped by Run's error when the destination QEMU did not accept
	// the VM or its device state. The guest does not run at the destination.
	ErrRefused = errors.New("the destination QEMU refused the VM")
)

func (c *Config) setDefaults() {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&c.SourceGrace, 2*time.Minute)
	def(&c.OpenTimeout, time.Minute)
	def(&c.DissolveTimeout, 10*time.Second)
	def(&c.PrepageTarget, 3*time.Millisecond)
	if c.PackageBytes == 0 {
		c.PackageBytes = 256 << 20
	}
	if c.Explain == nil {
		c.Explain = func(err error) error { return err }
	}
}

func (c *Config) validate() error {
	switch {
	case c.Migration == wire.MigrationID{}:
		return errors.New("gather: the migration has no id")
	case !filepath.IsAbs(c.StateDir):
		return fmt.Errorf("gather: state directory %q is not an absolute path", c.StateDir)
	case c.Connect == nil || c.Recover == nil:
		return errors.New("gather: Connect and Recover are required")
	}
	return nil
}
