// SPDX-License-Identifier: Apache-2.0

package wire

import "context"

// Pool lends out at most a fixed number of values, so that what a pipeline holds in
// flight is bounded. Get gives ownership, Put gives it back; a value that is not put
// back is lost to the pool. It is safe for concurrent use.
type Pool[T any] struct {
	// tokens holds one token for every value that is not lent out.
	free chan *T
}

// NewBatchPool returns a pool of at most max batches.
func NewBatchPool(max int) *Pool[Batch] { return nil }

// NewFramePool returns a pool of at most max frames.
func NewFramePool(max int) *Pool[Frame] { return nil }

// Get returns a value, made new or put back earlier with its old content. It waits
// while all are lent out, until ctx is done, whose cause it then returns.
func (p *Pool[T]) Get(ctx context.Context) (*T, error) { return nil, nil }

// TryGet returns a value, or nil when all are lent out.
func (p *Pool[T]) TryGet() *T { return nil }

// Put gives a value back that Get or TryGet returned.
func (p *Pool[T]) Put(v *T) {}
