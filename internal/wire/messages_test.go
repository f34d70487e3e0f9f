// SPDX-License-Identifier: Apache-2.0

package wire_test

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

var session = wire.Session{1, 2, 3, 15: 16}

// messages holds an example of every message, for round trips and as seeds.
var messages = []wire.Message{
	&wire.Error{Code: wire.CodeFull, Text: "no room"},
	&wire.Resume{Known: true, Applied: 1 << 40},
	&wire.Setup{
		Key: wire.Key{9, 8, 7}, Strategy: "hybrid", Machine: "pc-q35-10.0",
		Config: []byte("QEVM..."), Early: []byte{1, 2}, Section: 2, Instance: 3, Version: 4, Postcopy: true,
		Blocks: []pages.Block{{Name: "pc.ram", Length: 1 << 30, PageSize: 4096}, {Name: "huge", Length: 1 << 30, PageSize: 1 << 21}},
		Holders: []wire.Holder{
			{Name: "node c", Addr: "10.0.0.3:7777", Identity: "node-c", Session: session},
			{Name: "", Addr: "[::1]:1", Identity: "d"},
		},
	},
	&wire.Setup{},
	wire.Ready{},
	&wire.Holders{First: 2, Holders: []wire.Holder{{Addr: "a:1", Identity: "x.y-z"}}},
	wire.Records{{First: 1, Count: 2, Holder: pages.FirstHolder + 3, Version: 4}, {First: math.MaxUint64, Count: 1, Holder: pages.Zero}},
	&wire.Package{Total: 10, Offset: 4, Data: []byte("device")},
	wire.Loaded{},
	&wire.State{Phase: wire.PhaseSwitched},
	&wire.Credit{Bytes: 1 << 50},
	wire.Applied{},
	&wire.Commit{Pages: 1 << 33},
	&wire.Committed{Pages: 1 << 33},
	&wire.Abort{Reason: "changed my mind"},
	wire.Ack{},
	&wire.Nack{Code: wire.CodeFull},
	wire.Want{1, 2, 1 << 34},
	wire.Read{{Index: 5, Version: 6}, {Index: 7}},
	wire.Free{{First: 5, Count: math.MaxUint32}, {First: 9, Count: 1}},
	&wire.Reserve{Bytes: 1 << 37, Reader: "node-b", Grace: 90 * time.Second},
	&wire.Reserved{Session: session, Bytes: 1 << 36},
	&wire.Attach{Session: session},
	&wire.Attached{Pages: 100, Bytes: 100 * 4112},
	wire.Dissolve{},
	wire.Dissolved{},
}

// parse reads a body as a message of type t; known is false for types without a body.
func parse(t wire.Type, body []byte) (m wire.Message, known bool, err error) {
	switch t {
	case wire.TypeError:
		m, err = wire.ParseError(body)
	case wire.TypeResume:
		m, err = ref(wire.ParseResume(body))
	case wire.TypeSetup:
		m, err = wire.ParseSetup(body)
	case wire.TypeHolders:
		m, err = wire.ParseHolders(body)
	case wire.TypeRecords:
		r, e := wire.ParseRecords(nil, body)
		m, err = wire.Records(r), e
	case wire.TypePackage:
		m, err = ref(wire.ParsePackage(body))
	case wire.TypeState:
		m, err = ref(wire.ParseState(body))
	case wire.TypeCredit:
		m, err = ref(wire.ParseCredit(body))
	case wire.TypeCommit:
		m, err = ref(wire.ParseCommit(body))
	case wire.TypeCommitted:
		m, err = ref(wire.ParseCommitted(body))
	case wire.TypeAbort:
		m, err = ref(wire.ParseAbort(body))
	case wire.TypeNack:
		m, err = ref(wire.ParseNack(body))
	case wire.TypeWant:
		w, e := wire.ParseWant(nil, body)
		m, err = wire.Want(w), e
	case wire.TypeRead:
		r, e := wire.ParseRead(nil, body)
		m, err = wire.Read(r), e
	case wire.TypeFree:
		f, e := wire.ParseFree(nil, body)
		m, err = wire.Free(f), e
	case wire.TypeReserve:
		m, err = ref(wire.ParseReserve(body))
	case wire.TypeReserved:
		m, err = ref(wire.ParseReserved(body))
	case wire.TypeAttach:
		m, err = ref(wire.ParseAttach(body))
	case wire.TypeAttached:
		m, err = ref(wire.ParseAttached(body))
	default:
		return nil, false, nil
	}
	return m, true, err
}

func ref[T any](m T, err error) (*T, error) { return &m, err }

func TestMessagesRoundTrip(t *testing.T) {
	for _, m := range messages {
		body, err := m.Append([]byte("front"))
		if err != nil {
			t.Fatalf("%v: %v", m.Type(), err)
		}
		body, ok := bytes.CutPrefix(body, []byte("front"))
		if !ok {
			t.Fatalf("%v: Append did not keep what was there", m.Type())
		}
		got, known, err := parse(m.Type(), body)
		if !known {
			if len(body) != 0 {
				t.Errorf("%v: %d bytes that nothing parses", m.Type(), len(body))
			}
			continue
		}
		if err != nil {
			t.Errorf("%v: %v", m.Type(), err)
		}
		if d := cmp.Diff(m, got); d != "" {
			t.Errorf("%v: sent (-), received (+):\n%s", m.Type(), d)
		}
	}
}

