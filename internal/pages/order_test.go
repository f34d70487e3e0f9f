// SPDX-License-Identifier: Apache-2.0

package pages

import "testing"

func TestOrderSmoke(t *testing.T) {
	l, err := NewLayout([]Block{{"pc.ram", 1 << 20, Size}})
	if err != nil {
		t.Fatal(err)
	}
	o, ready := NewOrder(l, 0), NewBitmap(l.Pages())
	ready.SetRange(0, 256)
	o.Fault(100)
	for ready.Count() > 0 {
		f, n, ok := o.Next(ready, 8)
		if !ok || n == 0 {
			t.Fatal(f, n, ok)
		}
		ready.ClearRange(f, uint64(n))
	}
}
