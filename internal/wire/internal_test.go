// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bufio"
	"bytes"
	"crypto/x509"
	"io"
	"net"
	"net/url"
	"testing"
	"time"
)

func FuzzHello(f *testing.F) {
	f.Add((&hello{minVersion: 1, maxVersion: 1, role: SourceToDestination, lanes: 2, idle: 30000, software: "x"}).encode())
	f.Add((&hello{minVersion: 2, maxVersion: 3}).encode())
	f.Fuzz(func(t *testing.T, body []byte) {
		h, err := parseHello(body)
		if err == nil && h.minVersion <= Version && h.maxVersion >= Version && !bytes.HasPrefix(body, h.encode()) {
			t.Fatalf("%+v has two forms", h)
		}
	})
}

func FuzzWelcome(f *testing.F) {
	f.Add((&welcome{version: 1, features: 3, idle: 30000, software: "x"}).encode())
	f.Fuzz(func(t *testing.T, body []byte) {
		if w, err := parseWelcome(body); err == nil && !bytes.Equal(w.encode(), body) {
			t.Fatalf("%+v has two forms", w)
		}
	})
}

func FuzzPreamble(f *testing.F) {
	f.Add((&preamble{kind: LaneBulk, number: 3, group: [16]byte{1}}).encode())
	f.Add((&preamble{kind: LaneUrgent}).encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := parsePreamble(b); err == nil && !bytes.Equal(p.encode(), b) {
			t.Fatalf("%+v has two forms", p)
		}
	})
}

// FuzzHeader looks for headers that pass although their frame is larger than its type
// allows on that lane.
func FuzzHeader(f *testing.F) {
	f.Add([]byte{32, 0, 0, 1, 0, 0, 16, 32, 0, 0, 0, 0, 0, 0, 0, 1}, uint8(LaneBulk), uint8(SourceToIntermediary))
	f.Add([]byte{17, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1}, uint8(LaneControl), uint8(SourceToDestination))
	f.Fuzz(func(t *testing.T, b []byte, kind, role uint8) {
		if len(b) != headerSize || kind > uint8(LaneBulk) || role < 1 || role > 3 {
			return
		}
		c := newConn(Role(role), MigrationID{}, "a", false, 0, 0)
		l := c.newLane(LaneKind(kind), 0, nil, nil, nil)
		if l.kind != LaneControl {
			l.opener = newFrameCipher(Key{}, c.role.coverage())
		}
		h := parseHeader(b)
		size, err := l.sizeOf(&h)
		if err != nil {
			return
		}
		limit := maxPagesBody
		if l.kind == LaneControl {
			limit = MaxControlBody
		}
		if size < 0 || size > limit || size > int(h.length) || h.typ.known() && size > rules[h.typ].max {
			t.Fatalf("%+v passes with %d bytes", h, size)
		}
		if h.typ == TypePages && int(h.count)*l.opener.coverage.stride() > size {
			t.Fatalf("%+v passes with more descriptors than bytes", h)
		}
	})
}

// deaf is a connection that gives some bytes and then ends.
type deaf struct {
	net.Conn // nil: nothing else may be called
	io.Reader
}

func (d deaf) Read(b []byte) (int, error)      { return d.Reader.Read(b) }
func (d deaf) Close() error                    { return nil }
func (d deaf) SetReadDeadline(time.Time) error { return nil }

// FuzzReceive gives a control lane whatever bytes, and a protected lane too.
func FuzzReceive(f *testing.F) {
	f.Add([]byte("\x35\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07"), uint8(SourceToIntermediary))
	f.Add([]byte("\xc8\x01\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x07xx"), uint8(SourceToDestination))
	f.Fuzz(func(t *testing.T, b []byte, role uint8) {
		if role < 1 || role > 3 {
			return
		}
		c := newConn(Role(role), MigrationID{}, "a", false, time.Second, time.Second)
		in := deaf{Reader: bytes.NewReader(b)}
		c.control = c.newLane(LaneControl, 0, in, in, bufio.NewReader(in))
		var fr Frame
		received := 0
		for c.control.Receive(&fr) == nil {
			received += headerSize + len(fr.Body)
		}
		if received > len(b) || c.Err() == nil {
			t.Fatalf("%d bytes received of %d, %v", received, len(b), c.Err())
		}
		c = newConn(Role(role), MigrationID{}, "a", false, time.Second, time.Second)
		in = deaf{Reader: bytes.NewReader(b)}
		c.control = c.newLane(LaneControl, 0, in, in, bufio.NewReader(in))
		l := c.newLane(LaneBulk, 0, in, in, bufio.NewReader(in))
		l.opener = newFrameCipher(Key{}, c.role.coverage())
		if err := l.Receive(&fr); err == nil {
			t.Fatalf("%v was taken without a key", fr.Type)
		}
		c.Close()
	})
}

func FuzzIdentity(f *testing.F) {
	f.Add("spiffe://scattergather.io/node/node-a")
	f.Add("spiffe://scattergather.io/node/a%2fb")
	f.Add("spiffe://user@scattergather.io:1/node/a?b#c")
	f.Fuzz(func(t *testing.T, uri string) {
		u, err := url.Parse(uri)
		if err != nil {
			return
		}
		id, err := identityOf(&x509.Certificate{URIs: []*url.URL{u}})
		if err == nil && (id.check() != nil || *u != *id.uri()) {
			t.Fatalf("%q is %q", uri, id)
		}
	})
}

// TestIdentitySpellings proves that a node has one spelling only.
func TestIdentitySpellings(t *testing.T) {
	for _, s := range []string{
		"spiffe://scattergather.io/node/", "spiffe://scattergather.io/node/A", "spiffe://scattergather.io/node/a/",
		"spiffe://scattergather.io/node/a%62", "spiffe://scattergather.io/node/a?x", "spiffe://scattergather.io/node/a#x",
		"spiffe://u@scattergather.io/node/a", "spiffe://scattergather.io:80/node/a", "https://scattergather.io/node/a",
		"spiffe://other.io/node/a", "spiffe://scattergather.io/pod/a", "spiffe:scattergather.io/node/a",
	} {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		if id, err := identityOf(&x509.Certificate{URIs: []*url.URL{u}}); err == nil {
			t.Errorf("%s is node %q", s, id)
		}
	}
	a, b := Identity("a").uri(), Identity("b").uri()
	if id, err := identityOf(&x509.Certificate{URIs: []*url.URL{a, b}}); err == nil {
		t.Errorf("a certificate with two URIs is node %q", id)
	}
	if id, err := identityOf(&x509.Certificate{URIs: []*url.URL{a}}); err != nil || id != "a" {
		t.Errorf("%q, %v", id, err)
	}
}
