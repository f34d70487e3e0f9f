// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Bounds of a token bucket. The burst has to hold what a timer tick lets
// through, and little more, or a slow link would send faster than its rate for a
// noticeable time.
const (
	minBurst = 16 << 10
	maxBurst = 256 << 10
	minQueue = 128 << 10
)

// Rates are the node's rates now.
func (n *Node) Rates() Rates {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.rates
}

// SetRates changes the speed of the node's link, also while traffic flows. Both
// directions are shaped where a real network shapes them: the way up at the
// node, the way down at the switch's port.
func (n *Node) SetRates(r Rates) error {
	if err := shape(n.nl, port, r.Up, n.net.queue); err != nil {
		return fmt.Errorf("shaping the link from %s to %d bit/s: %w", n.Name, r.Up, err)
	}
	if err := shape(n.net.hub.nl, n.Name, r.Down, n.net.queue); err != nil {
		return fmt.Errorf("shaping the link to %s to %d bit/s: %w", n.Name, r.Down, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.rates = r
	return nil
}

// shape puts a token bucket filter (tc-tbf(8)) on what leaves an interface.
func shape(nl *netlink.Handle, name string, bits int64, queue time.Duration) error {
	link, err := nl.LinkByName(name)
	if err != nil {
		return err
	}
	attrs := netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}
	if bits <= 0 {
		err := nl.QdiscDel(&netlink.Tbf{QdiscAttrs: attrs})
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
			return nil // it was not shaped
		}
		return err
	}
	bytes := uint64(bits) / 8
	burst := uint32(min(max(bytes/1000, minBurst), maxBurst))
	limit := max(uint32(float64(bytes)*queue.Seconds()), minQueue)
	return nl.QdiscReplace(&netlink.Tbf{
		QdiscAttrs: attrs,
		Rate:       bytes,
		Limit:      limit + burst,
		Buffer:     netlink.Xmittime(bytes, burst),
	})
}

// Traffic is what a node's link has carried since it was made, in bytes on the
// wire.
type Traffic struct {
	Out, In uint64
}

// Traffic reads the node's counters.
func (n *Node) Traffic() (Traffic, error) {
	link, err := n.nl.LinkByName(port)
	if err != nil {
		return Traffic{}, fmt.Errorf("reading the counters of %s: %w", n.Name, err)
	}
	s := link.Attrs().Statistics
	return Traffic{Out: s.TxBytes, In: s.RxBytes}, nil
}

// Sample is the traffic of all nodes at one moment, in the order of
// Network.Nodes.
type Sample struct {
	At    time.Time
	Nodes []Traffic
}

// Sample reads the counters of all nodes.
func (n *Network) Sample() (Sample, error) {
	s := Sample{At: time.Now(), Nodes: make([]Traffic, len(n.Nodes))}
	for i, node := range n.Nodes {
		var err error
		if s.Nodes[i], err = node.Traffic(); err != nil {
			return Sample{}, err
		}
	}
	return s, nil
}
