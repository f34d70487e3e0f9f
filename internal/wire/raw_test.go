// SPDX-License-Identifier: Apache-2.0

package wire_test

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/wire"
	"scattergather.io/scattergather/internal/wire/wiretest"
)

// rawPeer speaks the protocol as docs/protocol.md has it, written a second time and by
// hand, so that it can also break the rules.
type rawPeer struct {
	t       *testing.T
	addr    string
	control *tls.Conn
	group   [16]byte
}

func dialRaw(t *testing.T, l *wire.Listener) *rawPeer {
	t.Helper()
	c, err := wiretest.Node(t, "node-a").Credentials()
	if err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{c.Certificate}, NextProtos: []string{"scattergather"}, InsecureSkipVerify: true}
	control, err := tls.Dial("tcp", l.Addr().String(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { control.Close() })
	control.SetDeadline(time.Now().Add(10 * time.Second))
	return &rawPeer{t: t, addr: l.Addr().String(), control: control, group: wire.NewMigrationID()}
}

// frame is a header and a body.
func rawFrame(typ, flags byte, count uint16, length int, seq uint64, body []byte) []byte {
	b := []byte{typ, flags}
	b = binary.BigEndian.AppendUint16(b, count)
	b = binary.BigEndian.AppendUint32(b, uint32(length))
	b = binary.BigEndian.AppendUint64(b, seq)
	return append(b, body...)
}

// rawHello is a Hello from source to intermediary with one bulk lane.
func (p *rawPeer) rawHello(lowest, highest uint16, features uint64) []byte {
	b := []byte("SGM1")
	b = binary.BigEndian.AppendUint16(b, lowest)
	b = binary.BigEndian.AppendUint16(b, highest)
	b = binary.BigEndian.AppendUint64(b, features)
	b = append(b, 2, 1)                          // role, lanes
	b = binary.BigEndian.AppendUint32(b, 30_000) // idle
	b = append(b, make([]byte, 16)...)           // migration
	b = append(b, p.group[:]...)
	return append(b, 0, 3, 'r', 'a', 'w')
}

func (p *rawPeer) send(b []byte) {
	p.t.Helper()
	if _, err := p.control.Write(b); err != nil {
		p.t.Fatal(err)
	}
}

func (p *rawPeer) hello(body []byte) { p.send(rawFrame(1, 0, 0, len(body), 0, body)) }

// answer reads one frame of the control lane.
func (p *rawPeer) answer(typ byte) []byte {
	p.t.Helper()
	head := make([]byte, 16)
	if _, err := io.ReadFull(p.control, head); err != nil {
		p.t.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint32(head[4:]))
	if _, err := io.ReadFull(p.control, body); err != nil {
		p.t.Fatal(err)
	}
	if head[0] != typ {
		p.t.Fatalf("frame type %d, want %d: %q", head[0], typ, body)
	}
	return body
}

func (p *rawPeer) preamble(kind, number byte) []byte {
	return append([]byte{'S', 'G', 'L', 'N', kind, number, 0, 0}, p.group[:]...)
}

