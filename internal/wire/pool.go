// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"context"
	"sync"
)

// Pool lends out at most a fixed number of values, so that what a pipeline holds in
// flight is bounded. Get gives ownership and Put takes it back; a value that is not
// put back is lost to the pool. It is safe for concurrent use.
type Pool[T any] struct {
	tokens chan struct{} // one for every value that may still be lent out
	fresh  func() *T

	mu   sync.Mutex
	idle []*T // put back; the last one is lent out first, as its memory is warm
}

// NewPool returns a pool of at most max values, each made when it is first needed.
func NewPool[T any](max int, fresh func() *T) *Pool[T] {
	p := &Pool[T]{tokens: make(chan struct{}, max), fresh: fresh, idle: make([]*T, 0, max)}
	for range max {
		p.tokens <- struct{}{}
	}
	return p
}

// NewBatchPool returns a pool of at most max batches of about 264 KiB.
func NewBatchPool(max int) *Pool[Batch] { return NewPool(max, NewBatch) }

// NewFramePool returns a pool of at most max frames. A frame keeps the largest buffer
// that it ever needed, about 264 KiB on bulk lanes.
func NewFramePool(max int) *Pool[Frame] {
	return NewPool(max, func() *Frame { return new(Frame) })
}

// Get returns a value, new or as it was put back. It waits while all are lent out,
// until ctx is done, whose cause it then returns.
func (p *Pool[T]) Get(ctx context.Context) (*T, error) {
	if v := p.TryGet(); v != nil {
		return v, nil
	}
	select {
	case <-p.tokens:
		return p.take(), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// TryGet returns a value, or nil when all are lent out.
func (p *Pool[T]) TryGet() *T {
	select {
	case <-p.tokens:
		return p.take()
	default:
		return nil
	}
}

func (p *Pool[T]) take() *T {
	p.mu.Lock()
	defer p.mu.Unlock()
	last := len(p.idle) - 1
	if last < 0 {
		return p.fresh()
	}
	v := p.idle[last]
	p.idle = p.idle[:last]
	return v
}

// Put gives back a value that Get or TryGet returned. The caller must not use it, or
// what aliases it, any more. Putting back more than was lent out panics.
func (p *Pool[T]) Put(v *T) {
	p.mu.Lock()
	p.idle = append(p.idle, v)
	p.mu.Unlock()
	select {
	case p.tokens <- struct{}{}:
	default:
		panic("wire: more was put back into a pool than it lent out")
	}
}
