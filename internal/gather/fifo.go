// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"math"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// fifo is a queue that keeps its memory. The zero value is empty.
type fifo[T any] struct {
	ring []T
	head int
	n    int
}

func (q *fifo[T]) len() int { return q.n }

func (q *fifo[T]) push(v T) {
	if q.n == len(q.ring) {
		grown := make([]T, max(16, 2*len(q.ring)))
		for k := range q.n {
			grown[k] = q.at(k)
		}
		q.ring, q.head = grown, 0
	}
	q.ring[(q.head+q.n)%len(q.ring)] = v
	q.n++
}

// at returns the k-th value from the front.
func (q *fifo[T]) at(k int) T { return q.ring[(q.head+k)%len(q.ring)] }

// pop takes the value at the front; the queue must not be empty.
func (q *fifo[T]) pop() T {
	var zero T
	v := q.ring[q.head]
	q.ring[q.head] = zero
	q.head = (q.head + 1) % len(q.ring)
	q.n--
	return v
}

// remove takes the k-th value from the front and keeps the order of the others.
func (q *fifo[T]) remove(k int) T {
	v := q.at(k)
	for ; k > 0; k-- {
		q.ring[(q.head+k)%len(q.ring)] = q.at(k - 1)
	}
	q.pop()
	return v
}

func (q *fifo[T]) clear() {
	for q.n > 0 {
		q.pop()
	}
}

// runs is a list of pages, joined where one follows the other.
type runs struct {
	list  []wire.Run
	pages uint64
}

func (r *runs) add(i pages.Index) { r.addRun(i, 1) }

func (r *runs) addRun(first pages.Index, n uint64) {
	r.pages += n
	if k := len(r.list); k > 0 {
		last := &r.list[k-1]
		if last.First+pages.Index(last.Count) == first && uint64(last.Count)+n <= math.MaxUint32 {
			last.Count += uint32(n)
			return
		}
	}
	r.list = append(r.list, wire.Run{First: first, Count: uint32(n)})
}

func (r *runs) reset() { r.list, r.pages = r.list[:0], 0 }
