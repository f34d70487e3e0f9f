// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"scattergather.io/scattergather/internal/lab/guest"
)

func TestCounterSeesAGuestThatRanTwice(t *testing.T) {
	type heard struct {
		side Side
		seq  uint32
	}
	for _, c := range []struct {
		name  string
		beats []heard
		want  Counter
	}{
		{"unbroken", []heard{{AtSource, 7}, {AtSource, 8}, {AtDestination, 9}, {AtDestination, 10}},
			Counter{First: 7, Last: 10, Heard: [2]int{2, 2}}},
		{"beats lost on the way", []heard{{AtSource, 1}, {AtSource, 4}, {AtDestination, 6}},
			Counter{First: 1, Last: 6, Heard: [2]int{2, 1}, Lost: 3, Jump: 1}},
		{"the lines heard out of order", []heard{{AtSource, 1}, {AtDestination, 3}, {AtSource, 2}},
			Counter{First: 1, Last: 3, Heard: [2]int{2, 1}}},
		{"both ends ran", []heard{{AtSource, 1}, {AtSource, 2}, {AtSource, 3}, {AtDestination, 3}, {AtDestination, 4}},
			Counter{First: 1, Last: 4, Heard: [2]int{3, 2}, Back: 1}},
		{"an older state was restored", []heard{{AtSource, 5}, {AtSource, 6}, {AtDestination, 2}},
			Counter{First: 5, Last: 2, Heard: [2]int{2, 1}, Back: 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := NewGuest("test")
			for _, b := range c.beats {
				g.hear(b.side, time.Now(), guest.AppendBeat(nil, guest.Beat{Seq: b.seq}))
			}
			if diff := cmp.Diff(c.want, g.Counter()); diff != "" {
				t.Errorf("Counter() (-want +got):\n%s", diff)
			}
		})
	}
}