// TestMessagesCutShort takes bytes off every example and adds one: none of these parse,
// except where the shorter body is a whole message too.
func TestMessagesCutShort(t *testing.T) {
	for _, m := range messages {
		body, err := m.Append(nil)
		if err != nil {
			t.Fatal(err)
		}
		for n := range len(body) {
			got, _, err := parse(m.Type(), body[:n])
			if err == nil {
				again, err := got.Append(nil)
				if err != nil || !bytes.Equal(again, body[:n]) {
					t.Errorf("%v: %d of %d bytes parse, as something else", m.Type(), n, len(body))
				}
			} else if !errors.Is(err, wire.ErrProtocol) || !strings.Contains(err.Error(), m.Type().String()) {
				t.Errorf("%v: %d of %d bytes: error %q neither is ErrProtocol nor names the message", m.Type(), n, len(body), err)
			}
		}
		if _, known, err := parse(m.Type(), append(body, 0)); known && err == nil && m.Type() != wire.TypePackage {
			t.Errorf("%v: parses with a byte too many", m.Type())
		}
	}
}

func FuzzMessages(f *testing.F) {
	for _, m := range messages {
		body, err := m.Append(nil)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(byte(m.Type()), body)
	}
	f.Fuzz(func(t *testing.T, typ byte, body []byte) {
		m, known, err := parse(wire.Type(typ), body)
		if !known || err != nil {
			return
		}
		again, err := m.Append(nil)
		if err != nil {
			t.Fatalf("%v parses but does not encode: %v", m.Type(), err)
		}
		if !bytes.Equal(again, body) {
			t.Fatalf("%v has two forms:\n%x\n%x", m.Type(), body, again)
		}
	})
}

func TestMessageLimits(t *testing.T) {
	long := strings.Repeat("x", 300)
	for name, m := range map[string]wire.Message{
		"no records":     wire.Records{},
		"records":        make(wire.Records, wire.MaxRecords+1),
		"wants":          make(wire.Want, wire.MaxWant+1),
		"reads":          make(wire.Read, wire.MaxBatch+1),
		"runs":           make(wire.Free, wire.MaxRuns+1),
		"package chunk":  &wire.Package{Total: wire.MaxPackage, Data: make([]byte, wire.MaxPackageChunk+1)},
		"package total":  &wire.Package{Total: wire.MaxPackage + 1, Data: []byte{1}},
		"package offset": &wire.Package{Total: 10, Offset: math.MaxUint64, Data: []byte{1, 2}},
		"package end":    &wire.Package{Total: 10, Offset: 9, Data: []byte{1, 2}},
		"package empty":  &wire.Package{Total: 10},
		"strategy":       &wire.Setup{Strategy: long},
		"machine":        &wire.Setup{Machine: long},
		"config":         &wire.Setup{Config: make([]byte, wire.MaxSetupStream), Early: []byte{1}},
		"blocks":         &wire.Setup{Blocks: make([]pages.Block, pages.MaxBlocks+1)},
		"block name":     &wire.Setup{Blocks: []pages.Block{{Name: long}}},
		"holders":        &wire.Holders{First: 250, Holders: []wire.Holder{{Identity: "a"}}},
		"holder name":    &wire.Holders{Holders: []wire.Holder{{Identity: "a", Name: long}}},
		"holder addr":    &wire.Holders{Holders: []wire.Holder{{Identity: "a", Addr: long}}},
		"holder nobody":  &wire.Holders{Holders: []wire.Holder{{}}},
		"reader":         &wire.Reserve{Reader: "Not/A/Node"},
		"grace":          &wire.Reserve{Reader: "a", Grace: -time.Second},
	} {
		if _, err := m.Append(nil); err == nil {
			t.Errorf("%s: no error beyond the limit", name)
		}
	}
	// Free text is cut instead: an error must not fail because it says too much.
	for _, m := range []wire.Message{&wire.Error{Text: strings.Repeat("y", 5000)}, &wire.Abort{Reason: strings.Repeat("y", 5000)}} {
		if body, err := m.Append(nil); err != nil || len(body) > wire.MaxText+4 {
			t.Errorf("%v: %d bytes, %v", m.Type(), len(body), err)
		}
	}
}

// TestLargestSetup proves that the bound of control frames has room for all limits at
// once.
func TestLargestSetup(t *testing.T) {
	name := strings.Repeat("n", 253)
	m := &wire.Setup{
		Strategy: strings.Repeat("s", 63), Machine: strings.Repeat("m", 255),
		Config: make([]byte, wire.MaxSetupStream), Blocks: make([]pages.Block, pages.MaxBlocks),
		Holders: make([]wire.Holder, wire.MaxHolders),
	}
	for i := range m.Blocks {
		m.Blocks[i].Name = strings.Repeat("b", pages.MaxName)
	}
	for i := range m.Holders {
		m.Holders[i] = wire.Holder{Name: name, Addr: "[" + name + "]:65535", Identity: wire.Identity(name)}
	}
	body, err := m.Append(nil)
	if err != nil || len(body) > wire.MaxControlBody {
		t.Fatalf("%d bytes, %v", len(body), err)
	}
	got, err := wire.ParseSetup(body)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(m.Holders, got.Holders); d != "" {
		t.Error(d)
	}
}

func TestSecretsStayOutOfLogs(t *testing.T) {
	key := wire.Key{0xab, 0xcd}
	for _, s := range []string{fmt.Sprintf("%v", key), fmt.Sprintf("%+v", wire.Setup{Key: key}), fmt.Sprintf("%#v", key), fmt.Sprintf("%x", key), fmt.Sprintf("%d", key)} {
		if strings.Contains(s, "ab") || strings.Contains(s, "171") {
			t.Errorf("key in %q", s)
		}
	}
	e := &wire.Error{Code: wire.CodeInternal, Text: "a\nb\x1b[31m"}
	if s := e.Error(); strings.ContainsAny(s, "\n\x1b") {
		t.Errorf("control characters of the peer in %q", s)
	}
}
