// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"encoding/hex"
	"strconv"
	"testing"
)

// The archive is read back the way the kernel reads it: header of 110 bytes,
// name, padding, data, padding.
func TestCPIOReadsBack(t *testing.T) {
	var b bytes.Buffer
	data := []byte("seven b")
	if err := writeCPIO(&b, []cpioEntry{{name: "init", mode: modeRegular | 0o755, data: data}}); err != nil {
		t.Fatal(err)
	}
	raw := b.Bytes()
	field := func(at, i int) int {
		n, err := strconv.ParseUint(string(raw[at+6+8*i:at+14+8*i]), 16, 32)
		if err != nil {
			t.Fatalf("field %d: %v in\n%s", i, err, hex.Dump(raw))
		}
		return int(n)
	}
	if got := string(raw[:6]); got != "070701" {
		t.Fatalf("magic %q", got)
	}
	if got := field(0, 1); got != modeRegular|0o755 {
		t.Errorf("mode %o", got)
	}
	size, name := field(0, 6), field(0, 11)
	if got := string(raw[110 : 110+name]); got != "init\x00" {
		t.Errorf("name %q", got)
	}
	at := (110 + name + 3) &^ 3
	if got := raw[at : at+size]; !bytes.Equal(got, data) {
		t.Errorf("data %q, want %q", got, data)
	}
	at = (at + size + 3) &^ 3
	if got := string(raw[at+110 : at+110+field(at, 11)-1]); got != "TRAILER!!!" {
		t.Errorf("last entry is %q", got)
	}
}
