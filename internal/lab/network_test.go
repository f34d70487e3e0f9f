// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

func newTestNetwork(t *testing.T, specs ...NodeSpec) *Network {
	t.Helper()
	run, err := NewRunDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := run.Close(); err != nil {
			t.Error(err)
		}
	})
	n, err := NewNetwork(run, specs, 25*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// stream sends from one node to another for as long as the test lasts.
func stream(t *testing.T, from, to *Node) {
	t.Helper()
	var listener net.Listener
	err := to.Do(func() (err error) {
		listener, err = net.Listen("tcp", to.Addr.String()+":0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		conn, err := listener.Accept()
		if err == nil {
			_, _ = io.Copy(io.Discard, conn)
		}
	}()
	var conn net.Conn
	err = from.Do(func() (err error) {
		conn, err = net.Dial("tcp", listener.Addr().String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		for buf := make([]byte, 64<<10); ; {
			if _, err := conn.Write(buf); err != nil {
				return
			}
		}
	}()
}

// rate measures what a node sends, in bits per second.
func rate(t *testing.T, n *Node, period time.Duration) float64 {
	t.Helper()
	before, err := n.Traffic()
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	time.Sleep(period)
	after, err := n.Traffic()
	if err != nil {
		t.Fatal(err)
	}
	return float64(after.Out-before.Out) * 8 / time.Since(began).Seconds()
}

func TestLinksKeepTheirRatesAndChangeThem(t *testing.T) {
	n := newTestNetwork(t,
		NodeSpec{Name: "source", Rates: Rates{Up: 400e6, Down: 400e6}},
		NodeSpec{Name: "destination", Rates: Rates{Up: 400e6, Down: 80e6}})
	source, destination := n.Nodes[0], n.Nodes[1]
	stream(t, source, destination)
	for _, step := range []struct {
		what string
		set  Rates
		want float64
	}{
		{"slow destination", Rates{Up: 400e6, Down: 80e6}, 80e6},
		{"destination as quick as the source", Rates{Up: 400e6, Down: 800e6}, 400e6},
		{"destination slowed down in mid-stream", Rates{Up: 400e6, Down: 40e6}, 40e6},
	} {
		if err := destination.SetRates(step.set); err != nil {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Millisecond)
		got := rate(t, source, 800*time.Millisecond)
		if got < 0.75*step.want || got > 1.15*step.want {
			t.Errorf("%s: %.0f Mbit/s, want %.0f", step.what, got/1e6, step.want/1e6)
		}
	}
}

func TestProcessesRunOnTheirNode(t *testing.T) {
	n := newTestNetwork(t, NodeSpec{Name: "source"})
	p, err := n.Nodes[0].Start("address", exec.Command("ip", "-brief", "address", "show", "dev", port))
	if err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if err := p.Err(); err != nil {
		t.Fatal(err)
	}
	if out, _ := os.ReadFile(p.log); !strings.Contains(string(out), n.Nodes[0].Addr.String()) {
		t.Errorf("ip on the node does not see its address %s:\n%s", n.Nodes[0].Addr, out)
	}
}

// A run that crashed holds no lock, and its processes are still there.
func TestCleanClearsACrashedRunAndLeavesTheLiving(t *testing.T) {
	n := newTestNetwork(t, NodeSpec{Name: "source"})
	crashed, err := NewRunDir()
	if err != nil {
		t.Fatal(err)
	}
	lost, err := NewNetwork(crashed, []NodeSpec{{Name: "source"}}, time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lost.Close() })
	sleeper, err := lost.Nodes[0].Start("sleeper", exec.Command("sleep", "600"))
	if err != nil {
		t.Fatal(err)
	}
	crashed.lock.Close()

	cleared, err := Clean()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(strings.Join(cleared, " "), crashed.ID) {
		t.Errorf("cleared %q, want %s among them", cleared, crashed.ID)
	}
	select {
	case <-sleeper.Done():
	case <-time.After(5 * time.Second):
		t.Error("the crashed run's process is still alive")
	}
	if _, err := os.Stat(crashed.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the crashed run's directory is still there: %v", err)
	}
	if _, err := os.Stat(namespaceDir + "/" + crashed.namespace("source")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the crashed run's namespace is still there: %v", err)
	}
	if _, err := n.Nodes[0].Traffic(); err != nil {
		t.Errorf("the living run was disturbed: %v", err)
	}
}
