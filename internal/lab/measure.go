// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"time"
)

// span is the group's common time: from the first start to the last of each
// milestone.
func (s *Scene) span() (started, released, completed time.Time, mustLeave int64) {
	for i, v := range s.VMs {
		m := v.Milestones()
		if i == 0 || m.Started.Before(started) {
			started = m.Started
		}
		if m.Released.After(released) {
			released = m.Released
		}
		if m.Completed.After(completed) {
			completed = m.Completed
		}
		mustLeave += m.MustLeave
	}
	return started, released, completed, mustLeave
}

// measure fills in what links, milestones and beats tell.
func (r *runner) measure(samples []Sample) {
	s, res := r.scene, r.result
	started, released, completed, mustLeave := s.span()
	res.EvictionSeconds = seconds(released.Sub(started))
	res.TotalMigrationSeconds = seconds(completed.Sub(started))
	if up := s.Spec.Source.Up; up > 0 {
		res.LimitSeconds = float64(mustLeave) * 8 / float64(up)
	}
	from, to := started.Add(-lead), completed.Add(lead)
	steps := int(to.Sub(from) / timelineStep)
	t := &Timeline{
		Step: timelineStep.Seconds(), From: -lead.Seconds(),
		Released: seconds(released.Sub(started)), End: seconds(completed.Sub(started)),
		Served: make([]float64, steps),
	}
	res.Timeline = t
	for i, node := range s.Net.Nodes {
		out, in := series(samples, i, from, timelineStep, steps)
		t.Links = append(t.Links, LinkSeries{Node: node.Name, Out: out, In: in})
		begin, end := trafficAt(samples, started, i), trafficAt(samples, completed, i)
		switch node {
		case s.Source:
			res.BytesSourceOut = end.Out - begin.Out
		case s.Destination:
			res.BytesDestinationIn = end.In - begin.In
		default:
			res.BytesByIntermediary[node.Name] = end.In - begin.In
		}
	}
	for _, v := range s.VMs {
		vitals := v.Guest.Vitals(from, to, timelineStep)
		res.DowntimeMs = max(res.DowntimeMs, millis(vitals.Downtime()))
		res.LongestStallMs = max(res.LongestStallMs, millis(vitals.LongestStall))
		t.Switched = max(t.Switched, seconds(vitals.Switched.Sub(started)))
		t.Resumed = max(t.Resumed, seconds(vitals.Resumed.Sub(started)))
		for i := range t.Served {
			t.Served[i] += float64(vitals.Served[i]) / timelineStep.Seconds()
		}
	}
}
