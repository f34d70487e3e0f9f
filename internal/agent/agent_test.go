// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"

	"scattergather.io/scattergather/internal/wire"
)

// serveAgent runs an agent whose state lies on tmpfs and returns its client.
func serveAgent(t *testing.T, state string) (*Client, string) {
	t.Helper()
	ca, err := wire.NewCA("test", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	creds, err := ca.Issue("node-a", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	a, err := New(Config{
		Node: "node-a", Listen: "127.0.0.1:0", StateDir: state,
		Wire: wire.Options{Credentials: creds.Static(), Log: logr.Discard()}, PoolBytes: 64 << 20, PoolReserveBytes: 1 << 20,
		Log: logr.Discard(),
	})
	if err != nil {
		t.Fatal(err)
	}
	control := filepath.Join(t.TempDir(), "c.sock")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	go func() { ended <- a.Run(ctx) }()
	go func() { ended <- a.ServeControl(ctx, control) }()
	t.Cleanup(func() {
		cancel()
		for range 2 {
			if err := <-ended; err != nil {
				t.Errorf("the agent ended with %v", err)
			}
		}
	})
	client := NewClient(control)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if err = client.Healthy(ctx); err == nil {
			return client, control
		}
		if time.Now().After(deadline) {
			t.Fatalf("the agent does not serve: %v", err)
		}
	}
}

// tmpfsDir is a folder where the pool may lie.
func tmpfsDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "sg-agent-test-") //nolint:usetesting // t.TempDir is on a disk
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

const someID = "3f0a8a52-7d38-4a8e-9a51-6c1f2f9b4a77"

func someSource() Spec {
	return Spec{
		ID: someID, Role: RoleSource, QMP: "/nowhere/qmp", Stream: "/nowhere/stream",
		Destination: Peer{Name: "node-b", Address: "127.0.0.1:1"},
	}
}

func TestSpecsAreRefusedByName(t *testing.T) {
	cases := map[string]struct {
		change func(*Spec)
		want   string
	}{
		"no id":                {func(s *Spec) { s.ID = "" }, "id"},
		"relative monitor":     {func(s *Spec) { s.QMP = "qmp.sock" }, "qmp"},
		"long stream":          {func(s *Spec) { s.Stream = "/" + strings.Repeat("x", 200) }, "stream"},
		"no role":              {func(s *Spec) { s.Role = "" }, "role"},
		"unknown strategy":     {func(s *Spec) { s.Strategy = "quick" }, "strategy"},
		"no destination":       {func(s *Spec) { s.Destination = Peer{} }, "destination"},
		"no address":           {func(s *Spec) { s.Destination.Address = "" }, "address"},
		"intermediary no size": {func(s *Spec) { s.Intermediaries = []Peer{{Name: "c", Address: "h:1"}} }, "bytes"},
		"intermediary twice": {func(s *Spec) {
			p := Peer{Name: "c", Address: "h:1", Bytes: 1}
			s.Intermediaries = []Peer{p, p}
		}, "twice"},
		"destination lends": {func(s *Spec) {
			s.Intermediaries = []Peer{{Name: "node-b", Address: "h:1", Bytes: 1}}
		}, "twice"},
		"too many": {func(s *Spec) { s.Intermediaries = make([]Peer, MaxIntermediaries+1) }, "more than"},
	}
	for name, c := range cases {
		s := someSource()
		c.change(&s)
		if err := s.Validate(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want an error that names %q", name, err, c.want)
		}
	}
	if s := someSource(); s.Validate() != nil {
		t.Errorf("a good source is refused: %v", s.Validate())
	}
}

func TestControlSaysWhatIsWrong(t *testing.T) {
	client, control := serveAgent(t, tmpfsDir(t))
	_, err := client.Start(t.Context(), someSource())
	if err == nil || !strings.Contains(err.Error(), "/nowhere/qmp") {
		t.Errorf("a start without a QEMU: got %v, want an error that names its monitor", err)
	}
	// What failed to start is forgotten: it may be tried again.
	if _, err := client.Get(t.Context(), someID); err == nil || !strings.Contains(err.Error(), "no migration") {
		t.Errorf("a migration that never began: got %v", err)
	}
	if err := client.Cancel(t.Context(), someID); err == nil || !strings.Contains(err.Error(), "no migration") {
		t.Errorf("cancelling a migration that never began: got %v", err)
	}
	if _, err := client.Watch(t.Context(), someID, nil); err == nil || !strings.Contains(err.Error(), "no migration") {
		t.Errorf("watching a migration that never began: got %v", err)
	}
	st, err := client.Node(t.Context())
	if err != nil || st.Node != "node-a" || st.Pool.Budget != 64<<20 || len(st.Migrations) != 0 {
		t.Errorf("status %+v, %v", st, err)
	}
	if info, err := os.Stat(control); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the control socket is open to others: %v, %v", info, err)
	}
}

func TestControlRefusesWhatItCannotRead(t *testing.T) {
	_, control := serveAgent(t, tmpfsDir(t))
	post := func(body string) (int, string) {
		t.Helper()
		c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", control)
			}}}
		resp, err := c.Post("http://agent/v1/migrations", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(text)
	}
	if code, text := post("{"); code != http.StatusBadRequest {
		t.Errorf("half an object: %d %s", code, text)
	}
	if code, text := post(`{"id":"` + someID + `","stratgy":"hybrid"}`); code != http.StatusBadRequest || !strings.Contains(text, "stratgy") {
		t.Errorf("a misspelt field: %d %s, want it named", code, text)
	}
	if code, text := post(`{"id":"` + strings.Repeat("x", maxRequest) + `"}`); code != http.StatusBadRequest {
		t.Errorf("a huge request: %d %.80s", code, text)
	}
	if code, text := post(`{"id":"x"}`); code != http.StatusUnprocessableEntity {
		t.Errorf("a spec that makes no sense: %d %s", code, text)
	}
}

func TestAServedControlSocketIsNotTaken(t *testing.T) {
	_, control := serveAgent(t, tmpfsDir(t))
	var second Agent
	if err := second.ServeControl(t.Context(), control); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("a second agent took the first one's socket: %v", err)
	}
}

// A request that an earlier process left and that cannot be taken up must not keep
// the agent from serving.
func TestABrokenRequestOfAnEarlierProcessIsPassedOver(t *testing.T) {
	state := tmpfsDir(t)
	if err := os.MkdirAll(gatherDir(state), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"nonsense": "{", someID: "{", "7b1f1c8e-0000-4000-8000-000000000001": "{}"} {
		if err := os.WriteFile(filepath.Join(gatherDir(state), name+specSuffix), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	client, _ := serveAgent(t, state)
	if st, err := client.Node(t.Context()); err != nil || len(st.Migrations) != 0 {
		t.Errorf("status %+v, %v", st, err)
	}
}

func FuzzSpec(f *testing.F) {
	seed, err := json.Marshal(someSource())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte(`{"parameters":{"multifd-channels":1e300},"capabilities":{"multifd":true}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var s Spec
		if decodeStrict(data, &s) != nil {
			return
		}
		if n := s.multifdChannels(); n < 0 || n > 255 {
			t.Errorf("%d multifd channels", n)
		}
		if s.Validate() == nil && len(s.Intermediaries) > MaxIntermediaries {
			t.Error("too many intermediaries pass")
		}
	})
}
