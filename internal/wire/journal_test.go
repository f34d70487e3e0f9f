// SPDX-License-Identifier: Apache-2.0

package wire_test

import (
	"errors"
	"testing"

	"scattergather.io/scattergather/internal/wire"
	"scattergather.io/scattergather/internal/wire/wiretest"
)

func TestJournal(t *testing.T) {
	j := wire.NewJournal()
	send := func(pages uint64) {
		t.Helper()
		if seq, err := j.Send(&wire.Commit{Pages: pages}); err != nil || seq != pages {
			t.Fatalf("number %d, %v, want %d", seq, err, pages)
		}
	}
	send(1) // without a lane: kept
	a, b := wiretest.Pair(t, wire.SourceToDestination, "node-a", "node-b")
	if err := j.Attach(a.Control(), 0); err != nil {
		t.Fatal(err)
	}
	expect := func(b *wire.Conn, want uint64) {
		t.Helper()
		f := receive(t, b.Control(), wire.TypeCommit)
		if m, err := wire.ParseCommit(f.Body); err != nil || m.Pages != want || f.Seq != want {
			t.Fatalf("number %d, %v, %v, want %d", f.Seq, m, err, want)
		}
	}
	expect(b, 1)
	for n := uint64(2); n <= 5; n++ {
		send(n)
		expect(b, n)
	}
	if frames, bytes := j.Pending(); frames != 5 || bytes != 40 {
		t.Errorf("%d frames of %d bytes pending, want 5 of 40", frames, bytes)
	}
	if err := j.Applied(2); err != nil {
		t.Fatal(err)
	}
	if err := j.Applied(9); !errors.Is(err, wire.ErrProtocol) {
		t.Errorf("applied what was never sent: %v", err)
	}
	b.Close()
	wait(t, closed(a), "the loss of the connection")
	send(6) // fails on the lane, and is kept
	send(7)
	a, b = wiretest.Pair(t, wire.SourceToDestination, "node-a", "node-b")
	if err := j.Attach(a.Control(), 1); !errors.Is(err, wire.ErrProtocol) {
		t.Errorf("a destination that lost state: %v", err)
	}
	if err := j.Attach(a.Control(), 99); !errors.Is(err, wire.ErrProtocol) {
		t.Errorf("a destination that knows the future: %v", err)
	}
	if err := j.Attach(a.Control(), 4); err != nil {
		t.Fatal(err)
	}
	for n := uint64(5); n <= 7; n++ {
		expect(b, n)
	}
	j.Detach()
	send(8)
	if err := j.Attach(a.Control(), 7); err != nil {
		t.Fatal(err)
	}
	expect(b, 8)
	if err := j.Applied(8); err != nil {
		t.Fatal(err)
	}
	if frames, bytes := j.Pending(); frames != 0 || bytes != 0 {
		t.Errorf("%d frames of %d bytes pending, want none", frames, bytes)
	}
	if _, err := j.Send(wire.Dissolve{}); !errors.Is(err, wire.ErrProtocol) {
		t.Errorf("journalled what no source sends: %v", err)
	}
	if _, err := j.Send(wire.Records{}); err == nil {
		t.Error("journalled a message beyond a limit")
	}
}

// closed reads the control lane until the connection is closed.
func closed(c *wire.Conn) <-chan struct{} {
	go c.Control().Receive(new(wire.Frame))
	return c.Done()
}
