// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"fmt"
	"strconv"
	"strings"
)

// Mix is the share, in per cent, of pages of each Kind, in the order of the
// kinds. The shares add up to 100.
type Mix [4]int

// DefaultMix is a memory like that of a server at work: most of it data, some
// of it text-like, some shared, some never used.
var DefaultMix = Mix{50, 20, 10, 20}

// ParseMix reads "random:compressible:duplicate:zero", for example
// "50:20:10:20".
func ParseMix(text string) (Mix, error) {
	parts := strings.Split(text, ":")
	var m Mix
	if len(parts) != len(m) {
		return Mix{}, fmt.Errorf("mix %q: want four shares random:compressible:duplicate:zero, got %d", text, len(parts))
	}
	sum := 0
	for i, part := range parts {
		n, err := strconv.Atoi(part)
		if err != nil || n < 0 || n > 100 {
			return Mix{}, fmt.Errorf("mix %q: share %q is not a number from 0 to 100", text, part)
		}
		m[i] = n
		sum += n
	}
	if sum != 100 {
		return Mix{}, fmt.Errorf("mix %q: the shares add up to %d, not to 100", text, sum)
	}
	return m, nil
}

func (m Mix) String() string {
	return fmt.Sprintf("%d:%d:%d:%d", m[Random], m[Compressible], m[Duplicate], m[Zero])
}

// Config is what the host tells the guest on the kernel's command line.
type Config struct {
	Seed       uint64 // of the pattern; different guests hold different data
	FillMiB    int    // memory filled with the pattern, in MiB
	Mix        Mix    // what it is filled with
	WorkingSet int    // MiB at its start that are dirtied and requested
	DirtyRate  int    // pages written per second in the working set
	VerifyRate int    // pages verified per second while nobody asks for more
	Requests   int    // requests served per second
	Touches    int    // pages of the working set that a request touches
	CPUs       int    // 1 or 2 loops
}

// prefix marks our parameters on the kernel's command line. The dot keeps the
// kernel from passing them to init as environment.
const prefix = "sg."

// CommandLine is the parameters as words of a kernel command line. The kernel
// hands GODEBUG to init as environment: the guest's loop needs no preemption by
// signals.
func (c Config) CommandLine() string {
	return "GODEBUG=asyncpreemptoff=1 " + fmt.Sprintf(prefix+"seed=%d "+prefix+"fill=%d "+prefix+"mix=%s "+prefix+"ws=%d "+prefix+"dirty=%d "+
		prefix+"verify=%d "+prefix+"requests=%d "+prefix+"touches=%d "+prefix+"cpus=%d",
		c.Seed, c.FillMiB, c.Mix, c.WorkingSet, c.DirtyRate, c.VerifyRate, c.Requests, c.Touches, c.CPUs)
}

// ParseCommandLine finds the parameters among the words of a kernel command
// line. A parameter that is absent keeps its zero value.
func ParseCommandLine(line string) (Config, error) {
	var c Config
	numbers := map[string]*int{
		"fill": &c.FillMiB, "ws": &c.WorkingSet, "dirty": &c.DirtyRate, "verify": &c.VerifyRate,
		"requests": &c.Requests, "touches": &c.Touches, "cpus": &c.CPUs,
	}
	for word := range strings.FieldsSeq(line) {
		name, value, found := strings.Cut(word, "=")
		name, ours := strings.CutPrefix(name, prefix)
		if !ours || !found {
			continue
		}
		var err error
		switch {
		case name == "seed":
			c.Seed, err = strconv.ParseUint(value, 10, 64)
		case name == "mix":
			c.Mix, err = ParseMix(value)
		case numbers[name] != nil:
			*numbers[name], err = strconv.Atoi(value)
		default:
			err = fmt.Errorf("unknown parameter")
		}
		if err != nil {
			return Config{}, fmt.Errorf("kernel command line: %s%s=%s: %w", prefix, name, value, err)
		}
	}
	return c, c.validate()
}

func (c Config) validate() error {
	switch {
	case c.FillMiB <= 0:
		return fmt.Errorf("guest: %d MiB to fill: want at least 1", c.FillMiB)
	case c.WorkingSet <= 0 || c.WorkingSet > c.FillMiB:
		return fmt.Errorf("guest: working set of %d MiB: want 1 to the %d MiB that are filled", c.WorkingSet, c.FillMiB)
	case c.CPUs < 1 || c.CPUs > 2:
		return fmt.Errorf("guest: %d CPUs: want 1 or 2", c.CPUs)
	case c.DirtyRate < 0 || c.VerifyRate < 0 || c.Requests < 0 || c.Touches < 0:
		return fmt.Errorf("guest: a rate is negative")
	}
	return nil
}
