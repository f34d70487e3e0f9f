// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestEventsAreDelivered(t *testing.T) {
	c := connect(t, greeting, func(f *fakeQEMU) {
		f.next()
		f.send(`{"timestamp": {"seconds": 1700000000, "microseconds": 250000}, "event": "MIGRATION", "data": {"status": "setup"}}`)
		f.send(`{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "STOP"}`)
	})
	s := c.Subscribe(8)
	c.Stop(t.Context())
	var got []Event
	for e := range s.Events() {
		got = append(got, e)
	}
	want := []Event{
		{"MIGRATION", json.RawMessage(`{"status": "setup"}`), time.Unix(1700000000, 250000000)},
		{Name: "STOP"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if _, open := <-c.Subscribe(1).Events(); open {
		t.Error("a subscription of an ended client is open")
	}
	s.Close()
}

func TestSlowSubscriberLosesTheOldest(t *testing.T) {
	const sent, room = 100, 10
	c := connect(t, greeting, func(f *fakeQEMU) {
		r := f.next()
		for i := range sent {
			f.send(fmt.Sprintf(`{"event": "E%d"}`, i))
		}
		f.reply(r, "{}")
		f.drain()
	})
	slow, closed := c.Subscribe(room), c.Subscribe(room)
	closed.Close()
	closed.Close()
	if err := c.Cont(t.Context()); err != nil { // answered although nobody receives
		t.Fatal(err)
	}
	if slow.Dropped() != sent-room || closed.Dropped() != 0 {
		t.Errorf("dropped %d and %d", slow.Dropped(), closed.Dropped())
	}
	for i := sent - room; i < sent; i++ {
		if e := <-slow.Events(); e.Name != fmt.Sprintf("E%d", i) {
			t.Errorf("event %d is %s", i, e.Name)
		}
	}
}
