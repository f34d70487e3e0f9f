// SPDX-License-Identifier: Apache-2.0

// Package dataplane_test moves real guests with the real agent: stock QEMU at both
// ends, nodes that are network namespaces with shaped links, and a guest that
// verifies every page of its memory. Nothing here is simulated, so a machine that
// lacks root, QEMU or the guest's kernel fails these tests; none is skipped.
//
// One guest is booted and then moved from test to test, from one host to the other
// and back: see stage. It never forgets a page that was wrong once.
package dataplane_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/lab"
)

// agentEnv names a ready agent program; without it the tests build one.
const agentEnv = "SG_AGENT"

// What TestMain found or built.
var (
	assets      *lab.Assets
	agentBinary string
)

func TestMain(m *testing.M) { os.Exit(runAll(m)) }

func runAll(m *testing.M) (code int) {
	dir, err := os.MkdirTemp("", "scattergather-dataplane-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "making a directory for the agent's program:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	if err := prepare(ctx, dir); err != nil {
		fmt.Fprintf(os.Stderr, "The data-plane tests move real guests and cannot run on this machine: %v\n"+
			"`make setup` installs what is missing (QEMU and a kernel for the guest); then run them as root: `make integration`.\n", err)
		return 1
	}
	fmt.Printf("QEMU %s, accelerator %s, agent %s\n", assets.Version, assets.Accelerator, agentBinary)
	code = m.Run()
	if err := strike(); err != nil {
		fmt.Fprintln(os.Stderr, "FAIL: clearing the lab:", err)
		return max(code, 1)
	}
	return code
}

// prepare finds everything the tests need, or says what is missing.
func prepare(ctx context.Context, dir string) (err error) {
	if os.Geteuid() != 0 {
		return fmt.Errorf("not root: network namespaces and shaped links need it")
	}
	if assets, err = lab.FindAssets(ctx); err != nil {
		return err
	}
	if agentBinary = os.Getenv(agentEnv); agentBinary != "" {
		if !filepath.IsAbs(agentBinary) {
			return fmt.Errorf("%s=%s is not an absolute path", agentEnv, agentBinary)
		}
		_, err := os.Stat(agentBinary)
		return err
	}
	agentBinary = filepath.Join(dir, "agent")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", agentBinary, "scattergather.io/scattergather/cmd/agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building the agent: %w\n%s", err, out)
	}
	return nil
}
