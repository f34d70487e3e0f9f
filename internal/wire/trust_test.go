// SPDX-License-Identifier: Apache-2.0

package wire_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr/funcr"

	"scattergather.io/scattergather/internal/wire"
	"scattergather.io/scattergather/internal/wire/wiretest"
)

// logged collects what a listener logs.
type logged chan string

func (l logged) into(o *wire.Options) {
	o.Log = funcr.New(func(_, args string) {
		select {
		case l <- args:
		default:
		}
	}, funcr.Options{})
}

// expect waits for a log line that holds all words.
func (l logged) expect(t *testing.T, words ...string) {
	t.Helper()
	limit := time.After(5 * time.Second)
	for {
		select {
		case line := <-l:
			ok := true
			for _, w := range words {
				ok = ok && strings.Contains(line, w)
			}
			if ok {
				return
			}
			t.Logf("logged: %s", line)
		case <-limit:
			t.Fatalf("nothing logged with %q", words)
		}
	}
}

func issue(t *testing.T, ca *wire.CA, node wire.Identity, ttl time.Duration) *wire.Credentials {
	t.Helper()
	c, err := ca.Issue(node, ttl)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func newCA(t *testing.T, name string) *wire.CA {
	t.Helper()
	ca, err := wire.NewCA(name, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// TestWhoIsTrusted tries every wrong certificate on both sides.
func TestWhoIsTrusted(t *testing.T) {
	ours, theirs := newCA(t, "our authority"), newCA(t, "their authority")
	good := issue(t, ours, "node-b", time.Hour)
	expired := issue(t, ours, "node-b", -time.Minute)
	foreign := issue(t, theirs, "node-b", time.Hour)
	foreign.Roots = good.Roots // it would talk to us
	for _, c := range []struct {
		name              string
		dialler           *wire.Credentials
		listener          *wire.Credentials
		peer              wire.Identity
		dialled, inTheLog []string
	}{
		{"good", good, good, "node-b", nil, nil},
		{"wrong peer", good, good, "node-c", []string{"node-b", "node-c"}, nil},
		{"listener of another authority", good, foreign, "node-b", []string{"their authority", "not among the trusted"}, nil},
		{"listener expired", good, expired, "node-b", []string{"is valid from", "node-b"}, nil},
		{"dialler of another authority", foreign, good, "node-b", []string{"does not accept our certificate", "their authority"},
			[]string{"their authority", "not among the trusted"}},
		{"dialler expired", expired, good, "node-b", []string{"does not accept our certificate", "valid until"}, []string{"is valid from"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			log := make(logged, 16)
			o := wire.Options{Credentials: c.listener.Static()}
			log.into(&o)
			l := wiretest.Listen(t, o)
			conn, err := wire.Dial(t.Context(), wire.Options{Credentials: c.dialler.Static()}, l.Addr().String(),
				c.peer, wire.SourceToDestination, wire.NewMigrationID())
			if len(c.dialled) == 0 {
				if err != nil {
					t.Fatal(err)
				}
				conn.Close()
				return
			}
			if !errors.Is(err, wire.ErrPeer) {
				t.Fatalf("Dial returned %v, want ErrPeer", err)
			}
			for _, w := range c.dialled {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("Dial returned %q, which does not say %q", err, w)
				}
			}
			if c.inTheLog != nil {
				log.expect(t, c.inTheLog...)
			}
		})
	}
}

// TestNoClientCertificate and other TLS clients that are not agents.
func TestNoClientCertificate(t *testing.T) {
	ca := newCA(t, "authority")
	good := issue(t, ca, "node-a", time.Hour)
	authorityItself := issue(t, ca, "node-a", time.Hour)
	authorityItself.Certificate = certificateWithoutURI(t, ca)
	for _, c := range []struct {
		name   string
		config *tls.Config
		logged []string
	}{
		{"none", &tls.Config{NextProtos: []string{"scattergather"}}, []string{"didn't provide a certificate"}},
		{"other protocol", &tls.Config{Certificates: []tls.Certificate{good.Certificate}, NextProtos: []string{"h2"}}, []string{"h2"}},
		{"no protocol", &tls.Config{Certificates: []tls.Certificate{good.Certificate}}, []string{"does not speak"}},
		{"old TLS", &tls.Config{Certificates: []tls.Certificate{good.Certificate}, MaxVersion: tls.VersionTLS12}, []string{"versions"}},
		{"no node", &tls.Config{Certificates: []tls.Certificate{authorityItself.Certificate}, NextProtos: []string{"scattergather"}}, []string{"peer not trusted"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			log := make(logged, 16)
			o := wire.Options{Credentials: issue(t, ca, "node-b", time.Hour).Static()}
			log.into(&o)
			l := wiretest.Listen(t, o)
			c.config.InsecureSkipVerify = true
			conn, err := tls.Dial("tcp", l.Addr().String(), c.config)
			if err == nil {
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(5 * time.Second))
				if _, err = conn.Read(make([]byte, 1)); err == nil {
					t.Error("the listener answered")
				}
			}
			log.expect(t, c.logged...)
		})
	}
}

// certificateWithoutURI returns the authority's own certificate, which is trusted, but
// names no node.
func certificateWithoutURI(t *testing.T, ca *wire.CA) tls.Certificate {
	t.Helper()
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")
	if err := ca.WriteFiles(cert, key); err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

func TestCredentialFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	name := func(s string) string { return filepath.Join(dir, s) }
	first := newCA(t, "first")
	if err := first.WriteFiles(name("ca.crt"), name("ca.key")); err != nil {
		t.Fatal(err)
	}
	again, err := wire.LoadCA(name("ca.crt"), name("ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := issue(t, again, "node-a", time.Hour).WriteFiles(name("a.crt"), name("a.key")); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"ca.key", "a.key"} {
		if info, err := os.Stat(name(key)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", key, info.Mode(), err)
		}
	}
	get, err := wire.FileCredentials(name("a.crt"), name("a.key"), name("ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	who := func() wire.Identity {
		t.Helper()
		c, err := get()
		if err != nil {
			t.Fatal(err)
		}
		id, err := c.Identity()
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	if id := who(); id != "node-a" {
		t.Fatalf("identity %s", id)
	}
	// Half an update must not be used, nor lose what there was.
	if err := os.WriteFile(name("a.crt"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond)
	if id := who(); id != "node-a" {
		t.Errorf("identity %s after a broken update", id)
	}
	if err := issue(t, again, "node-a2", time.Hour).WriteFiles(name("a.crt"), name("a.key")); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond)
	if id := who(); id != "node-a2" {
		t.Errorf("identity %s after an update", id)
	}
}

func TestBrokenFiles(t *testing.T) {
	dir := t.TempDir()
	name := func(s string) string { return filepath.Join(dir, s) }
	ca := newCA(t, "ca")
	if err := errors.Join(ca.WriteFiles(name("ca.crt"), name("ca.key")),
		issue(t, ca, "node-a", time.Hour).WriteFiles(name("a.crt"), name("a.key")),
		os.WriteFile(name("empty"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, f := range [][3]string{
		{"none", "a.key", "ca.crt"}, {"a.crt", "none", "ca.crt"}, {"a.crt", "a.key", "none"},
		{"a.crt", "ca.key", "ca.crt"}, {"a.crt", "a.key", "empty"}, {"ca.crt", "ca.key", "ca.crt"},
	} {
		if _, err := wire.FileCredentials(name(f[0]), name(f[1]), name(f[2])); err == nil || !strings.Contains(err.Error(), "loading") {
			t.Errorf("%v: %v", f, err)
		}
	}
	if _, err := wire.LoadCA(name("a.crt"), name("a.key")); err == nil {
		t.Error("a node certificate was taken for an authority")
	}
	for _, id := range []wire.Identity{"", "Node", "a/b", "a b", wire.Identity(strings.Repeat("a", 254))} {
		if _, err := ca.Issue(id, time.Hour); err == nil {
			t.Errorf("issued for node %q", id)
		}
	}
	if c := issue(t, ca, wire.Identity(strings.Repeat("a", 253)), time.Hour); c == nil {
		t.Error("not issued for a long name")
	}
}

// TestReload has the listener's authority and certificate change between two dials.
func TestReload(t *testing.T) {
	one, two := newCA(t, "one"), newCA(t, "two")
	current := make(chan *wire.Credentials, 1)
	current <- issue(t, one, "node-b", time.Hour)
	o := wire.Options{Credentials: func() (*wire.Credentials, error) {
		c := <-current
		current <- c
		return c, nil
	}}
	l := wiretest.Listen(t, o)
	dial := func(ca *wire.CA) error {
		c, err := wire.Dial(t.Context(), wire.Options{Credentials: issue(t, ca, "node-a", time.Hour).Static()},
			l.Addr().String(), "node-b", wire.SourceToIntermediary, wire.NewMigrationID())
		if err == nil {
			t.Cleanup(func() { c.Close() })
		}
		return err
	}
	if err := dial(one); err != nil {
		t.Fatal(err)
	}
	<-current
	current <- issue(t, two, "node-b", time.Hour)
	if err := dial(two); err != nil {
		t.Error(err)
	}
	if err := dial(one); !errors.Is(err, wire.ErrPeer) {
		t.Errorf("the old authority: %v, want ErrPeer", err)
	}
}

func TestBadOptions(t *testing.T) {
	good := wiretest.Node(t, "node-a")
	for name, change := range map[string]func(*wire.Options){
		"credentials": func(o *wire.Options) { o.Credentials = nil },
		"failing":     func(o *wire.Options) { o.Credentials = func() (*wire.Credentials, error) { return nil, io.EOF } },
		"lanes":       func(o *wire.Options) { o.Lanes = wire.MaxLanes + 1 },
		"idle":        func(o *wire.Options) { o.IdleTimeout = time.Millisecond },
		"conns":       func(o *wire.Options) { o.MaxConns = -1 },
		"handshake":   func(o *wire.Options) { o.HandshakeTimeout = -1 },
		"software":    func(o *wire.Options) { o.Software = strings.Repeat("x", 64) },
	} {
		o := good
		change(&o)
		if l, err := wire.Listen("127.0.0.1:0", o); err == nil {
			l.Close()
			t.Errorf("%s: Listen took it", name)
		}
		if _, err := wire.Dial(t.Context(), o, "127.0.0.1:1", "node-b", wire.SourceToDestination, wire.MigrationID{}); err == nil {
			t.Errorf("%s: Dial took it", name)
		}
	}
	if _, err := wire.Dial(t.Context(), good, "127.0.0.1:1", "node-b", 0, wire.MigrationID{}); err == nil || !strings.Contains(err.Error(), "role") {
		t.Errorf("role 0: %v", err)
	}
	if _, err := wire.Dial(t.Context(), good, "127.0.0.1:1", "Node B", wire.SourceToDestination, wire.MigrationID{}); err == nil {
		t.Error("dialled a node that cannot be")
	}
}

func TestDialEndsWithItsContext(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts, by the kernel, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = wire.Dial(ctx, wiretest.Node(t, "node-a"), silent.Addr().String(), "node-b", wire.SourceToDestination, wire.MigrationID{})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Dial returned %v, want DeadlineExceeded", err)
	}
}
