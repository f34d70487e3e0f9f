// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
	"scattergather.io/scattergather/internal/wire"
)

var small = pages.Block{Name: "ram", Length: 1 * mib, PageSize: pages.Size}

// gone checks that nothing is left behind.
func (b *bed) gone() {
	b.t.Helper()
	if _, err := os.Stat(b.dir); !errors.Is(err, os.ErrNotExist) {
		b.t.Errorf("the state was not removed: %v", err)
	}
	for {
		b.q.mu.Lock()
		open := b.q.accepted > 0 && !b.q.broken
		b.q.mu.Unlock()
		if !open {
			return
		}
		time.Sleep(time.Millisecond) // QEMU's end of the connection is closing
	}
}

// told waits for an Error with a code, and checks that its text names something.
func (b *bed) told(code wire.Code, part string) {
	b.t.Helper()
	f := b.expectError()
	err := peerError(f.Body)
	var e *wire.Error
	if !errors.As(err, &e) || e.Code != code || !strings.Contains(e.Text, part) {
		b.t.Fatalf("the source was told %v, want %v with %q", err, code, part)
	}
}

func (b *bed) expectError() wire.Frame {
	b.t.Helper()
	for {
		select {
		case f := <-b.events:
			if f.Type == wire.TypeError {
				return f
			}
		case <-time.After(10 * time.Second):
			b.t.Fatal("no Error")
		}
	}
}

func TestQEMURefusesTheVM(t *testing.T) {
	b := newBed(t, 1, small)
	b.q.refuseSetup = true
	b.cfg.Explain = func(err error) error { return errors.Join(err, errors.New("QEMU's own words")) }
	b.start()
	b.dial()
	b.describe()
	b.told(wire.CodeIncompatible, "QEMU's own words")
	b.fail(ErrRefused)
	b.gone()
	if n := b.holders[0].attached; n != 0 {
		t.Error("an intermediary was attached, so that the source cannot dissolve it")
	}
}

func TestQEMURefusesTheDeviceState(t *testing.T) {
	b := newBed(t, 0, small)
	b.q.refusePackage = true
	b.start()
	b.dial()
	b.describe()
	b.expect(wire.TypeReady)
	b.handOver()
	b.told(wire.CodeIncompatible, "loading the device state")
	b.fail(ErrRefused)
	b.gone()
}

func TestNoQEMU(t *testing.T) {
	b := newBed(t, 0, small)
	b.cfg.Connect = func(context.Context) (net.Conn, error) { return nil, errors.New("nobody listens") }
	b.start()
	b.dial()
	b.describe()
	b.told(wire.CodeIncompatible, "nobody listens")
	b.fail(ErrRefused)
	b.gone()
}

func TestSilentQEMU(t *testing.T) {
	b := newBed(t, 0, small)
	c, s := net.Pipe()
	defer s.Close()
	go func() { _, _ = s.Read(make([]byte, 1<<20)) }()
	b.cfg.Connect = func(context.Context) (net.Conn, error) { return c, nil }
	b.cfg.OpenTimeout = 100 * time.Millisecond
	b.start()
	b.dial()
	b.describe()
	b.told(wire.CodeIncompatible, "within 100ms")
	b.fail(ErrRefused)
	b.gone()
}

func TestSourceAborts(t *testing.T) {
	b := newBed(t, 0, small)
	b.start()
	b.dial()
	b.describe()
	b.expect(wire.TypeReady)
	b.direct(b.conn.Bulk(0), 0, 1, 2, 3)
	b.send(&wire.Abort{Reason: "changed its mind"})
	b.fail(ErrAborted)
	if !strings.Contains(b.err.Error(), "changed its mind") {
		t.Errorf("ended with %v", b.err)
	}
	b.gone()
}

func TestSourceStaysAway(t *testing.T) {
	b := newBed(t, 0, small)
	b.cfg.SourceGrace = 50 * time.Millisecond
	b.start()
	b.dial()
	b.describe()
	b.expect(wire.TypeReady)
	b.conn.Close()
	<-b.done
	if b.err == nil || !strings.Contains(b.err.Error(), "away") {
		t.Errorf("ended with %v", b.err)
	}
	b.gone()
}

func TestCancelledBeforeTheSwitch(t *testing.T) {
	b := newBed(t, 0, small)
	b.start()
	b.dial()
	b.describe()
	b.expect(wire.TypeReady)
	b.cancel()
	b.told(wire.CodeStopping, "cancel")
	b.fail(context.Canceled)
	b.gone()
}

