// SPDX-License-Identifier: Apache-2.0

package wire_test

import (
	"errors"
	"fmt"
	"sync"
	"syscall"
	"testing"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
	"scattergather.io/scattergather/internal/wire/wiretest"
)

// cpuSeconds returns the processor time that this process has used, in seconds.
func cpuSeconds(b *testing.B) float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Sec+u.Stime.Sec) + float64(u.Utime.Usec+u.Stime.Usec)/1e6
}

// BenchmarkBulk sends pages over bulk lanes, both ends in this process. "stored" are
// pages that were sealed before and that the receiver only copies, as an intermediary
// does. "opened" are pages that the sender seals and the receiver opens, as between
// source and destination.
func BenchmarkBulk(b *testing.B) {
	for _, role := range []wire.Role{wire.SourceToDestination, wire.SourceToIntermediary} {
		for _, seal := range []bool{false, true} {
			for _, lanes := range []int{1, 2} {
				name := fmt.Sprintf("%v/seal=%v/lanes=%d", role, seal, lanes)
				b.Run(name, func(b *testing.B) { benchmarkBulk(b, role, seal, lanes) })
			}
		}
	}
}

func benchmarkBulk(b *testing.B, role wire.Role, seal bool, lanes int) {
	from, to := wiretest.Node(b, "node-a"), wiretest.Node(b, "node-b")
	from.Lanes = lanes
	c, s := wiretest.PairOptions(b, role, from, to, "node-b")
	sealer := wire.NewSealer(wire.NewKey())
	var wg sync.WaitGroup
	b.SetBytes(wire.MaxBatch * pages.Size)
	b.ReportAllocs()
	before := cpuSeconds(b)
	b.ResetTimer()
	for i := range lanes {
		n := b.N/lanes + 1
		wg.Go(func() { sendBatches(b, c.Bulk(i), sealer, seal, n) })
		wg.Go(func() { receiveBatches(b, s.Bulk(i), sealer, seal, n) })
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric((cpuSeconds(b)-before)/(float64(b.N)*wire.MaxBatch*pages.Size/1e9), "cpu-s/GB")
}

func sendBatches(b *testing.B, l *wire.Lane, s *wire.Sealer, seal bool, n int) {
	page := make([]byte, pages.Size)
	batch := wire.NewBatch()
	for k := range n {
		if seal || k == 0 {
			batch.Reset(uint64(k))
			for !batch.Full() {
				batch.Append(s, pages.Index(k*wire.MaxBatch+batch.Len()), 0, wire.EncodingRaw, page)
			}
		}
		if err := l.SendBatch(batch); err != nil {
			b.Error(err)
			return
		}
	}
}

func receiveBatches(b *testing.B, l *wire.Lane, s *wire.Sealer, open bool, n int) {
	var f wire.Frame
	store := make([]byte, 0, wire.MaxSealed)
	for range n {
		if err := l.Receive(&f); err != nil {
			b.Error(err)
			return
		}
		p, err := f.Pages()
		if err == nil {
			err = p.Each(func(d wire.Desc, sealed []byte) error {
				if !open {
					store = append(store[:0], sealed...)
					return nil
				}
				_, err := s.Open(store, sealed, d.Index, d.Version, d.Encoding)
				return err
			})
		}
		if err != nil || p.Len() != wire.MaxBatch {
			b.Error(errors.Join(err, fmt.Errorf("%d pages", p.Len())))
			return
		}
	}
}
