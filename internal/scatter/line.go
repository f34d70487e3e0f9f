// SPDX-License-Identifier: Apache-2.0

package scatter

import "slices"

// line is a queue of flights that keeps its memory. The zero value is empty.
type line struct {
	list []*flight
	head int
}

func (q *line) len() int { return len(q.list) - q.head }

// all returns the flights in order; the slice is valid until the next change.
func (q *line) all() []*flight { return q.list[q.head:] }

// last returns the flight that was added last; there must be one.
func (q *line) last() *flight { return q.list[len(q.list)-1] }

func (q *line) add(f *flight) {
	if q.head > 0 && len(q.list) == cap(q.list) {
		n := copy(q.list, q.list[q.head:])
		clear(q.list[n:])
		q.list, q.head = q.list[:n], 0
	}
	q.list = append(q.list, f)
}

// take removes and returns the first flight; there must be one.
func (q *line) take() *flight {
	f := q.list[q.head]
	q.list[q.head] = nil
	if q.head++; q.head == len(q.list) {
		q.list, q.head = q.list[:0], 0
	}
	return f
}

// first puts flights in front of all others, in their order.
func (q *line) first(list []*flight) {
	q.list, q.head = slices.Concat(list, q.all()), 0
}

// empty removes and returns all flights.
func (q *line) empty() []*flight {
	list := q.all()
	*q = line{}
	return list
}
