// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// namespaceDir is where named network namespaces are mounted (ip-netns(8)).
const namespaceDir = "/run/netns"

// maxSegment is the largest segment that a node gives to its link in one piece. Less
// than the smallest token bucket holds, with the headers of the packets that it stands
// for (tc-tbf(8)): the bucket would cut a larger one into packets, and handling each of
// them alone costs more of the processor than everything else.
const maxSegment = minBurst * 7 / 8

// port is the name of a node's network interface inside its namespace.
const port = "eth0"

// Rates are the speeds of a node's link, in bits per second; 0 is unshaped. Up
// is from the node to the switch.
type Rates struct {
	Up   int64 `json:"up_bits_per_second"`
	Down int64 `json:"down_bits_per_second"`
}

// NodeSpec describes a node.
type NodeSpec struct {
	Name  string
	Rates Rates
}

// Network is a switch and the nodes on it. Every node is a network namespace
// with one shaped link to the switch, which has a namespace of its own. Nothing
// in it reaches the machine's own network.
type Network struct {
	Nodes []*Node

	run   *RunDir
	hub   *Node // the switch: a bridge with a port for every node
	queue time.Duration
}

// Node is a namespace with an address. Its thread lives in the namespace, and
// everything that has to happen there happens on it.
type Node struct {
	Name string
	Addr netip.Addr

	run    *RunDir
	net    *Network
	ns     netns.NsHandle
	nl     *netlink.Handle
	do     chan func()
	mu     sync.Mutex
	rates  Rates
	owned  []*Process
	closed bool
}

// NewNetwork builds the switch and the nodes. Queue is how long a packet waits
// at most before a shaped link drops it.
func NewNetwork(run *RunDir, specs []NodeSpec, queue time.Duration) (_ *Network, err error) {
	n := &Network{run: run, queue: queue}
	defer func() {
		if err != nil {
			n.Close()
		}
	}()
	if n.hub, err = n.newNode("switch"); err != nil {
		return nil, err
	}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
	if err := n.hub.nl.LinkAdd(bridge); err != nil {
		return nil, fmt.Errorf("making the switch's bridge: %w", err)
	}
	if err := n.hub.nl.LinkSetUp(bridge); err != nil {
		return nil, fmt.Errorf("raising the switch's bridge: %w", err)
	}
	for i, spec := range specs {
		node, err := n.newNode(spec.Name)
		if err != nil {
			return nil, err
		}
		n.Nodes = append(n.Nodes, node)
		node.Addr = netip.AddrFrom4([4]byte{10, 83, 0, byte(i + 1)})
		if err := n.connect(node, bridge); err != nil {
			return nil, fmt.Errorf("connecting node %s: %w", spec.Name, err)
		}
		if err := node.SetRates(spec.Rates); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// Node finds a node by its name.
func (n *Network) Node(name string) (*Node, error) {
	for _, node := range n.Nodes {
		if node.Name == name {
			return node, nil
		}
	}
	return nil, fmt.Errorf("the lab has no node %q", name)
}

// newNode makes a namespace and the thread that lives in it.
func (n *Network) newNode(name string) (*Node, error) {
	node := &Node{Name: name, run: n.run, net: n, do: make(chan func())}
	ready := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		var err error
		node.ns, err = netns.NewNamed(n.run.namespace(name))
		ready <- err
		if err != nil {
			return
		}
		for f := range node.do {
			f()
		}
	}()
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("making network namespace %s: %w (CAP_SYS_ADMIN is needed)", n.run.namespace(name), err)
	}
	var err error
	if node.nl, err = netlink.NewHandleAt(node.ns); err != nil {
		return nil, fmt.Errorf("opening netlink in namespace %s: %w", name, err)
	}
	lo, err := node.nl.LinkByName("lo")
	if err != nil {
		return nil, err
	}
	return node, node.nl.LinkSetUp(lo)
}

// connect lays the cable between a node and the switch.
func (n *Network) connect(node *Node, bridge netlink.Link) error {
	cable := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: node.Name, MasterIndex: bridge.Attrs().Index},
		PeerName:      port,
		PeerNamespace: netlink.NsFd(node.ns),
	}
	if err := n.hub.nl.LinkAdd(cable); err != nil {
		return err
	}
	if err := n.hub.nl.LinkSetUp(cable); err != nil {
		return err
	}
	eth, err := node.nl.LinkByName(port)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(node.Addr.String() + "/24")
	if err != nil {
		return err
	}
	if err := node.nl.AddrAdd(eth, addr); err != nil {
		return err
	}
	if err := node.nl.LinkSetGSOMaxSize(eth, maxSegment); err != nil {
		return fmt.Errorf("bounding the segments: %w", err)
	}
	return node.nl.LinkSetUp(eth)
}

// Do runs a function on the node's thread, inside its network namespace: what
// it starts, dials or listens to belongs to the node.
func (n *Node) Do(f func() error) error {
	done := make(chan error)
	n.do <- func() { done <- f() }
	return <-done
}

func (n *Node) adopt(p *Process) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.owned = append(n.owned, p)
}

// close ends the node's processes and its thread.
func (n *Node) close() {
	n.mu.Lock()
	owned, closed := n.owned, n.closed
	n.owned, n.closed = nil, true
	n.mu.Unlock()
	if closed {
		return
	}
	for _, p := range owned {
		p.Kill()
	}
	close(n.do)
	if n.nl != nil {
		n.nl.Close()
	}
	if n.ns.IsOpen() {
		n.ns.Close()
	}
}

// Close ends all processes on the nodes and removes the namespaces.
func (n *Network) Close() error {
	for _, node := range n.Nodes {
		node.close()
	}
	if n.hub != nil {
		n.hub.close()
	}
	return removeNamespaces(namespacePrefix + n.run.ID + "-")
}

// removeNamespaces unmounts all named namespaces that begin with a prefix.
func removeNamespaces(prefix string) error {
	entries, err := os.ReadDir(namespaceDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			if e := netns.DeleteNamed(e.Name()); e != nil {
				err = errors.Join(err, fmt.Errorf("removing %s: %w", filepath.Join(namespaceDir, prefix), e))
			}
		}
	}
	return err
}
