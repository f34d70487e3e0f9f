// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"scattergather.io/scattergather/internal/gather"
	"scattergather.io/scattergather/internal/qemu/qmp"
)

const (
	// monitorTimeout bounds one command to QEMU's monitor.
	monitorTimeout = 20 * time.Second
	// unlimited is a max-bandwidth that no link reaches, in bytes per second:
	// QEMU's default of 128 MiB/s would throttle the scatter.
	unlimited = int64(1) << 40
)

// hypervisor drives one stock QEMU through its monitor: it sets capabilities,
// starts the stream and switches to post-copy.
type hypervisor struct {
	spec Spec
	// qmp is nil for a gather that an earlier process began, until it is needed.
	qmp *qmp.Client
	// running tells that the guest ran when the agent came.
	running bool
	// listener takes the source QEMU's connections; nil at a destination.
	listener *net.UnixListener
	migrate  sync.Once
}

// openSource readies a source QEMU and listens where its stream will arrive.
func openSource(ctx context.Context, spec Spec) (*hypervisor, error) {
	h, err := openMonitor(ctx, spec, map[string]bool{"postcopy-ram": true, "return-path": true})
	if err != nil {
		return nil, err
	}
	state, err := h.qmp.QueryStatus(ctx)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("asking whether the guest runs: %w", err), h.close())
	}
	h.running = state.Running
	if err := removeStale(spec.Stream); err != nil {
		return nil, errors.Join(err, h.close())
	}
	h.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: spec.Stream, Net: "unix"})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listening for the source QEMU: %w", err), h.close())
	}
	return h, nil
}

// openDestination readies a destination QEMU and makes it listen on its stream.
func openDestination(ctx context.Context, spec Spec) (*hypervisor, error) {
	h, err := openMonitor(ctx, spec, map[string]bool{"postcopy-ram": true})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, monitorTimeout)
	defer cancel()
	if err := h.qmp.MigrateIncoming(ctx, "unix:"+spec.Stream); err != nil {
		return nil, errors.Join(fmt.Errorf("asking the destination QEMU to listen at %s (was it started with -incoming defer?): %w",
			spec.Stream, err), h.close())
	}
	return h, nil
}

// attachMonitor connects to QEMU's monitor and changes nothing.
func attachMonitor(ctx context.Context, spec Spec) (*hypervisor, error) {
	ctx, cancel := context.WithTimeout(ctx, monitorTimeout)
	defer cancel()
	client, err := qmp.Dial(ctx, spec.QMP)
	if err != nil {
		return nil, fmt.Errorf("connecting to QEMU's monitor at %s: %w", spec.QMP, err)
	}
	return &hypervisor{spec: spec, qmp: client}, nil
}

// openMonitor connects to QEMU's monitor and sets what the spec asks on top of base.
func openMonitor(ctx context.Context, spec Spec, base map[string]bool) (*hypervisor, error) {
	h, err := attachMonitor(ctx, spec)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, monitorTimeout)
	defer cancel()
	client := h.qmp
	caps := maps.Clone(base)
	maps.Copy(caps, spec.Capabilities)
	if err := client.SetCapabilities(ctx, caps); err != nil {
		return nil, errors.Join(fmt.Errorf("setting migration capabilities %v: %w", caps, err), h.close())
	}
	params := map[string]any{"max-bandwidth": unlimited}
	maps.Copy(params, spec.Parameters)
	if err := client.SetParameters(ctx, params); err != nil {
		return nil, errors.Join(fmt.Errorf("setting migration parameters: %w", err), h.close())
	}
	return h, nil
}