// opening is the LaneOpen of a lane, sealed.
func (p *rawPeer) opening(kind, number byte) []byte {
	p.t.Helper()
	s := p.control.ConnectionState()
	key, err := s.ExportKeyingMaterial("EXPORTER-scattergather-lane", []byte{1, kind, number, 1}, 16)
	if err != nil {
		p.t.Fatal(err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		p.t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		p.t.Fatal(err)
	}
	head := rawFrame(3, 0, 0, 16, 0, nil)
	return gcm.Seal(head, make([]byte, 12), nil, head)
}

// lane opens a TCP connection, sends b, and returns the first 32 bytes that come back.
func (p *rawPeer) lane(b []byte) (net.Conn, []byte, error) {
	p.t.Helper()
	c, err := net.Dial("tcp", p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	c.Write(b)
	got := make([]byte, 32)
	_, err = io.ReadFull(c, got)
	return c, got, err
}

// open completes the connection.
func (p *rawPeer) open(l *wire.Listener) *wire.Conn {
	p.t.Helper()
	p.hello(p.rawHello(1, 1, 0))
	p.answer(2)
	_, got, err := p.lane(append(p.preamble(2, 0), p.opening(2, 0)...))
	if err != nil || got[0] != 4 {
		p.t.Fatalf("LaneReady: %x, %v", got, err)
	}
	c, err := l.Accept(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { c.Close() })
	return c
}

func TestVersions(t *testing.T) {
	l := wiretest.Listen(t, wiretest.Node(t, "node-b"))
	for _, c := range []struct {
		name            string
		lowest, highest uint16
		more            string
		ok              bool
	}{
		{"ours", 1, 1, "", true},
		{"later too", 1, 9, "what version 9 adds", true},
		{"earlier too", 0, 1, "", true},
		{"only later", 2, 3, "what version 3 adds", false},
		{"only earlier", 0, 0, "", false},
		{"upside down", 2, 0, "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := dialRaw(t, l)
			p.hello(append(p.rawHello(c.lowest, c.highest, 1<<63|1), c.more...))
			if !c.ok {
				body := p.answer(6)
				if code := binary.BigEndian.Uint16(body); code != 2 || !strings.Contains(string(body), "speaks 1") {
					t.Errorf("error %d %q, want the versions", code, body)
				}
				return
			}
			body := p.answer(2)
			version, features := binary.BigEndian.Uint16(body), binary.BigEndian.Uint64(body[2:])
			if version != 1 || features != 0 {
				t.Errorf("version %d, features %#x, want 1 and none of the unknown ones", version, features)
			}
		})
	}
}

// TestListenerOfAnotherVersion dials one.
func TestListenerOfAnotherVersion(t *testing.T) {
	b, err := wiretest.Node(t, "node-b").Credentials()
	if err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{b.Certificate}, NextProtos: []string{"scattergather"}, ClientAuth: tls.RequireAnyClientCert}
	l, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	text := "you speak 1"
	for name, answer := range map[string][]byte{
		"refuses":           rawFrame(6, 0, 0, 4+len(text), 0, append([]byte{0, 2, 0, byte(len(text))}, text...)),
		"chooses wrong":     rawFrame(2, 0, 0, 16, 0, []byte{0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 0, 0}),
		"talks nonsense":    rawFrame(99, 0, 0, 0, 0, nil),
		"says too much":     rawFrame(2, 0, 0, 1<<30, 0, nil),
		"pings us to death": rawFrame(2, 0, 0, 16, 0, []byte{0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0}),
	} {
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			io.ReadFull(c, make([]byte, 16+55))
			c.Write(answer)
			io.Copy(io.Discard, c)
		}()
		o := wiretest.Node(t, "node-a")
		o.Software = "x"
		_, err := wire.Dial(t.Context(), o, l.Addr().String(), "node-b", wire.SourceToDestination, wire.NewMigrationID())
		want := wire.ErrProtocol
		if name == "refuses" {
			want = wire.ErrVersion
		}
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
}

func TestBrokenHello(t *testing.T) {
	l := wiretest.Listen(t, wiretest.Node(t, "node-b"))
	good := (&rawPeer{}).rawHello(1, 1, 0)
	change := func(at int, to ...byte) []byte {
		b := append([]byte(nil), good...)
		copy(b[at:], to)
		return b
	}
	for name, body := range map[string][]byte{
		"magic": change(0, 'X'), "role 0": change(16, 0), "role 4": change(16, 4), "no lanes": change(17, 0),
		"many lanes": change(17, 17), "idle": change(18, 0, 0, 0, 99), "short": good[:30], "long": append(change(0), 0),
		"software": change(len(good)-5, 0, 64), "empty": nil,
	} {
		p := dialRaw(t, l)
		p.hello(body)
		if body := p.answer(6); binary.BigEndian.Uint16(body) != 3 {
			t.Errorf("%s: %q, want code 3", name, body)
		}
	}
	p := dialRaw(t, l)
	p.send(rawFrame(17, 0, 0, 0, 0, nil))
	if body := p.answer(6); !strings.Contains(string(body), "Hello") {
		t.Errorf("Setup instead of Hello: %q", body)
	}
}

