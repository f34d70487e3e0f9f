// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	greeting      = `{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian"}, "capabilities": ["oob"]}}`
	greetingNoOOB = `{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}`
)

// fakeQEMU is the other end of a client's connection, driven line by line.
type fakeQEMU struct {
	conn net.Conn
	r    *bufio.Reader
}

type request struct {
	Execute   string          `json:"execute"`
	ExecOOB   string          `json:"exec-oob"`
	Arguments json.RawMessage `json:"arguments"`
	ID        uint64          `json:"id"`
}

func (f *fakeQEMU) send(line string) error {
	_, err := f.conn.Write([]byte(line + "\r\n"))
	return err
}

// next returns the next command, or an empty one at the end.
func (f *fakeQEMU) next() request {
	line, err := f.r.ReadBytes('\n')
	if err != nil {
		return request{}
	}
	var r request
	if err := json.Unmarshal(line, &r); err != nil {
		panic(fmt.Sprintf("client sent %q: %v", line, err))
	}
	return r
}

func (f *fakeQEMU) reply(r request, value string) error {
	return f.send(fmt.Sprintf(`{"return": %s, "id": %d}`, value, r.ID))
}

// pipe returns a connection whose other end runs script in a goroutine of its own
// and is closed when the script ends. The test waits for the script.
func pipe(t *testing.T, script func(f *fakeQEMU)) net.Conn {
	t.Helper()
	near, far := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer far.Close()
		script(&fakeQEMU{far, bufio.NewReader(far)})
	}()
	t.Cleanup(func() { near.Close(); <-done })
	return near
}

// connect returns a client whose QEMU has greeted and runs script from then on.
func connect(t *testing.T, greeting string, script func(f *fakeQEMU)) *Client {
	t.Helper()
	c, err := newClient(t.Context(), pipe(t, func(f *fakeQEMU) {
		if f.send(greeting) != nil {
			return
		}
		if r := f.next(); r.Execute != "qmp_capabilities" || f.reply(r, "{}") != nil {
			return
		}
		script(f)
	}))
	if err != nil {
		t.Fatalf("connecting: %v", err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// drain reads until the client goes away.
func (f *fakeQEMU) drain() {
	for f.next().ID != 0 {
	}
}

func wantError(t *testing.T, err error, target error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	if target != nil && !errors.Is(err, target) {
		t.Errorf("error %q is no %q", err, target)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q lacks %q", err, w)
		}
	}
}

func canceled(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}
