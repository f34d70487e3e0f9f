// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// stateRoot holds one directory for every run that is alive or crashed. It lies
// on tmpfs: a reboot is the most thorough clean-up.
const stateRoot = "/run/scattergather-lab"

// sharedRoot is a tmpfs on every Linux machine; /run is not everywhere.
const sharedRoot = "/dev/shm"

// namespacePrefix begins the name of every network namespace of every run.
const namespacePrefix = "sglab-"

// RunDir is one run's directory: sockets, logs and the journal of what a later
// run has to clean up if this one cannot. While the run lives it holds a lock
// on it.
type RunDir struct {
	ID   string
	Path string

	mu      sync.Mutex
	lock    *os.File
	journal *os.File
}

// NewRunDir clears what crashed runs left behind and begins a new run.
func NewRunDir() (*RunDir, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("the lab makes network namespaces and needs root: run it with sudo")
	}
	if err := os.MkdirAll(stateRoot, 0o700); err != nil {
		return nil, fmt.Errorf("making the lab's state directory: %w", err)
	}
	if _, err := Clean(); err != nil {
		return nil, err
	}
	var random [3]byte
	_, _ = rand.Read(random[:]) // never fails
	r := &RunDir{ID: hex.EncodeToString(random[:])}
	r.Path = filepath.Join(stateRoot, r.ID)
	// The lock comes with the directory: a half-made one would look crashed.
	dir, err := os.MkdirTemp(stateRoot, ".new-")
	if err != nil {
		return nil, err
	}
	if r.lock, err = lockFile(filepath.Join(dir, "lock")); err != nil {
		return nil, err
	}
	if r.journal, err = os.Create(filepath.Join(dir, "journal")); err != nil {
		return nil, err
	}
	return r, os.Rename(dir, r.Path)
}

var errLocked = errors.New("the run is alive")

func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, errLocked
	}
	return f, nil
}

// namespace is the name of a node's network namespace.
func (r *RunDir) namespace(node string) string { return namespacePrefix + r.ID + "-" + node }

// shared is the run's directory on tmpfs.
func shared(id string) string { return filepath.Join(sharedRoot, namespacePrefix+id) }

// Shared makes a directory on tmpfs that goes with the run, for what has to be in
// memory and to outlive the process that made it.
func (r *RunDir) Shared(name string) (string, error) {
	dir := filepath.Join(shared(r.ID), name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("making a directory on tmpfs: %w", err)
	}
	return dir, nil
}

// record notes a process, so that a later run can end it and nothing else: a
// number alone may by then belong to another.
func (r *RunDir) record(pid int) error {
	start, err := startTime(pid)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	_, err = fmt.Fprintf(r.journal, "%d %s\n", pid, start)
	return err
}

// Close removes the run's directory and its namespaces. Its processes must have
// ended.
func (r *RunDir) Close() error {
	err := errors.Join(removeNamespaces(namespacePrefix+r.ID+"-"), os.RemoveAll(shared(r.ID)), os.RemoveAll(r.Path))
	return errors.Join(err, r.journal.Close(), r.lock.Close())
}

// startTime is the 22nd field of /proc/PID/stat: the boot-relative moment at
// which the process began (proc(5)).
func startTime(pid int) (string, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	_, rest, found := strings.Cut(string(stat[max(0, strings.LastIndexByte(string(stat), ')')):]), " ")
	fields := strings.Fields(rest)
	if !found || len(fields) < 20 {
		return "", fmt.Errorf("/proc/%d/stat is not what proc(5) says", pid)
	}
	return fields[19], nil
}

// Clean removes what crashed runs left behind: their processes, namespaces and
// directories. Runs that are alive are left alone. It returns the ids of the
// runs it cleared.
func Clean() ([]string, error) {
	entries, err := os.ReadDir(stateRoot)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var cleared []string
	alive := map[string]bool{}
	for _, e := range entries {
		path := filepath.Join(stateRoot, e.Name())
		lock, err := lockFile(filepath.Join(path, "lock"))
		if errors.Is(err, errLocked) {
			alive[strings.TrimPrefix(e.Name(), ".new-")] = true
			continue
		}
		if err != nil {
			return cleared, fmt.Errorf("clearing the crashed run %s: %w", e.Name(), err)
		}
		endRecorded(filepath.Join(path, "journal"))
		err = errors.Join(removeNamespaces(namespacePrefix+e.Name()+"-"), os.RemoveAll(shared(e.Name())), os.RemoveAll(path), lock.Close())
		if err != nil {
			return cleared, fmt.Errorf("clearing the crashed run %s: %w", e.Name(), err)
		}
		cleared = append(cleared, e.Name())
	}
	return cleared, nil
}

// endRecorded kills the processes of a journal that are still the same ones.
func endRecorded(journal string) {
	f, err := os.Open(journal)
	if err != nil {
		return
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		number, start, _ := strings.Cut(lines.Text(), " ")
		pid, err := strconv.Atoi(number)
		if err != nil || pid <= 1 {
			continue
		}
		if now, err := startTime(pid); err == nil && now == start {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}
