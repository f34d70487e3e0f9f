// SPDX-License-Identifier: Apache-2.0

package multifd_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"scattergather.io/scattergather/internal/qemu"
	"scattergather.io/scattergather/internal/qemu/multifd"
	"scattergather.io/scattergather/internal/qemu/qmp"
)

const channels = 3

// A guest that writes without pause is migrated over several channels. If the
// barrier let a page pass a synchronisation point, an old version would survive.
func TestMemoryOfARealGuestArrives(t *testing.T) {
	for _, tc := range []struct {
		machine  string
		flushing bool // with a QEMU that knows it
	}{{"q35", true}, {"pc-q35-7.2", false}} {
		t.Run(tc.machine, func(t *testing.T) {
			t.Parallel()
			src := startGuest(t, tc.machine)
			sink := newSink(t)
			want := sink.receive(t, src)
			v := src.Version()
			if modern := v.Major > 8 || v.Major == 8 && v.Minor >= 1; sink.flushing != (modern && tc.flushing) {
				t.Errorf("QEMU %v, machine %s: MULTIFD_FLUSH records: %v", v, tc.machine, sink.flushing)
			}
			if sink.syncs < 4 || sink.barrier.Passed() != uint64(sink.syncs) {
				t.Errorf("%d points, %d passed", sink.syncs, sink.barrier.Passed())
			}
			for id := range channels {
				if sink.normal[id].Load() == 0 {
					t.Errorf("channel %d brought no pages", id)
				}
			}
			// In front of 1 MiB is what the ROMs hide from pmemsave.
			for o := dirtyFrom; o < guestBytes; o += multifd.PageSize {
				got, want := sink.memory[o:o+multifd.PageSize], want[o:o+multifd.PageSize]
				if !bytes.Equal(got, want) {
					t.Fatalf("page %#x differs: first word %d, want %d", o, binary.LittleEndian.Uint32(got), binary.LittleEndian.Uint32(want))
				}
			}
			if w := binary.LittleEndian.Uint32(want[dirtyFrom:]); w < 2 {
				t.Errorf("the guest wrote %d times", w)
			}
			t.Logf("QEMU %v: %d points, pages %d %d %d, zero %d", v, sink.syncs, sink.normal[0].Load(), sink.normal[1].Load(), sink.normal[2].Load(), sink.zero.Load())
		})
	}
}

// sink is a destination that keeps pc.ram.
type sink struct {
	listener net.Listener
	barrier  *multifd.Barrier
	syncs    int  // on the main connection
	flushing bool // MULTIFD_FLUSH records marked them
	normal   [channels]atomic.Int64
	zero     atomic.Int64

	mu     sync.Mutex // two channels may bring the same page, see the package comment
	memory []byte
}

func newSink(t *testing.T) *sink {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "m"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return &sink{listener: l, barrier: multifd.NewBarrier(channels), memory: make([]byte, guestBytes)}
}

// receive migrates src to the sink and returns the guest's memory at its end.
func (s *sink) receive(t *testing.T, src *qmp.Client) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	do(src.SetCapabilities(ctx, map[string]bool{"multifd": true}))
	do(src.SetParameters(ctx, map[string]any{"multifd-channels": channels, "max-bandwidth": 64 << 20, "downtime-limit": 1}))
	do(src.Migrate(ctx, "unix:"+s.listener.Addr().String()))
	failed := make(chan error, channels+1)
	var wg sync.WaitGroup
	for range channels + 1 {
		conn, err := s.listener.Accept()
		do(err)
		deadline, _ := ctx.Deadline()
		conn.SetDeadline(deadline)
		wg.Go(func() {
			defer conn.Close()
			if err := s.serve(ctx, conn); err != nil {
				failed <- err
				s.barrier.Break(err)
			}
		})
	}
	_, err := src.WaitMigration(ctx, func(m *qmp.Migration) bool { return m.RAM.DirtySyncCount >= 4 || len(failed) > 0 })
	do(err)
	do(src.SetParameters(ctx, map[string]any{"max-bandwidth": 4 << 30, "downtime-limit": 2000}))
	_, err = src.WaitMigration(ctx, func(m *qmp.Migration) bool { return m.Status == qmp.StatusCompleted || len(failed) > 0 })
	do(err)
	wg.Wait()
	select {
	case err := <-failed:
		t.Fatal(err)
	default:
	}
	file := filepath.Join(t.TempDir(), "memory")
	do(src.Execute(ctx, "pmemsave", map[string]any{"val": 0, "size": guestBytes, "filename": file}, nil))
	memory, err := os.ReadFile(file)
	do(err)
	return memory
}

func (s *sink) serve(ctx context.Context, conn net.Conn) error {
	r := bufio.NewReader(conn)
	first, err := r.Peek(4)
	if err != nil {
		return err
	}
	if binary.BigEndian.Uint32(first) != multifd.Magic {
		return s.readMain(ctx, r)
	}
	rx := multifd.NewReceiver(r, multifd.Options{})
	h, err := rx.Hello()
	if err != nil {
		return err
	}
	if h.ID >= channels {
		return fmt.Errorf("channel %d", h.ID)
	}
	var p multifd.Packet
	for {
		if err := rx.Next(&p); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		if err := s.take(rx, &p, h.ID == 0); err != nil {
			return err
		}
		s.normal[h.ID].Add(int64(len(p.Normal)))
		if p.Flags.Sync() {
			if err := s.barrier.Channel(ctx, int(h.ID)); err != nil {
				return err
			}
		}
	}
}

func (s *sink) readMain(ctx context.Context, r io.Reader) error {
	d := qemu.NewDecoder(r, qemu.DecoderOptions{Multifd: true})
	var ev qemu.Event
	for {
		err := d.Next(&ev)
		switch {
		case err == io.EOF:
			s.flushing = d.Setup().MultifdFlush
			return nil
		case err != nil:
			return err
		case ev.Kind == qemu.EventZero:
			s.clear(d.Setup().RAM.Blocks[ev.Block].Name, ev.Offset)
		case ev.Kind == qemu.EventSync:
			s.syncs++
			if err := s.barrier.Main(ctx); err != nil {
				return err
			}
		}
	}
}

func (s *sink) take(rx *multifd.Receiver, p *multifd.Packet, slow bool) error {
	for i, o := range p.Normal {
		if slow && i == len(p.Normal)*3/4 {
			// The rest has left the source. Let the others get ahead if they can.
			time.Sleep(150 * time.Millisecond)
		}
		page, err := rx.Page()
		if err != nil {
			return err
		}
		if p.BlockName == "pc.ram" {
			s.mu.Lock()
			copy(s.memory[o:o+multifd.PageSize], page)
			s.mu.Unlock()
		}
	}
	for _, o := range p.Zero {
		s.clear(p.BlockName, o)
	}
	return nil
}

func (s *sink) clear(block string, o uint64) {
	s.zero.Add(1)
	if block == "pc.ram" {
		s.mu.Lock()
		defer s.mu.Unlock()
		clear(s.memory[o : o+multifd.PageSize])
	}
}
