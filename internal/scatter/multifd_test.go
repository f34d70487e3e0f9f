// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
	"scattergather.io/scattergather/internal/qemu/multifd"
	"scattergather.io/scattergather/internal/wire"
)

// multifdSource plays a source QEMU with multifd channels: rounds of pages at random on
// random channels, and a synchronisation point after each.
type multifdSource struct {
	*testSource
	channels []net.Conn
	// perSection marks points by every EOS record, as machine types up to 8.0 do.
	perSection bool
	// zeros are sent on the main connection, as before QEMU 9.0.
	zerosOnMain bool
	// broken is a channel that was closed, or 0.
	broken  int
	packets uint64
}

const flushRecord = 0x200

// packet is a multifd packet of pages of one block: data first, then zeros.
func (s *multifdSource) packet(block int, list []pages.Index, flags uint32) []byte {
	var normal, zero []pages.Index
	for _, i := range list {
		if s.mem[i] == 0 {
			zero = append(zero, i)
		} else {
			normal = append(normal, i)
		}
	}
	b := make([]byte, 320+8*multifd.MaxPages)
	for i, v := range []uint32{multifd.Magic, 1, flags, multifd.MaxPages, uint32(len(normal)), uint32(len(normal)) * pages.Size} {
		binary.BigEndian.PutUint32(b[4*i:], v)
	}
	s.packets++
	binary.BigEndian.PutUint64(b[24:], s.packets)
	binary.BigEndian.PutUint32(b[32:], uint32(len(zero)))
	if block >= 0 {
		copy(b[64:], s.layout.Blocks()[block].Name)
	}
	for k, i := range append(normal, zero...) {
		_, offset := s.layout.Locate(i)
		binary.BigEndian.PutUint64(b[320+8*k:], offset)
	}
	for _, i := range normal {
		var p [pages.Size]byte
		b = append(b, s.mem.page(p[:], i)...)
	}
	return b
}

// sync puts a point on all channels and its mark on the main connection.
func (s *multifdSource) sync() error {
	for id, c := range s.channels {
		if id == s.broken && id > 0 {
			continue
		}
		if _, err := c.Write(s.packet(-1, nil, uint32(multifd.FlagSync))); err != nil {
			return err
		}
	}
	if !s.perSection {
		s.buf = binary.BigEndian.AppendUint64(s.buf, flushRecord)
	}
	return nil
}

func (s *multifdSource) run() error {
	defer s.conn.Close()
	go s.readReturnPath()
	err := s.migrate()
	for _, c := range s.channels {
		c.Close()
	}
	if err != nil {
		return err
	}
	if status, ok := <-s.shut; !ok || status != 0 {
		return errors.New("no SHUT")
	}
	return nil
}

func (s *multifdSource) migrate() error {
	s.buf = qemu.AppendSetup(s.buf, &s.setup)
	s.buf = qemu.AppendCommand(s.buf, qemu.CommandOpenReturnPath, nil)
	s.buf = qemu.AppendRAMStart(s.buf, &s.setup, false)
	end := append([]byte(nil), s.buf[len(s.buf)-13:]...) // EOS record and footer
	s.buf = s.buf[:len(s.buf)-13]
	if err := s.sync(); err != nil {
		return err
	}
	s.buf = append(s.buf, end...)
	if err := s.flush(); err != nil { // behind it, nothing before the first mark
		return err
	}
	todo := make([]pages.Index, len(s.mem))
	for i := range todo {
		todo[i] = pages.Index(i)
	}
	for round := range s.rounds + 1 {
		s.buf = qemu.AppendPartStart(s.buf, s.setup.RAM.Section)
		if err := s.round(todo); err != nil {
			return err
		}
		if err := s.sync(); err != nil {
			return err
		}
		// A stock source sends the mark and keeps what follows in its buffer.
		end := qemu.AppendPartEnd(nil, s.setup.RAM.Section)
		if s.perSection {
			s.buf, end = append(s.buf, end[:8]...), end[8:]
		}
		if err := s.flush(); err != nil {
			return err
		}
		s.buf = append(s.buf, end...)
		if round < s.rounds {
			todo = s.dirty(round)
		}
	}
	if s.perSection { // the END of the section has an EOS record, too
		if err := s.sync(); err != nil {
			return err
		}
	}
	return s.finishPrecopy()
}

