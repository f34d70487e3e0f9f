// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

const crashPath = "PAGES_TEST_CRASH"

// TestMain is also the process that dies in TestMapFileOutlivesItsProcess.
func TestMain(m *testing.M) {
	if path := os.Getenv(crashPath); path != "" {
		panic(applyUntilKilled(path))
	}
	os.Exit(m.Run())
}

// applyUntilKilled opens a map, says what it holds and gives all its pages one newer
// version after the other, until it is killed. Version v lies with crashHolder(v).
func applyUntilKilled(path string) error {
	l, err := NewLayout([]Block{{"pc.ram", spanning * Size, Size}})
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	m, err := OpenMap(l, f)
	if err != nil {
		return err
	}
	_, v := m.At(0)
	for v++; ; v++ {
		if _, err := m.Apply(Record{0, spanning, crashHolder(v), v}); err != nil {
			return err
		}
		// Nothing is flushed: what was said here must be in the file.
		fmt.Println(v)
	}
}

func crashHolder(v Version) Holder { return FirstHolder + Holder(v%MaxHolders) }

// A process killed at any instant loses no statement that was applied, and leaves no
// page with a holder that does not have the page's version.
func TestMapFileOutlivesItsProcess(t *testing.T) {
	path := filepath.Join(t.TempDir(), "map")
	torn := 0
	for kill := range 10 {
		said := runAndKill(t, path, time.Duration(kill)*317*time.Microsecond)
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		m := mustOpen(t, flat(t, spanning), f)
		var counts [256]uint64
		for i := range Index(spanning) {
			h, v := m.At(i)
			counts[h]++
			if v != said && v != said+1 {
				t.Fatalf("page %d is in version %d, the process had applied %d", i, v, said)
			}
			if v != said {
				torn++
			}
			if h != Absent && h != crashHolder(v) {
				t.Fatalf("page %d in version %d is with %s", i, v, h)
			}
		}
		if counts != m.Counts().ByHolder {
			t.Fatal("the counts of a reopened map are not those of its pages")
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	t.Logf("%d pages were ahead of their record", torn)
}

// runAndKill runs a process on the map, kills it and returns the last version that it
// said it had applied.
func runAndKill(t *testing.T, path string, after time.Duration) (said Version) {
	t.Helper()
	child := exec.Command(os.Args[0], "-test.run=^$")
	child.Env = append(os.Environ(), crashPath+"="+path)
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for first := true; lines.Scan(); first = false {
		if _, err := fmt.Sscan(lines.Text(), &said); err != nil {
			t.Fatal(err)
		}
		if first {
			time.Sleep(after)
			if err := child.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if child.Wait(); child.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the process ended by itself: %s", child.ProcessState)
	}
	return said
}
