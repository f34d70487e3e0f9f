// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Machine is where a bench ran.
type Machine struct {
	Processor  string `json:"processor"`
	Processors int    `json:"processors"`
	MemoryMiB  uint64 `json:"memory_mib"`
	Kernel     string `json:"kernel"`
	Go         string `json:"go"`
	// Load is the number of processes that wanted a processor over the last minute
	// before the bench: others' work, which makes every number worse.
	Load float64 `json:"load"`
}

func thisMachine() Machine {
	m := Machine{Processor: processor(), Processors: runtime.NumCPU(), Go: runtime.Version()}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var s unix.Sysinfo_t
	if unix.Sysinfo(&s) == nil {
		m.MemoryMiB = uint64(s.Totalram) * uint64(s.Unit) >> 20 //nolint:unconvert // uint32 on 32-bit machines
		m.Load = float64(s.Loads[0]) / (1 << 16)                // a fixed point number (sysinfo(2))
	}
	return m
}

// processor is the model's name in /proc/cpuinfo, empty where it has none.
func processor() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if name, value, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func (m Machine) String() string {
	name := m.Processor
	if name == "" {
		name = runtime.GOARCH
	}
	return fmt.Sprintf("%d × %s, %d GiB of memory, Linux %s, %s", m.Processors, name, (m.MemoryMiB+512)>>10, m.Kernel, m.Go)
}
