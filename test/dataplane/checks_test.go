// SPDX-License-Identifier: Apache-2.0

package dataplane_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/agent"
	"scattergather.io/scattergather/internal/lab"
)

// leftoverPatience is how long agents may take to forget a migration after its halves
// have ended.
const leftoverPatience = 15 * time.Second

// assertNothingLeft asserts that no agent keeps anything of a migration that is over:
// no half that runs, no session in a pool, no file, no connection.
func (s *stage) assertNothingLeft(t *testing.T, id string) {
	t.Helper()
	ctx := deadline(t, leftoverPatience)
	for {
		left := s.leftovers(ctx, t, id)
		if len(left) == 0 {
			return
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			t.Errorf("of migration %s there is left:\n  %s", id, strings.Join(left, "\n  "))
			return
		}
	}
}

// leftovers lists what agents still have of a migration. Connections are counted when
// no other migration runs.
func (s *stage) leftovers(ctx context.Context, t *testing.T, id string) (left []string) {
	running := 0
	for _, n := range s.Net.Nodes {
		st, err := s.agents.Client(n).Node(ctx)
		if err != nil {
			return []string{fmt.Sprintf("%s: its agent does not answer: %v", n.Name, err)}
		}
		for _, m := range st.Migrations {
			if m.State != agent.StateRunning {
				continue
			}
			running++
			if m.Spec.ID == id {
				left = append(left, fmt.Sprintf("%s: the %s's half runs: %s", n.Name, m.Spec.Role, phases(m)))
			}
		}
		for _, session := range st.Pool.Sessions {
			if session.Migration.String() == id {
				left = append(left, fmt.Sprintf("%s: a session of %d pages in the pool", n.Name, session.Pages))
			}
		}
		if len(st.Pool.Sessions) == 0 && st.Pool.Reserved+st.Pool.Used > 0 {
			left = append(left, fmt.Sprintf("%s: the pool without sessions has %d bytes reserved, %d used", n.Name, st.Pool.Reserved, st.Pool.Used))
		}
		files, _ := filepath.Glob(filepath.Join(s.state(t, n), "*", "*"+id+"*"))
		left = append(left, files...)
	}
	if running > 0 || len(left) > 0 {
		return left
	}
	for _, n := range s.Net.Nodes {
		if open, err := connections(n); open > 0 || err != nil {
			left = append(left, fmt.Sprintf("%s: %d connections to other nodes (%v)", n.Name, open, err))
		}
	}
	return left
}

// connections counts the established TCP connections of a node: state 01 in the fourth
// column of its table, see proc_pid_net(5).
func connections(n *lab.Node) (open int, err error) {
	err = n.Do(func() error {
		table, err := os.ReadFile("/proc/thread-self/net/tcp")
		for line := range strings.Lines(string(table)) {
			if f := strings.Fields(line); len(f) > 3 && f[3] == "01" {
				open++
			}
		}
		return err
	})
	return open, err
}

// tailLines is how much of each log a failed test shows.
const tailLines = 40

// explain prints what a failed test needs to be understood: the logs of agents and
// QEMUs, the guest's console, and how everybody thinks the migrations stand. No part
// of it waits for long.
func (s *stage) explain(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	for _, n := range s.Net.Nodes {
		st, err := s.agents.Client(n).Node(ctx)
		if err != nil {
			t.Logf("agent of %s: %v", n.Name, err)
			continue
		}
		if k := len(st.Migrations) - 2; k > 0 {
			st.Migrations = st.Migrations[k:]
		}
		text, _ := json.Marshal(st)
		t.Logf("agent of %s: %s", n.Name, text)
	}
	for side, q := range map[string]*lab.QEMU{"source": s.guest.Source, "destination": s.guest.Destination} {
		if q == nil {
			continue
		}
		ask, cancel := context.WithTimeout(ctx, 2*time.Second)
		state, err := q.QMP.QueryStatus(ask)
		if err == nil {
			mig, _ := q.QMP.QueryMigrate(ask)
			t.Logf("the %s's QEMU is %q, its migration %+v", side, state.Status, mig)
		} else {
			t.Logf("the %s's QEMU: %v; %v", side, err, q.Err())
		}
		cancel()
		t.Logf("the %s's console ends with:\n%s", side, lastLines(q.Console()))
	}
	t.Logf("the guest's counter: %+v", s.guest.Guest.Counter())
	logs, _ := filepath.Glob(filepath.Join(s.Run.Path, "*.log"))
	for _, path := range logs {
		if text, err := os.ReadFile(path); err == nil && len(text) > 0 {
			t.Logf("%s ends with:\n%s", filepath.Base(path), lastLines(string(text)))
		}
	}
}

func lastLines(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return "  " + strings.Join(lines[max(0, len(lines)-tailLines):], "\n  ")
}
