// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// startQEMU runs a real QEMU without a guest and returns a client and the process.
func startQEMU(t *testing.T, args ...string) (*Client, *exec.Cmd) {
	t.Helper()
	program, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Fatalf("%v: install it with: hack/setup.sh, or apt-get install qemu-system-x86", err)
	}
	socket := filepath.Join(t.TempDir(), "qmp")
	cmd := exec.Command(program, append([]string{
		"-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg",
		"-qmp", "unix:" + socket + ",server=on,wait=off"}, args...)...)
	var stderr limited
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("qemu said: %s", stderr)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		c, err := Dial(ctx, socket)
		if err == nil {
			t.Cleanup(func() { c.Close() })
			return c, cmd
		}
		if ctx.Err() != nil || !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// limited keeps the first bytes written to it.
type limited []byte

func (l *limited) Write(p []byte) (int, error) {
	*l = append(*l, p[:min(len(p), 8<<10-len(*l))]...)
	return len(p), nil
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestRealQEMU(t *testing.T) {
	ctx := t.Context()
	c, cmd := startQEMU(t, "-machine", "none", "-S")
	if c.Version().Major < 7 || !c.OOB() {
		t.Errorf("version %v, out of band %v", c.Version(), c.OOB())
	}
	s, err := c.QueryStatus(ctx)
	check(t, err)
	if s.Running || s.Status != "prelaunch" {
		t.Errorf("status %+v", s)
	}
	m, err := c.QueryMigrate(ctx)
	check(t, err)
	if m.Status != StatusNone {
		t.Errorf("migration %+v", m)
	}
	var refused *Error
	if err := c.Execute(ctx, "no-such-command", nil, nil); !errors.As(err, &refused) || refused.Class != "CommandNotFound" {
		t.Errorf("error %v", err)
	}
	if err := c.MigrateRecoverOOB(ctx, "unix:/nowhere"); !errors.As(err, &refused) {
		t.Errorf("migrate-recover of no migration: %v", err)
	}
	var schema []any
	check(t, c.Execute(ctx, "query-qmp-schema", nil, &schema))
	if len(schema) < 500 {
		t.Errorf("schema of %d entries", len(schema))
	}

	check(t, cmd.Process.Signal(syscall.SIGSTOP))
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	wantError(t, c.Execute(short, "query-status", nil, nil), context.DeadlineExceeded)
	check(t, cmd.Process.Signal(syscall.SIGCONT))
	if _, err := c.QueryStatus(ctx); err != nil {
		t.Errorf("after the hang: %v", err)
	}
	events := c.Subscribe(4)
	check(t, c.Quit(ctx))
	if e := <-events.Events(); e.Name != "SHUTDOWN" || e.Time.IsZero() {
		t.Errorf("event %+v", e)
	}
	<-c.Done()
}

func TestRealMigration(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	machine := []string{"-machine", "q35", "-m", "32", "-S"}
	src, _ := startQEMU(t, machine...)
	dst, _ := startQEMU(t, append(machine, "-incoming", "defer")...)
	uri := "unix:" + filepath.Join(t.TempDir(), "migration")

	for _, c := range []*Client{src, dst} {
		check(t, c.SetCapabilities(ctx, map[string]bool{"postcopy-ram": true, "events": true}))
	}
	caps, err := src.Capabilities(ctx)
	check(t, err)
	if !caps["postcopy-ram"] || caps["xbzrle"] {
		t.Errorf("capabilities %v", caps)
	}
	check(t, src.SetParameters(ctx, map[string]any{"max-bandwidth": 1 << 20, "downtime-limit": 10}))
	check(t, dst.MigrateIncoming(ctx, uri))
	events := src.Subscribe(32)

	check(t, src.Migrate(ctx, uri))
	_, err = src.WaitMigration(ctx, func(m *Migration) bool { return m.Status == StatusActive && m.RAM.Transferred > 0 })
	check(t, err)
	check(t, src.MigrateCancel(ctx))
	_, err = src.WaitMigration(ctx, func(m *Migration) bool { return m.Status == StatusCompleted })
	wantError(t, err, nil, "migration cancelled")
	dst.Close()

	dst, _ = startQEMU(t, append(machine, "-incoming", "defer")...)
	check(t, dst.SetCapabilities(ctx, map[string]bool{"postcopy-ram": true}))
	check(t, dst.MigrateIncoming(ctx, uri))
	check(t, src.Migrate(ctx, uri))
	check(t, src.SetParameters(ctx, map[string]any{"max-bandwidth": 64 << 20}))
	check(t, src.StartPostcopy(ctx))
	m, err := src.WaitMigration(ctx, func(m *Migration) bool { return m.Status == StatusCompleted })
	check(t, err)
	if m.TotalTime <= 0 || m.RAM.Total < 32<<20 || m.RAM.PageSize != 4096 || m.RAM.ZeroPages == 0 {
		t.Errorf("migration %+v", m)
	}
	_, err = dst.WaitMigration(ctx, func(m *Migration) bool { return m.Status == StatusCompleted })
	check(t, err)
	seen := map[string]int{}
	for len(events.Events()) > 0 {
		seen[(<-events.Events()).Name]++
	}
	if seen["MIGRATION"] < 4 || events.Dropped() != 0 {
		t.Errorf("events %v, dropped %d", seen, events.Dropped())
	}
}