// round sends each page once, in random order.
func (s *multifdSource) round(todo []pages.Index) error {
	seen := map[pages.Index]bool{}
	groups := map[int][]pages.Index{}
	for _, k := range s.rng.Perm(len(todo)) {
		i := todo[k]
		if seen[i] {
			continue
		}
		seen[i] = true
		block, offset := s.layout.Locate(i)
		if s.zerosOnMain && s.mem[i] == 0 {
			s.buf = qemu.AppendZero(s.buf, &s.st, s.layout.Blocks()[block].Name, block, offset)
			continue
		}
		if groups[block] = append(groups[block], i); len(groups[block]) < 1+s.rng.IntN(multifd.MaxPages) {
			continue
		}
		if err := s.post(block, groups[block]); err != nil {
			return err
		}
		delete(groups, block)
	}
	for block, list := range groups {
		if err := s.post(block, list); err != nil {
			return err
		}
	}
	return nil
}

func (s *multifdSource) post(block int, list []pages.Index) error {
	c := s.channels[s.rng.IntN(len(s.channels))]
	if s.broken > 0 {
		c = s.channels[0]
	}
	_, err := c.Write(s.packet(block, list, 0))
	return err
}

// doMultifd runs a migration with channels, which connect before the main stream when
// early is true.
func (r *run) doMultifd(channels int, early bool, change func(*multifdSource)) {
	src := &multifdSource{testSource: r.src}
	r.src.postcopy = false
	r.cfg.MultifdChannels = channels
	start := r.start()
	conns := make(chan net.Conn, channels+1)
	main, _ := r.engine.cfg.Accept(context.Background())
	if !early {
		conns <- main
	}
	keep := r.src.conn
	for id := range channels {
		conns <- r.src.connect(r.t)
		c := r.src.conn
		hello := binary.BigEndian.AppendUint32(nil, multifd.Magic)
		hello = append(binary.BigEndian.AppendUint32(hello, 1), make([]byte, 56)...)
		hello[24] = byte(id)
		if _, err := c.Write(hello); err != nil {
			r.t.Fatal(err)
		}
		src.channels = append(src.channels, c)
	}
	if early {
		conns <- main
	}
	r.src.conn = keep
	r.engine.cfg.Accept = acceptFrom(conns)
	change(src)
	r.play = src.run
	start(context.Background())
	for _, c := range src.channels {
		c.Close()
	}
}

// A page that is sent again behind a synchronisation point, on whatever channel,
// supersedes the one before it.
func TestMultifdKeepsTheOrderOfVersions(t *testing.T) {
	bed := newTestbed(t)
	rapid.Check(t, func(t *rapid.T) {
		r := newRunOn(bed.with(t), rapid.IntRange(24, 600).Draw(t, "pages"), rapid.Uint64().Draw(t, "seed"))
		r.lend(rapid.IntRange(1, 1000).Draw(t, "capacity"))
		r.dst.credit = rapid.SampledFrom([]uint64{64 * wire.MaxSealed, 1 << 40}).Draw(t, "credit")
		r.cfg.FlightBytes = rapid.SampledFrom([]int{1, 8 << 20}).Draw(t, "flight")
		r.src.dirty = dirtier(r.src, rapid.IntRange(0, 300).Draw(t, "dirty"))
		r.src.rounds = rapid.IntRange(0, 4).Draw(t, "rounds")
		r.doMultifd(rapid.IntRange(1, 4).Draw(t, "channels"), rapid.Bool().Draw(t, "early"), func(s *multifdSource) {
			s.perSection = rapid.Bool().Draw(t, "perSection")
			s.zerosOnMain = rapid.Bool().Draw(t, "zerosOnMain")
		})
		r.succeeded()
	})
}

// A channel that ends too early fails the migration instead of leaving it waiting.
func TestMultifdChannelThatBreaks(t *testing.T) {
	r := newRun(t, 300)
	r.src.dirty = func(round int) []pages.Index { return []pages.Index{1, 2, 3} }
	r.src.rounds = 3
	r.doMultifd(2, false, func(s *multifdSource) {
		dirty := s.dirty
		s.dirty = func(round int) []pages.Index {
			if round == 1 {
				s.broken = 1
				s.channels[1].Close()
			}
			return dirty(round)
		}
	})
	if !errors.Is(r.err, ErrRolledBack) || !strings.Contains(r.err.Error(), "channel 1") {
		t.Fatal(r.err)
	}
}

func TestMultifdChannelThatIsUnknown(t *testing.T) {
	r := newRun(t, 300)
	r.doMultifd(2, true, func(s *multifdSource) {
		r.engine.cfg.MultifdChannels = 1
	})
	if !errors.Is(r.err, ErrRolledBack) || !strings.Contains(r.err.Error(), "channel") {
		t.Fatal(r.err)
	}
}