func TestUnknownFrames(t *testing.T) {
	for name, c := range map[string]struct {
		frame []byte
		ok    bool
	}{
		"optional":            {rawFrame(200, 1, 9, 5, 0, []byte("later")), true},
		"mandatory":           {rawFrame(200, 0, 0, 5, 0, []byte("later")), false},
		"optional, too large": {rawFrame(200, 1, 0, 1<<30, 0, nil), false},
		"known but wrong":     {rawFrame(17, 1, 0, 0, 0, nil), false},
		"flag":                {rawFrame(48, 2, 0, 0, 0, nil), false},
		"count":               {rawFrame(53, 0, 1, 0, 0, nil), false},
		"Hello again":         {rawFrame(1, 0, 0, 0, 0, nil), false},
		"Pages on control":    {rawFrame(32, 0, 1, 16, 0, make([]byte, 16)), false},
		"too large":           {rawFrame(53, 0, 0, 1, 0, nil), false},
	} {
		l := wiretest.Listen(t, wiretest.Node(t, "node-b"))
		p := dialRaw(t, l)
		conn := p.open(l)
		p.send(append(c.frame, rawFrame(53, 0, 0, 0, 7, nil)...))
		var f wire.Frame
		err := conn.Control().Receive(&f)
		if c.ok && (err != nil || f.Type != wire.TypeDissolve || f.Seq != 7) {
			t.Errorf("%s: %v, %v, want it skipped", name, f.Type, err)
		}
		if !c.ok && !errors.Is(err, wire.ErrProtocol) {
			t.Errorf("%s: %v, %v, want ErrProtocol", name, f.Type, err)
		}
	}
}

// TestLaneThieves tries to take lanes of others' connections.
func TestLaneThieves(t *testing.T) {
	l := wiretest.Listen(t, wiretest.Node(t, "node-b"))
	p := dialRaw(t, l)
	p.hello(p.rawHello(1, 1, 0))
	p.answer(2)
	stranger := &rawPeer{t: t, addr: p.addr, group: [16]byte{9}}
	for name, b := range map[string][]byte{
		"unknown group":      append(stranger.preamble(2, 0), p.opening(2, 0)...),
		"no key":             append(p.preamble(2, 0), make([]byte, 32)...),
		"key of other lane":  append(p.preamble(2, 0), p.opening(2, 1)...),
		"lane not announced": append(p.preamble(2, 1), p.opening(2, 1)...),
		"urgent lane":        append(p.preamble(1, 0), p.opening(1, 0)...),
		"control lane":       append(p.preamble(0, 0), p.opening(0, 0)...),
		"lane 16":            append(p.preamble(2, 16), p.opening(2, 16)...),
		"neither":            []byte("GET / HTTP/1.1\r\n\r\n"),
	} {
		if _, got, err := p.lane(b); err == nil {
			t.Errorf("%s: answered %x", name, got)
		}
	}
	// The true one still gets its place, and its first bytes sent again get nothing.
	first := append(p.preamble(2, 0), p.opening(2, 0)...)
	if _, got, err := p.lane(first); err != nil || got[0] != 4 {
		t.Fatalf("LaneReady: %x, %v", got, err)
	}
	if _, got, err := p.lane(first); err == nil {
		t.Errorf("a repeated LaneOpen was answered: %x", got)
	}
	c, err := l.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.Err() != nil || c.Peer() != "node-a" {
		t.Errorf("%v with %s", c.Err(), c.Peer())
	}
}
