// SPDX-License-Identifier: Apache-2.0

package wire_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"scattergather.io/scattergather/internal/wire"
)

func TestPool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		made := 0
		p := wire.NewPool(2, func() *int { made++; return new(int) })
		a, err := p.Get(t.Context())
		if err != nil || made != 1 {
			t.Fatalf("%v, %d made", err, made)
		}
		p.Put(a)
		if b := p.TryGet(); b != a || made != 1 {
			t.Fatal("a value that was put back was not used again")
		}
		b := p.TryGet()
		if b == nil || b == a || p.TryGet() != nil {
			t.Fatal("not exactly two values")
		}
		stop := errors.New("enough")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, stop)
		defer cancel()
		if _, err := p.Get(ctx); err != stop {
			t.Errorf("Get returned %v, want the context's cause", err)
		}
		time.AfterFunc(time.Hour, func() { p.Put(b) })
		if got, err := p.Get(t.Context()); got != b || err != nil {
			t.Errorf("Get returned %p, %v, want %p", got, err, b)
		}
		p.Put(a)
		p.Put(b)
		defer func() {
			if recover() == nil {
				t.Error("a third value was put back")
			}
		}()
		p.Put(new(int))
	})
}

func TestBuiltinPools(t *testing.T) {
	if b, f := wire.NewBatchPool(1).TryGet(), wire.NewFramePool(1).TryGet(); b == nil || f == nil || b.Len() != 0 {
		t.Errorf("%v, %v", b, f)
	}
}