// TestNonsense sends what no honest source sends before the switch. Each ends the
// gather and tells the source why.
func TestNonsense(t *testing.T) {
	total := uint64(len(fakePackage))
	cases := map[string]struct {
		early bool
		send  func(b *bed)
		part  string
	}{
		"records before the description": {true, func(b *bed) { b.zeros(0, 1) }, "before the VM was described"},
		"record past the end":            {false, func(b *bed) { b.zeros(0, 256) }, "256"},
		"record of no intermediary":      {false, func(b *bed) { b.records(wire.Records{{First: 1, Count: 1, Holder: 9}}) }, "intermediary 5"},
		"holders with a gap": {false, func(b *bed) {
			b.send(&wire.Holders{First: 3, Holders: []wire.Holder{{Name: "x", Addr: "a:1", Identity: "x"}}})
		}, "place 3"},
		"package with a gap": {false, func(b *bed) { b.send(&wire.Package{Total: total, Offset: 3, Data: fakePackage[3:]}) }, "at 3"},
		"package too large":  {false, func(b *bed) { b.send(&wire.Package{Total: 1 << 31, Data: fakePackage}) }, "2147483648"},
		"package of changing size": {false, func(b *bed) {
			b.send(&wire.Package{Total: total, Data: fakePackage[:4]})
			b.send(&wire.Package{Total: total - 1, Offset: 4, Data: fakePackage[4:5]})
		}, "is said to have"},
		"package that is none": {false, func(b *bed) { b.send(&wire.Package{Total: 4, Data: []byte("none")}) }, "LISTEN"},
		"package without PING": {false, func(b *bed) {
			p := append(append([]byte(nil), fakePackage[:5]...), fakePackage[len(fakePackage)-5:]...)
			b.send(&wire.Package{Total: uint64(len(p)), Data: p})
		}, "no PING"},
		"described twice": {false, func(b *bed) { b.describe() }, "twice"},
		"page that does not open": {false, func(b *bed) {
			b.sealer = wire.NewSealer(wire.NewKey())
			b.batch(b.conn.Bulk(0), 0, seq(0, 1))
		}, "does not open"},
		"page past the end": {false, func(b *bed) { b.batch(b.conn.Bulk(0), 0, seq(256, 257)) }, "256"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t, 0, small)
			b.start()
			b.dial()
			if !c.early {
				b.describe()
				b.expect(wire.TypeReady)
			}
			c.send(b)
			f := b.expectError()
			if err := peerError(f.Body); !strings.Contains(err.Error(), c.part) {
				t.Errorf("the source was told %q, want %q", err, c.part)
			}
			<-b.done
			if b.err == nil || !strings.Contains(b.err.Error(), c.part) {
				t.Errorf("ended with %v, want %q", b.err, c.part)
			}
			b.gone()
		})
	}
}

// TestCommitMismatch lets the source claim pages that the destination does not know of.
func TestCommitMismatch(t *testing.T) {
	b := newBed(t, 0, small)
	b.open()
	b.direct(b.conn.Bulk(0), 0, seq(0, 100)...)
	b.send(&wire.Commit{Pages: 101})
	b.told(wire.CodeIncomplete, "committed 101 pages and the map has 100 of 256")
	b.zeros(0, 100)
	b.commit()
	b.finish()
}

// TestCommitBeforeLoaded must not be granted: QEMU may still refuse the device state.
func TestCommitBeforeLoaded(t *testing.T) {
	b := newBed(t, 0, small)
	b.start()
	b.dial()
	b.describe()
	b.expect(wire.TypeReady)
	b.direct(b.conn.Bulk(0), 0, seq(0, 10)...)
	b.send(&wire.Commit{Pages: 10})
	b.told(wire.CodeIncomplete, "has not loaded")
	b.handOver()
	b.expect(wire.TypeLoaded)
	b.commit()
	b.finish()
}

// TestStaleAfterTheSwitch announces a newer version of a page that the guest has. That
// cannot be mended: it is said, and nothing is committed.
func TestStaleAfterTheSwitch(t *testing.T) {
	b := newBed(t, 0, small)
	b.open()
	b.direct(b.conn.Bulk(0), 0, seq(0, 10)...)
	b.q.awaitPlaced(10)
	b.records(wire.Records{{First: 3, Count: 1, Holder: pages.Absent, Version: 1}})
	b.told(wire.CodeProtocol, "page 3")
	if s := b.engine.Progress().Stalled; !strings.Contains(s, "page 3") {
		t.Errorf("stalled: %q", s)
	}
	b.cancel()
	<-b.done
}

