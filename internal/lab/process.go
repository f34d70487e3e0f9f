// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// endGrace is how long a process may take to end after SIGTERM.
const endGrace = 3 * time.Second

// Process is a program that runs on a node. Its output goes to a log file of
// the run.
type Process struct {
	Name string

	cmd  *exec.Cmd
	log  string
	done chan struct{}
	err  error // set before done is closed
}

// Start runs a command on a node, in its network namespace. The command dies
// with the lab, however that ends. The name is that of the log file and must be
// unique in the run.
func (n *Node) Start(name string, cmd *exec.Cmd) (*Process, error) {
	p := &Process{Name: name, cmd: cmd, log: filepath.Join(n.run.Path, name+".log"), done: make(chan struct{})}
	out, err := os.Create(p.log)
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	defer out.Close()
	if cmd.Stdout == nil {
		cmd.Stdout = out
	}
	if cmd.Stderr == nil {
		cmd.Stderr = out
	}
	// The parent in the sense of Pdeathsig is the thread; the node's lives as
	// long as the node. An own process group keeps the terminal's Ctrl-C away:
	// the lab ends its children in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := n.Do(cmd.Start); err != nil {
		return nil, fmt.Errorf("starting %s on %s: %w", name, n.Name, err)
	}
	if err := n.run.record(cmd.Process.Pid); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, fmt.Errorf("recording %s: %w", name, err)
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	n.adopt(p)
	return p, nil
}

// Pid is the process's number.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err tells how an ended process ended, with the last lines of its log; nil
// while it runs and after a clean exit.
func (p *Process) Err() error {
	select {
	case <-p.done:
	default:
		return nil
	}
	if p.err == nil {
		return nil
	}
	return fmt.Errorf("%s ended: %w%s", p.Name, p.err, p.tail())
}

// tail is the end of the log, for error messages.
func (p *Process) tail() string {
	log, err := os.ReadFile(p.log)
	log = bytes.TrimSpace(log)
	if err != nil || len(log) == 0 {
		return ""
	}
	lines := strings.Split(string(log[max(0, len(log)-2000):]), "\n")
	return "\n  " + strings.Join(lines[max(0, len(lines)-10):], "\n  ")
}

// Kill ends the process at once, as a crash would.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// Stop asks the process to end and kills it when it does not.
func (p *Process) Stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(endGrace):
		p.Kill()
	}
}

// ErrEnded is returned by waits whose process ended meanwhile.
var ErrEnded = errors.New("the process has ended")

// waitFor polls a condition until it holds, the process ends or the context
// does.
func (p *Process) waitFor(ctx context.Context, what string, holds func() bool) error {
	for tick := time.NewTicker(5 * time.Millisecond); ; {
		if holds() {
			tick.Stop()
			return nil
		}
		select {
		case <-tick.C:
		case <-p.done:
			return fmt.Errorf("%s: waiting for %s: %w%s", p.Name, what, ErrEnded, p.tail())
		case <-ctx.Done():
			return fmt.Errorf("%s: waiting for %s: %w%s", p.Name, what, context.Cause(ctx), p.tail())
		}
	}
}
