// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"bufio"
	"context"
	"encoding/binary"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
	"scattergather.io/scattergather/internal/wire"
)

// sink is a QEMU that takes everything and checks nothing, as fast as it can.
func sink(c net.Conn) {
	defer c.Close()
	r := bufio.NewReaderSize(c, 64<<10)
	skip := func(n int) bool { _, err := r.Discard(n); return err == nil }
	if !skip(len(fakeConfig)) {
		return
	}
	var pong []byte
	for {
		t, err := r.ReadByte()
		if err != nil {
			return
		}
		switch t {
		case 0x00:
			_, _ = c.Write(qemu.AppendShut(nil, 0))
			return
		case 0x08:
			h, err := r.Peek(4)
			if err != nil {
				return
			}
			cmd, n := binary.BigEndian.Uint16(h), int(binary.BigEndian.Uint16(h[2:]))
			skip(4)
			p, err := r.Peek(n)
			if err != nil {
				return
			}
			switch qemu.Command(cmd) {
			case qemu.CommandPing:
				pong = qemu.AppendPong(pong[:0], binary.BigEndian.Uint32(p))
			case qemu.CommandPackaged:
				n += int(binary.BigEndian.Uint32(p))
				pong = qemu.AppendPong(pong[:0], 3)
			}
			skip(n)
			if len(pong) > 0 {
				_, _ = c.Write(pong)
				pong = pong[:0]
			}
		case 0x01:
			// section, "ram", instance, version, total, one block "ram", EOS, footer
			skip(4 + 4 + 4 + 4 + 8 + 4 + 8 + 8 + 5)
		case 0x02, 0x03:
			skip(4)
			for {
				h, err := r.Peek(8)
				if err != nil {
					return
				}
				flags := binary.BigEndian.Uint64(h) & 0xfff
				skip(8)
				if flags == 0x10 {
					break
				}
				if flags&0x20 == 0 {
					skip(4)
				}
				if flags&0x08 != 0 {
					skip(pages.Size)
				} else {
					skip(1)
				}
			}
			skip(5)
		}
	}
}

// benchBed opens a migration of that many pages into a sink.
func benchBed(b testing.TB, holders int, n uint64) *bed {
	b.Helper()
	bd := newBed(b, holders, pages.Block{Name: "ram", Length: n * pages.Size, PageSize: pages.Size})
	path := filepath.Join(b.TempDir(), "sink")
	ln, err := net.Listen("unix", path)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { ln.Close() })
	bd.cfg.Connect = func(ctx context.Context) (net.Conn, error) {
		c, err := net.Dial("unix", path)
		if err != nil {
			return nil, err
		}
		s, err := ln.Accept()
		if err != nil {
			return nil, err
		}
		go sink(s)
		return c, nil
	}
	dir, err := os.MkdirTemp("/dev/shm", "sg-gather-test-") //nolint:usetesting // t.TempDir is on a disk
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	bd.cfg.StateDir = filepath.Join(dir, "state")
	bd.open()
	return bd
}

// BenchmarkDirect brings all pages from the source.
func BenchmarkDirect(b *testing.B) {
	n := max(uint64(b.N), 256)
	bd := benchBed(b, 0, n)
	page := content(1, 0)
	b.SetBytes(pages.Size)
	var before runtime.MemStats
	runtime.ReadMemStats(&before)
	b.ResetTimer()
	batch, acks := wire.NewBatch(), 0
	for i := uint64(0); i < n; {
		batch.Reset(i + 1)
		for ; i < n && !batch.Full(); i++ {
			batch.Append(bd.sealer, pages.Index(i), 0, wire.EncodingRaw, page)
		}
		if acks >= 64 {
			<-bd.acks
			acks--
		}
		if err := bd.conn.Bulk(int(i/wire.MaxBatch) % bd.conn.Lanes()).SendBatch(batch); err != nil {
			b.Fatal(err)
		}
		acks++
	}
	for ; acks > 0; acks-- {
		<-bd.acks
	}
	bd.end(n)
	b.StopTimer()
	report(b, &before, n)
}

// end commits n pages and waits for the engine.
func (b *bed) end(n uint64) {
	b.t.Helper()
	b.send(&wire.Commit{Pages: n})
	b.expect(wire.TypeCommitted)
	b.send(&wire.State{Phase: wire.PhaseReleased})
	<-b.done
	if b.err != nil {
		b.t.Fatal(b.err)
	}
}

// report tells the allocations for each page, those of the test's own source and
// intermediaries included.
func report(b *testing.B, before *runtime.MemStats, n uint64) {
	var after runtime.MemStats
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.Mallocs-before.Mallocs)/float64(n), "allocs/page")
}

// BenchmarkIntermediaries brings all pages from two intermediaries.
func BenchmarkIntermediaries(b *testing.B) {
	n := max(uint64(b.N), 256)
	bd := benchBed(b, 2, n)
	for k := range 2 {
		bd.holders[k].same = bd.sealer
	}
	b.SetBytes(pages.Size)
	var before runtime.MemStats
	runtime.ReadMemStats(&before)
	b.ResetTimer()
	var recs wire.Records
	for i := uint64(0); i < n; i += 64 {
		h, _ := pages.HolderOf(int(i/64) % 2)
		recs = append(recs, pages.Record{First: pages.Index(i), Count: uint32(min(64, n-i)), Holder: h})
	}
	bd.records(recs)
	bd.end(n)
	b.StopTimer()
	report(b, &before, n)
}
