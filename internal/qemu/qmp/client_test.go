// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestGreetingIsRead(t *testing.T) {
	for _, tc := range []struct {
		greeting string
		want     Version
		oob      bool
		args     string
	}{
		{greeting, Version{10, 0, 2, "Debian"}, true, `{"enable":["oob"]}`},
		{greetingNoOOB, Version{7, 2, 0, ""}, false, `{}`},
		{`{"QMP": {"version": {"qemu": {"major": 99}}, "capabilities": [{"new": 1}, 7, "oob"]}}`, Version{99, 0, 0, ""}, true, `{"enable":["oob"]}`},
	} {
		var args string
		c, err := newClient(t.Context(), pipe(t, func(f *fakeQEMU) {
			f.send(tc.greeting)
			r := f.next()
			args = string(r.Arguments)
			f.reply(r, "{}")
			f.drain()
		}))
		if err != nil {
			t.Fatal(err)
		}
		if c.Version() != tc.want || c.OOB() != tc.oob || args != tc.args {
			t.Errorf("%s: version %+v oob %v negotiated %s", tc.greeting, c.Version(), c.OOB(), args)
		}
		c.Close()
	}
}

func TestBadGreetingIsRefused(t *testing.T) {
	for name, tc := range map[string]struct{ line, says string }{
		"garbage":   {"SSH-2.0-OpenSSH_9.6", "greeting"},
		"event":     {`{"event": "STOP"}`, "expected a greeting"},
		"array":     {`[]`, "greeting"},
		"empty":     {`{}`, "neither greeting"},
		"too long":  {`{"QMP": "` + strings.Repeat("x", MaxLine), "longer than 4194304 bytes"},
		"id string": {`{"return": {}, "id": "libvirt-1"}`, "id"},
	} {
		_, err := newClient(t.Context(), pipe(t, func(f *fakeQEMU) { f.send(tc.line) }))
		if err == nil || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: error %v does not say %q", name, err, tc.says)
		}
	}
	_, err := newClient(t.Context(), pipe(t, func(f *fakeQEMU) { io.WriteString(f.conn, `{"QMP"`) }))
	wantError(t, err, io.ErrUnexpectedEOF, "greeting")
	_, err = newClient(t.Context(), pipe(t, func(f *fakeQEMU) {
		f.send(greeting)
		f.send(fmt.Sprintf(`{"error": {"class": "GenericError", "desc": "no"}, "id": %d}`, f.next().ID))
	}))
	wantError(t, err, nil, "qmp_capabilities", "no (GenericError)")
}

func TestDialNamesTheSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "absent")
	_, err := Dial(t.Context(), path)
	wantError(t, err, nil, path, "no such file")
}

// A monitor with another client attached accepts and says nothing.
func TestSilentMonitorEndsWithTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		_, err := newClient(ctx, pipe(t, func(f *fakeQEMU) { f.drain() }))
		wantError(t, err, context.DeadlineExceeded, "another client")
		if d := time.Since(start); d != time.Second {
			t.Errorf("took %v", d)
		}
	})
}

func TestRepliesAreMatchedByID(t *testing.T) {
	c := connect(t, greeting, func(f *fakeQEMU) {
		a, b := f.next(), f.next()
		f.reply(b, `"`+b.Execute+`"`)
		f.reply(a, `"`+a.Execute+`"`)
		f.drain()
	})
	var wg sync.WaitGroup
	for _, name := range []string{"one", "two"} {
		wg.Go(func() {
			var got string
			if err := c.Execute(t.Context(), name, nil, &got); err != nil || got != name {
				t.Errorf("%s: reply %q, %v", name, got, err)
			}
		})
	}
	wg.Wait()
}

func TestErrorsAreTyped(t *testing.T) {
	c := connect(t, greeting, func(f *fakeQEMU) {
		f.send(fmt.Sprintf(`{"error": {"class": "CommandNotFound", "desc": "what?"}, "id": %d}`, f.next().ID))
		f.reply(f.next(), `{"status": 3}`)
		f.drain()
	})
	err := c.Execute(t.Context(), "frobnicate", nil, nil)
	var refused *Error
	if !errors.As(err, &refused) {
		t.Fatalf("%v is no *Error", err)
	}
	if diff := cmp.Diff(&Error{"CommandNotFound", "what?", "frobnicate"}, refused); diff != "" {
		t.Error(diff)
	}
	_, err = c.QueryStatus(t.Context())
	wantError(t, err, nil, "query-status", `{\"status\": 3}`)
	wantError(t, c.Execute(t.Context(), "x", make(chan int), nil), nil, "x: ", "chan")
	wantError(t, c.Execute(t.Context(), "x", strings.Repeat("y", MaxCommand), nil), nil, "more than 1048576")
	if got := len(c.places); got != 0 {
		t.Errorf("%d places are taken", got)
	}
}

func TestHungCommandIsAbandonedAndItsReplyDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		late := make(chan struct{})
		c := connect(t, greeting, func(f *fakeQEMU) {
			first := f.next()
			<-late
			f.reply(first, `"first"`)
			f.reply(f.next(), `"second"`)
			f.drain()
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		wantError(t, c.Execute(ctx, "first", nil, nil), context.DeadlineExceeded, "first: no reply")
		close(late)
		var got string
		if err := c.Execute(t.Context(), "second", nil, &got); err != nil || got != "second" {
			t.Errorf("reply %q, %v", got, err)
		}
	})
}

func TestContextWithoutDeadlineIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := connect(t, greeting, (*fakeQEMU).drain)
		start := time.Now()
		wantError(t, c.Execute(context.Background(), "query-status", nil, nil), context.DeadlineExceeded)
		if d := time.Since(start); d != DefaultTimeout {
			t.Errorf("took %v", d)
		}
	})
}

func TestOutOfBandPassesAHungQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sent := 0
		free := make(chan struct{})
		c := connect(t, greeting, func(f *fakeQEMU) {
			var hung []request
			for r := f.next(); r.ID != 0; r = f.next() {
				if r.ExecOOB != "" {
					f.reply(r, `"alive"`)
					continue
				}
				sent++
				hung = append(hung, r)
				if sent == maxUnanswered {
					go func() { <-free; f.reply(hung[0], "{}") }()
				}
			}
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var wg sync.WaitGroup
		for range maxUnanswered {
			wg.Go(func() { wantErrorAsync(t, c.Execute(ctx, "hung", nil, nil), "no reply") })
		}
		wg.Wait()
		ctx2, cancel2 := context.WithTimeout(t.Context(), time.Second)
		defer cancel2()
		wantError(t, c.Execute(ctx2, "seventh", nil, nil), context.DeadlineExceeded, "not sent", "6 commands are unanswered")
		var got string
		if err := c.ExecuteOOB(t.Context(), "migrate-recover", nil, &got); err != nil || got != "alive" {
			t.Errorf("out of band: %q, %v", got, err)
		}
		close(free)
		synctest.Wait()
		wantError(t, c.Execute(canceled(t), "eighth", nil, nil), context.Canceled)
		synctest.Wait()
		if sent > maxUnanswered+1 {
			t.Errorf("%d commands reached QEMU", sent)
		}
	})
}

func wantErrorAsync(t *testing.T, err error, words string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), words) {
		t.Errorf("error %v lacks %q", err, words)
	}
}

func TestNoOutOfBandWhereNotOffered(t *testing.T) {
	c := connect(t, greetingNoOOB, (*fakeQEMU).drain)
	wantError(t, c.MigrateRecoverOOB(t.Context(), "unix:/x"), ErrNoOOB, "migrate-recover")
}

func TestUnsentCommandLeavesTheConnectionWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		read := make(chan struct{})
		c := connect(t, greeting, func(f *fakeQEMU) {
			<-read
			f.reply(f.next(), "{}")
			f.drain()
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		wantError(t, c.Execute(ctx, "never", nil, nil), context.DeadlineExceeded, "not sent")
		close(read)
		if err := c.Execute(t.Context(), "stop", nil, nil); err != nil {
			t.Error(err)
		}
	})
}

func TestHalfSentCommandEndsTheConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := connect(t, greeting, func(f *fakeQEMU) {
			io.ReadFull(f.conn, make([]byte, 5))
			time.Sleep(time.Hour)
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		wantError(t, c.Execute(ctx, "torn", nil, nil), ErrClosed, "writing a command")
		<-c.Done()
		wantError(t, c.Execute(t.Context(), "after", nil, nil), ErrClosed, "writing a command")
		time.Sleep(2 * time.Hour)
	})
}

func TestNonsenseEndsTheConnection(t *testing.T) {
	for name, tc := range map[string]struct{ line, says string }{
		"no id":      {`{"error": {"class": "GenericError", "desc": "JSON parse error"}}`, "without an id"},
		"foreign id": {`{"return": {}, "id": 4711}`, "not asked"},
		"greeting":   {greeting, "second greeting"},
		"not JSON":   {`{"return": }`, "invalid character"},
		"long":       {strings.Repeat("[", MaxLine+1), "longer than"},
		"deep":       {strings.Repeat("[", 1<<20), "depth"},
	} {
		t.Run(name, func(t *testing.T) {
			c := connect(t, greeting, func(f *fakeQEMU) {
				f.next()
				f.send(tc.line)
			})
			wantError(t, c.Execute(t.Context(), "query-status", nil, nil), ErrClosed, tc.says)
			wantError(t, c.Stop(t.Context()), ErrClosed, tc.says)
		})
	}
}

func TestCloseEndsCalls(t *testing.T) {
	asked := make(chan struct{})
	c := connect(t, greeting, func(f *fakeQEMU) {
		f.next()
		close(asked)
		f.drain()
	})
	failed := make(chan error)
	go func() { failed <- c.Cont(context.Background()) }()
	<-asked
	c.Close()
	wantError(t, <-failed, ErrClosed, "cont")
	c.Close()
}

func TestLastReplyBeforeTheEndCounts(t *testing.T) {
	for range 50 {
		c := connect(t, greeting, func(f *fakeQEMU) { f.reply(f.next(), `{"status": "shutdown"}`) })
		if s, err := c.QueryStatus(t.Context()); err != nil || s.Status != "shutdown" {
			t.Fatalf("%+v, %v", s, err)
		}
		c.Close()
	}
	c := connect(t, greeting, func(f *fakeQEMU) { f.next() })
	if err := c.Quit(t.Context()); err != nil {
		t.Error(err)
	}
}
