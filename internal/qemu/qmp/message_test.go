// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"bufio"
	"bytes"
	"strings"
	"testing"
)

func FuzzDecode(f *testing.F) {
	for _, seed := range []string{
		greeting, greetingNoOOB,
		`{"return": {"status": "running", "running": true}, "id": 3}`,
		`{"return": null, "id": null}`,
		`{"error": {"class": "GenericError", "desc": "no"}, "id": 18446744073709551615}`,
		`{"timestamp": {"seconds": 1763926171, "microseconds": 999999}, "event": "MIGRATION", "data": {"status": "active"}}`,
		`{"timestamp": {"seconds": 9223372036854775807, "microseconds": 9223372036854775807}, "event": "X"}`,
		`{"event": "E", "return": {}, "error": {}, "QMP": {}}`,
		`[[[[`, ``, "{\"event\": \"\xff\"}",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		before := bytes.Clone(line)
		m, err := decode(line)
		if err != nil {
			return
		}
		if m.kind < kindGreeting || m.kind > kindEvent {
			t.Fatalf("kind %d", m.kind)
		}
		if m.kind == kindEvent && m.event == "" {
			t.Fatal("event without a name")
		}
		payload := bytes.Clone(m.payload)
		for i := range line {
			line[i] = 'x' // the reader reuses its buffer
		}
		if !bytes.Equal(payload, m.payload) {
			t.Fatalf("the payload of %q shares the line's memory", before)
		}
	})
}

func TestReadLineIsBounded(t *testing.T) {
	whole := strings.Repeat("x", MaxLine-1) + "\nrest\n"
	r := bufio.NewReader(strings.NewReader(whole))
	line, err := readLine(r, nil)
	if err != nil || len(line) != MaxLine {
		t.Fatalf("%d bytes, %v", len(line), err)
	}
	if line, err = readLine(r, line[:0]); err != nil || string(line) != "rest\n" {
		t.Fatalf("%q, %v", line, err)
	}
	_, err = readLine(bufio.NewReader(strings.NewReader(strings.Repeat("x", MaxLine)+"\n")), nil)
	wantError(t, err, nil, "longer than")
}
