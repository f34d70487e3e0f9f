// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"math"
	"slices"
)

// Target is what a row's value has to be. The zero value is none: the row only
// informs.
type Target struct {
	Low, High float64 // High = +Inf is no upper bound
	set       bool
}

// AtMost is a target with an upper bound.
func AtMost(v float64) Target { return Target{High: v, set: true} }

// AtLeast is a target with a lower bound.
func AtLeast(v float64) Target { return Target{Low: v, High: math.Inf(1), set: true} }

// Between is a target with both.
func Between(low, high float64) Target { return Target{Low: low, High: high, set: true} }

// Holds says whether a value meets the target.
func (t Target) Holds(v float64) bool { return !t.set || t.Low <= v && v <= t.High }

func (t Target) String() string {
	switch {
	case !t.set:
		return "–"
	case math.IsInf(t.High, 1):
		return fmt.Sprintf("≥ %s", number(t.Low))
	case t.Low == 0:
		return fmt.Sprintf("≤ %s", number(t.High))
	}
	return fmt.Sprintf("%s … %s", number(t.Low), number(t.High))
}

// number writes a value of the table.
func number(v float64) string {
	switch {
	case v == math.Trunc(v) && math.Abs(v) < 1e15:
		return fmt.Sprintf("%.0f", v)
	case math.Abs(v) >= 100:
		return fmt.Sprintf("%.0f", v)
	case math.Abs(v) >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// median is the middle of the values, or between the two in the middle; NaN of none.
func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(values))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}
