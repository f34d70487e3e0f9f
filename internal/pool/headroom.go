// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"scattergather.io/scattergather/internal/pages"
)

// room guards the node's own memory: before every roomStep bytes that sessions take,
// it asks how much is available.
type room struct {
	available func() uint64
	left      atomic.Int64 // pages that may be taken without asking
	mu        sync.Mutex
}

const roomStep = 4 << 20

// take asks for n pages. Its error wraps ErrFull.
func (r *room) take(n int) error {
	if n == 0 || r.left.Add(-int64(n)) >= 0 {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.left.Load() >= 0 { // another lane asked meanwhile
		return nil
	}
	if got := r.available(); got < roomStep {
		r.left.Store(0)
		return fmt.Errorf("%w: the node has %d bytes to spare, less than %d", ErrFull, got, roomStep)
	}
	r.left.Store(roomStep / pages.Size)
	return nil
}

// give lets n pages be taken again that were given back just now.
func (r *room) give(n int) { r.left.Add(int64(n)) }

// nodeHeadroom returns what the node can spare in bytes: the least of its available
// memory less keep, what the agent's control group may still take (tmpfs pages are
// charged to it), and the free space of the tmpfs.
func nodeHeadroom(dir string, keep uint64) (uint64, error) {
	available, err := memAvailable()
	if err != nil {
		return 0, err
	}
	var fs unix.Statfs_t
	if err := retry(func() error { return unix.Statfs(dir, &fs) }); err != nil {
		return 0, fmt.Errorf("asking for the free space of %s: %w", dir, err)
	}
	room := min(available-min(available, keep), fs.Bavail*uint64(fs.Bsize))
	limit, err := cgroupRoom("/sys/fs/cgroup")
	if err != nil {
		return 0, err
	}
	return min(room, limit), nil
}

func memAvailable() (uint64, error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	return parseMemAvailable(text)
}

func parseMemAvailable(meminfo []byte) (uint64, error) {
	for line := range bytes.Lines(meminfo) {
		if f := bytes.Fields(line); len(f) >= 2 && string(f[0]) == "MemAvailable:" {
			kib, err := strconv.ParseUint(string(f[1]), 10, 53)
			if err != nil {
				return 0, fmt.Errorf("MemAvailable in /proc/meminfo: %w", err)
			}
			return kib << 10, nil
		}
	}
	return 0, errors.New("/proc/meminfo has no MemAvailable")
}

// cgroupRoom returns how much more memory the control group (version 2) at root may
// take: in a container that is the container's own. Without a limit, or without
// control groups, there is no bound.
func cgroupRoom(root string) (uint64, error) {
	limit, err := readCounter(root + "/memory.max")
	if err != nil || limit == math.MaxUint64 {
		return limit, err
	}
	current, err := readCounter(root + "/memory.current")
	return limit - min(limit, current), err
}

// readCounter reads a number of bytes; "max" and a file that does not exist are no
// limit.
func readCounter(path string) (uint64, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return math.MaxUint64, nil
	}
	if err != nil {
		return 0, err
	}
	if text = bytes.TrimSpace(text); string(text) == "max" {
		return math.MaxUint64, nil
	}
	n, err := strconv.ParseUint(string(text), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return n, nil
}
