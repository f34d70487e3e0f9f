// SPDX-License-Identifier: Apache-2.0

// Package wiretest makes connected agents for tests of what is built on package wire.
package wiretest

import (
	"context"
	"sync"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/wire"
)

var authority = sync.OnceValues(func() (*wire.CA, error) {
	return wire.NewCA("test authority", time.Hour)
})

// Node returns options with credentials for a node, from an authority that all nodes of
// a test binary share.
func Node(t testing.TB, node wire.Identity) wire.Options {
	t.Helper()
	ca, err := authority()
	if err != nil {
		t.Fatal(err)
	}
	c, err := ca.Issue(node, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return wire.Options{Credentials: c.Static(), Software: "test"}
}

// Listen returns a listener of a node on a free port of the loopback interface. It is
// closed at the end of the test.
func Listen(t testing.TB, o wire.Options) *wire.Listener {
	t.Helper()
	l, err := wire.Listen("127.0.0.1:0", o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// Pair returns both ends of a connection between node from, which dialled, and node to.
// They are closed at the end of the test.
func Pair(t testing.TB, role wire.Role, from, to wire.Identity) (dialled, accepted *wire.Conn) {
	t.Helper()
	return PairOptions(t, role, Node(t, from), Node(t, to), to)
}

// PairOptions is Pair with other options than the default ones.
func PairOptions(t testing.TB, role wire.Role, from, to wire.Options, peer wire.Identity) (dialled, accepted *wire.Conn) {
	t.Helper()
	l := Listen(t, to)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	dialled, err := wire.Dial(ctx, from, l.Addr().String(), peer, role, wire.NewMigrationID())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dialled.Close() })
	if accepted, err = l.Accept(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { accepted.Close() })
	return dialled, accepted
}
