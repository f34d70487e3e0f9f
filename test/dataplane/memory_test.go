// SPDX-License-Identifier: Apache-2.0

package dataplane_test

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"scattergather.io/scattergather/internal/lab"
)

// TestSharedMemory moves the guest into memory that other processes could map, within
// it, and out of it again.
func TestSharedMemory(t *testing.T) {
	shared := &hardware{memory: lab.MemoryShared}
	for _, to := range []struct {
		name string
		plan plan
	}{
		{"into", plan{intermediaries: 1, hw: shared}},
		{"within", plan{strategy: "hybrid", intermediaries: 1, hw: shared}},
		{"out", plan{intermediaries: 1}},
	} {
		t.Run(to.name, func(t *testing.T) {
			s := onStage(t)
			s.move(t, to.plan)
		})
	}
}

// hugePagesFile says and sets how many pages of 2 MiB the kernel keeps for who asks.
const hugePagesFile = "/proc/sys/vm/nr_hugepages"

// hugePages makes sure that guests of some MiB together find huge pages, for as long as
// the test lasts. It returns false where the machine does not grant them.
func hugePages(t *testing.T, mebibytes int) bool {
	t.Helper()
	before, err := readNumber(hugePagesFile)
	if err != nil {
		t.Logf("this kernel has no huge pages: %v", err)
		return false
	}
	want := before + mebibytes/2
	t.Cleanup(func() {
		if err := os.WriteFile(hugePagesFile, []byte(strconv.Itoa(before)), 0o644); err != nil {
			t.Errorf("giving huge pages back: %v", err)
		}
	})
	if err := os.WriteFile(hugePagesFile, []byte(strconv.Itoa(want)), 0o644); err != nil {
		t.Logf("reserving huge pages: %v", err)
		return false
	}
	got, err := readNumber(hugePagesFile)
	if err != nil || got < want {
		t.Logf("the machine granted %d of %d huge pages (%v)", got-before, want-before, err)
		return false
	}
	return true
}

func readNumber(path string) (int, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

// TestHugePages moves a guest in pages of 2 MiB, each of which is one unit for QEMU.
func TestHugePages(t *testing.T) {
	s := onStage(t)
	huge := hardware{memory: lab.MemoryHuge}
	if !hugePages(t, 2*guestMiB+8) {
		t.Log("*** THIS MACHINE GRANTS NO HUGE PAGES: moving a guest that lives in them was NOT tested ***")
		_, err := s.boot(deadline(t, bootPatience), "huge", huge, 3)
		if err == nil || !strings.Contains(err.Error(), "nr_hugepages") {
			t.Errorf("booting a guest in huge pages that are not there: %v, want an error that names nr_hugepages", err)
		}
		return
	}
	t.Run("a destination with other pages is refused", func(t *testing.T) {
		s := onStage(t)
		m := s.prepare(t, s.guest, plan{intermediaries: 1, hw: &huge})
		m.assertRefused(t, m.run(deadline(t, movePatience)), "destination QEMU refused", "page size")
		m.discard()
	})
	g, err := s.boot(deadline(t, bootPatience), "huge", huge, 3)
	if err != nil {
		t.Fatal(err)
	}
	defer s.dismiss(g)
	// There and back, so that the stage's own guest is at the source again.
	for _, p := range []plan{{strategy: "immediate", intermediaries: 2}, {strategy: "hybrid", intermediaries: 2}} {
		t.Run(p.strategy, func(t *testing.T) { s.moveGuest(t, g, p) })
		if t.Failed() {
			return
		}
	}
}

// discard ends the QEMU that waits at the destination.
func (m *move) discard() {
	m.g.Destination.Close()
	m.g.Destination = nil
}