// accept returns the source QEMU's next connection. The first call tells QEMU to
// migrate; the later ones take its multifd channels.
func (h *hypervisor) accept(ctx context.Context) (net.Conn, error) {
	var err error
	h.migrate.Do(func() {
		ask, cancel := context.WithTimeout(ctx, monitorTimeout)
		defer cancel()
		err = h.qmp.Migrate(ask, "unix:"+h.spec.Stream)
	})
	if err != nil {
		return nil, fmt.Errorf("asking the source QEMU to migrate: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = h.listener.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	conn, err := h.listener.Accept()
	if err != nil && ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return conn, err
}

// startPostcopy moves the CPU: the source QEMU stops the guest and sends its
// device state next.
func (h *hypervisor) startPostcopy(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, monitorTimeout)
	defer cancel()
	return h.qmp.StartPostcopy(ctx)
}

// connect opens the stream into the destination QEMU.
func (h *hypervisor) connect(ctx context.Context) (net.Conn, error) {
	return (&net.Dialer{Timeout: monitorTimeout}).DialContext(ctx, "unix", h.spec.Stream)
}

// recoverStream makes a destination QEMU whose stream broke listen on a fresh
// socket and connects to it. The command goes out of band: a QEMU whose main loop
// waits for a page answers nothing else.
func (h *hypervisor) recoverStream(ctx context.Context) (net.Conn, error) {
	path := h.spec.Stream + ".r"
	if err := removeStale(path); err != nil {
		return nil, err
	}
	ask, cancel := context.WithTimeout(ctx, monitorTimeout)
	defer cancel()
	if err := h.reattach(ask); err != nil {
		return nil, err
	}
	if err := h.waitPaused(ask); err != nil {
		return nil, err
	}
	if err := h.qmp.MigrateRecoverOOB(ask, "unix:"+path); err != nil {
		return nil, fmt.Errorf("asking the destination QEMU to recover: %w", err)
	}
	return (&net.Dialer{Timeout: monitorTimeout}).DialContext(ctx, "unix", path)
}

// waitPaused waits until QEMU has noticed that its stream is gone. A monitor that
// does not answer query-migrate, since the main loop waits for a page, is taken
// for paused: migrate-recover itself says if it is not.
func (h *hypervisor) waitPaused(ctx context.Context) error {
	short, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	m, err := h.qmp.WaitMigration(short, func(m *qmp.Migration) bool {
		return m.Status == qmp.StatusPostcopyPaused || m.Status.Ended()
	})
	switch {
	case err == nil && m.Status == qmp.StatusCompleted:
		return gather.ErrCompleted
	case err == nil && m.Status.Ended():
		return fmt.Errorf("%w: the destination QEMU says that its migration %s: %s", gather.ErrNotResumable, m.Status, m.ErrorDesc)
	case err == nil:
		return nil
	case ctx.Err() == nil && short.Err() != nil:
		return nil
	}
	return fmt.Errorf("waiting for the destination QEMU to pause its broken migration: %w", err)
}

// reattach makes sure that there is a connection to the monitor. A monitor on which
// nobody listens any more belonged to a QEMU that is gone, and its guest with it.
func (h *hypervisor) reattach(ctx context.Context) error {
	if h.qmp != nil {
		select {
		case <-h.qmp.Done():
		default:
			return nil
		}
	}
	fresh, err := attachMonitor(ctx, h.spec)
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: the destination QEMU is gone: %w", gather.ErrNotResumable, err)
	}
	if err != nil {
		return err
	}
	h.qmp = fresh.qmp
	return nil
}

// explain adds to err what QEMU itself says of the migration, if it says anything.
func (h *hypervisor) explain(err error) error {
	if err == nil || h.qmp == nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if m, qerr := h.qmp.QueryMigrate(ctx); qerr == nil && m.ErrorDesc != "" {
		return fmt.Errorf("%w (QEMU says: %s)", err, m.ErrorDesc)
	}
	return err
}

// keepGuest makes sure that the guest runs at the source after a migration that
// failed before the destination's CPU could start. A source without a return path
// believes itself done once it has written everything, and must be told to go on.
func (h *hypervisor) keepGuest() error {
	if !h.running {
		return nil // it was paused before; it stays so
	}
	ctx, cancel := context.WithTimeout(context.Background(), monitorTimeout)
	defer cancel()
	m, err := h.qmp.QueryMigrate(ctx)
	if err == nil && !m.Status.Ended() && m.Status != qmp.StatusNone {
		// An error means that it has just ended, which is what is wanted.
		_ = h.qmp.MigrateCancel(ctx)
	}
	deadline := time.Now().Add(monitorTimeout / 2)
	for {
		st, err := h.qmp.QueryStatus(ctx)
		if err != nil {
			return fmt.Errorf("asking whether the guest runs at the source: %w", err)
		}
		if st.Running {
			return nil
		}
		if st.Status == "postmigrate" || time.Now().After(deadline) {
			return h.qmp.Cont(ctx)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (h *hypervisor) close() error {
	var err error
	if h.listener != nil {
		err = h.listener.Close()
	}
	if h.qmp != nil {
		err = errors.Join(err, h.qmp.Close())
	}
	return err
}

func removeStale(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("making the folder of %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing a stale socket: %w", err)
	}
	return nil
}
