// SPDX-License-Identifier: Apache-2.0

package report

import (
	"fmt"
	"math"
	"strings"

	"scattergather.io/scattergather/internal/lab"
)

// The geometry of a panel, in SVG units.
const (
	plotLeft   = 64.0
	plotWidth  = 860.0
	plotTop    = 34.0
	plotHeight = 150.0
	guestTop   = plotTop + plotHeight + 14
	guestSize  = 46.0
	axisTop    = guestTop + guestSize
	panelSize  = axisTop + 26
	panelWidth = plotLeft + plotWidth + 16
)

// panel is the timeline of one run. All panels have the same scale of time.
type panel struct {
	Method   string
	Width    float64
	Height   float64
	Left     float64
	Right    float64
	Top      float64
	Bottom   float64
	GuestTop float64
	AxisTop  float64
	Held     rect // the time in which the source was held
	Areas    []curve
	Lines    []curve
	Guest    curve
	GuestTag string
	Marks    []mark
	TicksX   []tick
	TicksY   []tick
}

type rect struct{ X, Y, W, H float64 }

type curve struct{ Class, Path string }

type tick struct {
	At   float64
	Text string
}

// mark is a moment: a line through the panel with a label above it.
type mark struct {
	X      float64
	TextX  float64
	TextY  float64
	Anchor string
	Text   string
	Class  string
}

// newPanel draws a run; span is the end of the axis of time and top that of the
// axis of rates, for all panels the same.
func newPanel(run lab.RunResult, span, top float64) panel {
	t := run.Timeline
	p := panel{
		Method: run.Method, Width: panelWidth, Height: panelSize,
		Left: plotLeft, Right: plotLeft + plotWidth, Top: plotTop, Bottom: plotTop + plotHeight, GuestTop: guestTop, AxisTop: axisTop,
	}
	begin := t.From
	x := func(at float64) float64 { return plotLeft + plotWidth*(at-begin)/(span-begin) }
	p.Held = rect{X: x(0), Y: plotTop, W: x(t.Released) - x(0), H: axisTop - plotTop}

	out, in, pool := linkCurves(t)
	p.Areas = []curve{{Class: "out", Path: area(out, t, x, plotTop, plotHeight, top)}}
	p.Lines = []curve{{Class: "in", Path: line(in, t, x, plotTop, plotHeight, top)}}
	if pool != nil {
		p.Lines = append(p.Lines, curve{Class: "pool", Path: line(pool, t, x, plotTop, plotHeight, top)})
	}
	served := niceCeiling(peak(t.Served))
	p.Guest = curve{Class: "guest", Path: area(t.Served, t, x, guestTop, guestSize, served)}
	p.GuestTag = fmt.Sprintf("%.0f req/s", served)
	for _, share := range []float64{0, 0.5, 1} {
		p.TicksY = append(p.TicksY, tick{At: plotTop + plotHeight*(1-share), Text: shortSpeed(top * share)})
	}
	for at := 0.0; at <= span; at += niceStep(span) {
		p.TicksX = append(p.TicksX, tick{At: x(at), Text: fmt.Sprintf("%g s", at)})
	}
	p.Marks = []mark{
		newMark(x(t.Resumed), fmt.Sprintf("CPU moved %.2f s", t.Resumed), "cpu", 0),
		newMark(x(t.Released), fmt.Sprintf("source free %.2f s", t.Released), "free", 1),
	}
	if t.End-t.Released > span/100 {
		p.Marks = append(p.Marks, newMark(x(t.End), fmt.Sprintf("all at destination %.2f s", t.End), "end", 0))
	}
	return p
}

// newMark labels a moment to its right, or to its left where there is no room.
func newMark(x float64, text, class string, level int) mark {
	m := mark{X: x, TextX: x + 4, TextY: plotTop - 18 + 13*float64(level), Anchor: "start", Text: text, Class: class}
	if x > plotLeft+plotWidth*0.8 {
		m.TextX, m.Anchor = x-4, "end"
	}
	return m
}

// highest is the highest rate that a run's curves reach.
func highest(t *lab.Timeline) float64 {
	out, in, pool := linkCurves(t)
	return max(peak(out), peak(in), peak(pool))
}

// linkCurves gives what left the source, what reached the destination, and what
// reached all intermediaries together (nil without any).
func linkCurves(t *lab.Timeline) (out, in, pool []float64) {
	for _, l := range t.Links {
		switch l.Node {
		case lab.SourceNode:
			out = l.Out
		case lab.DestinationNode:
			in = l.In
		default:
			if pool == nil {
				pool = make([]float64, len(l.In))
			}
			for i, bits := range l.In {
				pool[i] += bits
			}
		}
	}
	if peak(pool) < 1e5 {
		pool = nil
	}
	return out, in, pool
}

func peak(values []float64) float64 {
	top := 0.0
	for _, v := range values {
		top = max(top, v)
	}
	return top
}

func line(values []float64, t *lab.Timeline, x func(float64) float64, top, height, full float64) string {
	var b strings.Builder
	for i, v := range values {
		verb := byte('L')
		if i == 0 {
			verb = 'M'
		}
		at := t.From + t.Step*(float64(i)+0.5)
		fmt.Fprintf(&b, "%c%.1f %.1f", verb, x(at), top+height*(1-v/full))
	}
	return b.String()
}

func area(values []float64, t *lab.Timeline, x func(float64) float64, top, height, full float64) string {
	if len(values) == 0 {
		return ""
	}
	first, last := t.From+t.Step/2, t.From+t.Step*(float64(len(values))-0.5)
	return fmt.Sprintf("%sL%.1f %.1fL%.1f %.1fZ", line(values, t, x, top, height, full), x(last), top+height, x(first), top+height)
}

// niceCeiling is the next of 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8 times a power of
// ten.
func niceCeiling(v float64) float64 {
	if v <= 0 {
		return 1
	}
	unit := math.Pow(10, math.Floor(math.Log10(v)))
	for _, f := range []float64{1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8} {
		if f*unit >= v {
			return f * unit
		}
	}
	return 10 * unit
}

// niceStep is a distance of ticks that gives about ten of them.
func niceStep(span float64) float64 {
	for _, step := range []float64{0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60} {
		if span/step <= 12 {
			return step
		}
	}
	return 120
}

func shortSpeed(bits float64) string {
	if bits >= 1e9 {
		return fmt.Sprintf("%.3g G", bits/1e9)
	}
	return fmt.Sprintf("%.3g M", bits/1e6)
}