func TestAttachRefusesStrangers(t *testing.T) {
	b := newBed(t, 0, small)
	b.start()
	b.dial()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for name, c := range map[string]struct {
		options wire.Options
		role    wire.Role
		id      wire.MigrationID
	}{
		"another node":      {b.cfg.Wire, wire.SourceToDestination, b.id},
		"another role":      {b.source, wire.DestinationToIntermediary, b.id},
		"another migration": {b.source, wire.SourceToDestination, wire.NewMigrationID()},
	} {
		d, err := wire.Dial(ctx, c.options, b.ln.Addr().String(), "destination", c.role, c.id)
		if err != nil {
			t.Fatal(err)
		}
		a, err := b.ln.Accept(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.engine.Attach(a); err == nil {
			t.Errorf("%s was attached", name)
		}
		a.Close()
		d.Close()
	}
}

func TestReopenRefuses(t *testing.T) {
	b := newBed(t, 0, small)
	if _, err := Reopen(b.cfg); !errors.Is(err, ErrNotResumable) {
		t.Errorf("nothing to reopen: %v", err)
	}
	l, err := pages.NewLayout(b.blocks)
	if err != nil {
		t.Fatal(err)
	}
	leave := func(change func(m *meta)) {
		t.Helper()
		st, err := newState(b.dir)
		if err != nil {
			t.Fatal(err)
		}
		m := meta{Migration: b.id.String(), Source: "source", Stage: stageDelivering, Setup: &wire.Setup{Blocks: b.blocks}}
		change(&m)
		if err := errors.Join(st.begin(m, l), st.close()); err != nil {
			t.Fatal(err)
		}
	}
	for name, change := range map[string]func(m *meta){
		"not delivered":     func(m *meta) { m.Stage = stageOpening },
		"another migration": func(m *meta) { m.Migration = wire.NewMigrationID().String() },
		"impossible blocks": func(m *meta) { m.Setup = &wire.Setup{} },
	} {
		leave(change)
		if _, err := Reopen(b.cfg); !errors.Is(err, ErrNotResumable) {
			t.Errorf("%s: %v", name, err)
		}
		b.gone()
	}
	leave(func(*meta) {})
	if _, err := New(b.cfg); err == nil || !strings.Contains(err.Error(), "exists") {
		t.Errorf("New over an earlier gather: %v", err)
	}
	if err := os.WriteFile(filepath.Join(b.dir, metaFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Reopen(b.cfg); !errors.Is(err, ErrNotResumable) {
		t.Errorf("broken state: %v", err)
	}
}

// TestUncertainDelivery ends the process while the device state is being delivered. The
// next one finds out from QEMU whether it was.
func TestUncertainDelivery(t *testing.T) {
	for _, loaded := range []bool{true, false} {
		b := newBed(t, 0, small)
		b.cfg.OpenTimeout = 300 * time.Millisecond
		b.open()
		b.direct(b.conn.Bulk(0), 0, seq(0, 10)...)
		b.interrupt()
		st, _, err := openState(b.dir, b.id)
		if err != nil {
			t.Fatal(err)
		}
		st.meta.Stage = stageDelivering
		if err := errors.Join(st.save(), st.close()); err != nil {
			t.Fatal(err)
		}
		if !loaded {
			b.cfg.Recover = func(context.Context) (net.Conn, error) { return nil, errors.New("QEMU has gone") }
		}
		b.reopen()
		if !loaded {
			b.fail(ErrNotResumable)
			b.gone()
			continue
		}
		b.dial()
		b.expect(wire.TypeLoaded)
		b.commit()
		b.finish()
	}
}

// TestHostileReturnPath checks that a QEMU that says what it must not ends its stream
// and no more.
func TestHostileReturnPath(t *testing.T) {
	b := newBed(t, 0, small)
	b.open()
	b.q.mu.Lock()
	b.q.say(qemu.AppendReqPagesID(nil, "no such block", 0, 4096))
	b.q.mu.Unlock()
	b.direct(b.conn.Bulk(0), 0, seq(0, 256)...)
	b.commit()
	b.finish()
	if b.res.Recoveries != 1 {
		t.Errorf("%d recoveries", b.res.Recoveries)
	}
}
