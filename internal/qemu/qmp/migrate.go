// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Status is the state of a migration as QEMU names it (qapi/migration.json).
type Status string

// The states of a migration. A QEMU that has not migrated reports [StatusNone].
const (
	StatusNone              Status = "none"
	StatusSetup             Status = "setup"
	StatusCancelling        Status = "cancelling"
	StatusCancelled         Status = "cancelled"
	StatusActive            Status = "active"
	StatusPostcopyDevice    Status = "postcopy-device" // QEMU newer than 10.1
	StatusPostcopyActive    Status = "postcopy-active"
	StatusPostcopyPaused    Status = "postcopy-paused"
	StatusPostcopyRecoverSU Status = "postcopy-recover-setup" // QEMU 9.1 and newer
	StatusPostcopyRecover   Status = "postcopy-recover"
	StatusCompleted         Status = "completed"
	StatusFailed            Status = "failed"
	StatusPreSwitchover     Status = "pre-switchover"
	StatusDevice            Status = "device"
	StatusWaitUnplug        Status = "wait-unplug"
)

// Ended tells whether nothing more will happen without a new command.
func (s Status) Ended() bool {
	return s == StatusCompleted || s == StatusFailed || s == StatusCancelled
}

// Migration is the reply to query-migrate. What a QEMU does not report is zero;
// a destination reports little but the status.
type Migration struct {
	Status Status
	// ErrorDesc says why a migration failed, in QEMU's words.
	ErrorDesc string
	// BlockedReasons say why this QEMU cannot be migrated now.
	BlockedReasons []string
	RAM            RAM
	// TotalTime runs until the migration has ended.
	TotalTime, SetupTime time.Duration
	// Downtime is set at the end, ExpectedDowntime before.
	Downtime, ExpectedDowntime time.Duration
	// ThrottlePercentage is how much auto-converge slows the guest.
	ThrottlePercentage int
}

// RAM counts what a source has sent, in bytes where nothing else is said. The
// numbers are signed because QEMU's are: one that it miscounted must not hide the rest.
type RAM struct {
	Transferred      int64 `json:"transferred"`
	Remaining        int64 `json:"remaining"`
	Total            int64 `json:"total"`
	ZeroPages        int64 `json:"duplicate"` // pages
	NormalPages      int64 `json:"normal"`    // pages
	NormalBytes      int64 `json:"normal-bytes"`
	PageSize         int64 `json:"page-size"`
	DirtyPagesRate   int64 `json:"dirty-pages-rate"`  // pages per second
	DirtySyncCount   int64 `json:"dirty-sync-count"`  // rounds
	PostcopyRequests int64 `json:"postcopy-requests"` // pages the destination asked for
	PrecopyBytes     int64 `json:"precopy-bytes"`
	DowntimeBytes    int64 `json:"downtime-bytes"`
	PostcopyBytes    int64 `json:"postcopy-bytes"`
	MultifdBytes     int64 `json:"multifd-bytes"`
	// Mbps is the throughput in megabits (10^6) per second.
	Mbps float64 `json:"mbps"`
}

type rawMigration struct {
	Status             Status   `json:"status"`
	ErrorDesc          string   `json:"error-desc"`
	BlockedReasons     []string `json:"blocked-reasons"`
	RAM                RAM      `json:"ram"`
	TotalTime          int64    `json:"total-time"`
	SetupTime          int64    `json:"setup-time"`
	Downtime           int64    `json:"downtime"`
	ExpectedDowntime   int64    `json:"expected-downtime"`
	ThrottlePercentage int      `json:"cpu-throttle-percentage"`
}

// QueryMigrate reports the state of the migration that this QEMU is part of.
func (c *Client) QueryMigrate(ctx context.Context) (*Migration, error) {
	var raw rawMigration
	if err := c.Execute(ctx, "query-migrate", nil, &raw); err != nil {
		return nil, err
	}
	if raw.Status == "" {
		raw.Status = StatusNone
	}
	return &Migration{
		Status:             raw.Status,
		ErrorDesc:          raw.ErrorDesc,
		BlockedReasons:     raw.BlockedReasons,
		RAM:                raw.RAM,
		TotalTime:          milliseconds(raw.TotalTime),
		SetupTime:          milliseconds(raw.SetupTime),
		Downtime:           milliseconds(raw.Downtime),
		ExpectedDowntime:   milliseconds(raw.ExpectedDowntime),
		ThrottlePercentage: raw.ThrottlePercentage,
	}, nil
}

func milliseconds(n int64) time.Duration { return time.Duration(n) * time.Millisecond }

