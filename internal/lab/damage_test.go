// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"scattergather.io/scattergather/internal/lab/guest"
)

// A verification that never finds anything proves nothing. This one is given a
// single flipped bit in the memory of a running guest.
func TestTheGuestFindsASingleFlippedBit(t *testing.T) {
	spec := testSpec()
	scene, err := NewScene(t.Context(), testAssets(t), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := scene.Close(); err != nil {
			t.Error(err)
		}
	})
	v := scene.VMs[0]
	if verified, err := v.Guest.Verify(t.Context()); err != nil {
		t.Fatalf("before the damage: %v (%+v)", err, verified)
	}
	config := spec.guestConfig(0)
	page := uint32(config.WorkingSet<<20/guest.PageSize) + 100 // beyond what is dirtied
	pattern := guest.Pattern{Seed: config.Seed, Mix: config.Mix}
	for pattern.Kind(page) != guest.Random {
		page++
	}
	if err := flipBit(v.Source, spec.MemoryMiB, pattern, page); err != nil {
		t.Fatal(err)
	}
	verified, err := v.Guest.Verify(t.Context())
	if !errors.Is(err, ErrWrongPages) || verified.Wrong != 1 {
		t.Fatalf("after the damage: %v (%+v), want one wrong page", err, verified)
	}
	if want := fmt.Sprintf("page %d (generation 0)", page); !strings.Contains(err.Error(), want) {
		t.Errorf("the error does not name %s: %v", want, err)
	}
}

// flipBit finds a page in the memory of a QEMU by its content and changes it
// there.
func flipBit(q *QEMU, memoryMiB int, pattern guest.Pattern, page uint32) error {
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", q.Pid()), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer mem.Close()
	start, err := guestMemory(q.Pid(), int64(memoryMiB)<<20)
	if err != nil {
		return err
	}
	ram := make([]byte, memoryMiB<<20)
	if _, err := mem.ReadAt(ram, start); err != nil {
		return err
	}
	var content guest.Page
	pattern.Fill(&content, page, 0)
	wanted, err := binary.Append(nil, binary.LittleEndian, content)
	if err != nil {
		return err
	}
	at := bytes.Index(ram, wanted)
	if at < 0 {
		return fmt.Errorf("page %d is not in the guest's memory", page)
	}
	_, err = mem.WriteAt([]byte{ram[at+2000] ^ 0x10}, start+int64(at)+2000)
	return err
}

// guestMemory finds where QEMU has mapped the guest's RAM: the mapping of just
// that size.
func guestMemory(pid int, size int64) (int64, error) {
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return 0, err
	}
	defer maps.Close()
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var from, to int64
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x", &from, &to); err == nil && to-from == size {
			return from, nil
		}
	}
	return 0, fmt.Errorf("process %d has no mapping of %d bytes", pid, size)
}
