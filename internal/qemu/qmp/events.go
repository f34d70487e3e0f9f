// SPDX-License-Identifier: Apache-2.0

package qmp

import "sync/atomic"

// Subscription receives the events of one client. A slow receiver loses the
// oldest events and never holds up replies.
type Subscription struct {
	client  *Client
	events  chan Event
	dropped atomic.Uint64
}

// Subscribe returns the events that arrive from now on, the newest buffer (at
// least one) of which wait for the receiver. Subscribe before sending the command
// whose events matter.
func (c *Client) Subscribe(buffer int) *Subscription {
	s := &Subscription{client: c, events: make(chan Event, max(buffer, 1))}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.subs == nil {
		close(s.events)
		return s
	}
	c.subs[s] = struct{}{}
	return s
}

// Events is the channel to receive from. It is closed by [Subscription.Close] and
// when the client ends.
func (s *Subscription) Events() <-chan Event { return s.events }

// Dropped counts the events lost because the receiver was slow.
func (s *Subscription) Dropped() uint64 { return s.dropped.Load() }

// Close ends the subscription. It may be called more than once.
func (s *Subscription) Close() {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	if _, ok := s.client.subs[s]; ok {
		delete(s.client.subs, s)
		close(s.events)
	}
}

// publish hands e to every subscription. Channels are sent to and closed under
// the lock only, and sending never blocks, so the lock is held for moments.
func (c *Client) publish(e Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.subs {
		s.offer(e)
	}
}

// offer makes room by dropping the oldest. The publisher is the only sender, so
// that after dropping one there is room, whatever the receiver does meanwhile.
func (s *Subscription) offer(e Event) {
	select {
	case s.events <- e:
		return
	default:
	}
	select {
	case <-s.events:
		s.dropped.Add(1)
	default: // the receiver has just made room
	}
	s.events <- e
}

func (c *Client) closeSubscriptions() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.subs {
		close(s.events)
	}
	c.subs = nil
}