// WaitMigration asks every 20 ms until done says so, and returns the state that
// satisfied it. A migration that has ended otherwise is an error that carries
// QEMU's reason, as is the context's end. It needs no events, so it also works
// for a QEMU whose "events" capability is off.
func (c *Client) WaitMigration(ctx context.Context, done func(*Migration) bool) (*Migration, error) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		m, err := c.QueryMigrate(ctx)
		if err != nil {
			return nil, err
		}
		if done(m) {
			return m, nil
		}
		if m.Status.Ended() {
			return m, fmt.Errorf("migration %s: %s", m.Status, orUnknown(m.ErrorDesc))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return m, fmt.Errorf("waiting for the migration, now %s: %w", m.Status, context.Cause(ctx))
		}
	}
}

func orUnknown(reason string) string {
	if reason == "" {
		return "QEMU gave no reason"
	}
	return reason
}

// SetCapabilities switches migration capabilities such as "postcopy-ram" on or
// off. QEMU applies all or none.
func (c *Client) SetCapabilities(ctx context.Context, caps map[string]bool) error {
	type capability struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	args := struct {
		Capabilities []capability `json:"capabilities"`
	}{Capabilities: make([]capability, 0, len(caps))}
	for _, name := range slices.Sorted(maps.Keys(caps)) {
		args.Capabilities = append(args.Capabilities, capability{name, caps[name]})
	}
	return c.Execute(ctx, "migrate-set-capabilities", args, nil)
}

// Capabilities returns every migration capability this QEMU knows and its state.
func (c *Client) Capabilities(ctx context.Context) (map[string]bool, error) {
	var reply []struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	if err := c.Execute(ctx, "query-migrate-capabilities", nil, &reply); err != nil {
		return nil, err
	}
	caps := make(map[string]bool, len(reply))
	for _, r := range reply {
		caps[r.Capability] = r.State
	}
	return caps, nil
}

// SetParameters sets migration parameters such as "max-bandwidth" (bytes per
// second) or "downtime-limit" (milliseconds).
func (c *Client) SetParameters(ctx context.Context, parameters map[string]any) error {
	return c.Execute(ctx, "migrate-set-parameters", parameters, nil)
}

type uriArgs struct {
	URI    string `json:"uri"`
	Resume bool   `json:"resume,omitempty"`
}

// Migrate starts to migrate this QEMU to uri, such as "unix:/path". It returns at
// once; see [Client.WaitMigration].
func (c *Client) Migrate(ctx context.Context, uri string) error {
	return c.Execute(ctx, "migrate", uriArgs{URI: uri}, nil)
}

// MigrateResume connects a source that is [StatusPostcopyPaused] to uri anew.
func (c *Client) MigrateResume(ctx context.Context, uri string) error {
	return c.Execute(ctx, "migrate", uriArgs{URI: uri, Resume: true}, nil)
}

// MigrateIncoming makes a QEMU that was started with "-incoming defer" listen.
func (c *Client) MigrateIncoming(ctx context.Context, uri string) error {
	return c.Execute(ctx, "migrate-incoming", uriArgs{URI: uri}, nil)
}

// StartPostcopy makes a source stop its guest and switch to post-copy.
func (c *Client) StartPostcopy(ctx context.Context) error {
	return c.Execute(ctx, "migrate-start-postcopy", nil, nil)
}

// MigrateCancel ends a source's migration; its guest goes on there. After the
// switch to post-copy QEMU does not cancel any more.
func (c *Client) MigrateCancel(ctx context.Context) error {
	return c.Execute(ctx, "migrate_cancel", nil, nil)
}

// MigrateRecoverOOB makes a destination that is [StatusPostcopyPaused] listen at
// uri, out of band, because such a QEMU may answer nothing else.
func (c *Client) MigrateRecoverOOB(ctx context.Context, uri string) error {
	return c.ExecuteOOB(ctx, "migrate-recover", uriArgs{URI: uri}, nil)
}

// MigratePauseOOB breaks a post-copy migration's connection on purpose, out of
// band, so that it can be recovered.
func (c *Client) MigratePauseOOB(ctx context.Context) error {
	return c.ExecuteOOB(ctx, "migrate-pause", nil, nil)
}

// RunState is what the guest is doing.
type RunState struct {
	// Status is QEMU's word: "running", "paused", "inmigrate", "postmigrate",
	// "finish-migrate", ...
	Status  string `json:"status"`
	Running bool   `json:"running"`
}

// QueryStatus reports what the guest is doing.
func (c *Client) QueryStatus(ctx context.Context) (RunState, error) {
	var s RunState
	err := c.Execute(ctx, "query-status", nil, &s)
	return s, err
}

// Cont lets the guest run.
func (c *Client) Cont(ctx context.Context) error { return c.Execute(ctx, "cont", nil, nil) }

// Stop pauses the guest.
func (c *Client) Stop(ctx context.Context) error { return c.Execute(ctx, "stop", nil, nil) }

// Quit ends QEMU. That the connection is gone before the reply is no error.
func (c *Client) Quit(ctx context.Context) error {
	err := c.Execute(ctx, "quit", nil, nil)
	if errors.Is(err, ErrClosed) {
		return nil
	}
	return err
}
