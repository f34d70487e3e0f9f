// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
)

// memory is a migration taken apart: the newest version of each page.
type memory struct {
	setup *qemu.Setup
	pkg   []byte
	data  map[page][]byte // nil for zeros
}

type page struct {
	block  int
	offset uint64
}

// takeApart decodes a stream.
func takeApart(stream []byte) (*memory, error) {
	d := qemu.NewDecoder(bytes.NewReader(stream), qemu.DecoderOptions{})
	m := &memory{data: make(map[page][]byte)}
	var ev qemu.Event
	for {
		err := d.Next(&ev)
		if err == io.EOF {
			m.setup = d.Setup()
			return m, nil
		} else if err != nil {
			return nil, err
		}
		switch ev.Kind {
		case qemu.EventPage:
			m.data[page{ev.Block, ev.Offset}] = bytes.Clone(ev.Data)
		case qemu.EventZero:
			m.data[page{ev.Block, ev.Offset}] = nil
		case qemu.EventPackage:
			m.pkg = bytes.Clone(ev.Payload)
		case qemu.EventTail:
			m.pkg = qemu.WrapTail(ev.Payload, 3)
		}
	}
}

// feeder plays the source of a migration.
type feeder struct {
	*memory
	conn    net.Conn
	state   qemu.PageState
	out     []byte
	answers bytes.Buffer
	rp      *qemu.RPDecoder
	message qemu.RPMessage
	sent    map[page]bool
}

// replay feeds a recorded migration to a destination QEMU, breaks it off half
// way, recovers, and returns what the destination said.
func replay(binary string, base []string, s scenario, stream []byte) ([]byte, error) {
	mem, err := takeApart(stream)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "replay")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	bios := filepath.Join(dir, "bios")
	if err := os.WriteFile(bios, firmware(), 0o600); err != nil {
		return nil, err
	}
	args := append(slices.Clone(base), "-machine", "q35", "-m", "2M", "-bios", bios, "-incoming", "defer",
		"-qmp", "unix:"+dir+"/qmp,server=on,wait=off")
	cmd := exec.Command(binary, append(args, s.args...)...)
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	f := &feeder{memory: mem, sent: make(map[page]bool)}
	if err := f.run(dir); err != nil {
		return nil, fmt.Errorf("%w %s", err, complaints.String())
	}
	return f.answers.Bytes(), nil
}

func (f *feeder) run(dir string) error {
	m, err := dialMonitor(dir + "/qmp")
	if err != nil {
		return err
	}
	if err := m.do("migrate-set-capabilities", map[string]any{"capabilities": []map[string]any{{"capability": "postcopy-ram", "state": true}}}); err != nil {
		return err
	}
	if err := m.do("migrate-incoming", map[string]any{"uri": "unix:" + dir + "/in"}); err != nil {
		return err
	}
	if err := f.dial(dir + "/in"); err != nil {
		return err
	}
	if err := f.open(); err != nil {
		return err
	}
	if err := f.half(len(f.data) / 2); err != nil {
		return err
	}
	if err := f.flush(f.torn()); err != nil {
		return err
	}
	_ = f.conn.Close()
	time.Sleep(500 * time.Millisecond)
	if err := m.do("migrate-recover", map[string]any{"uri": "unix:" + dir + "/again"}); err != nil {
		return err
	}
	if err := f.dial(dir + "/again"); err != nil {
		return err
	}
	if err := f.resume(); err != nil {
		return err
	}
	if err := f.half(len(f.data)); err != nil {
		return err
	}
	if err := f.flush(qemu.AppendEOF(qemu.AppendRAMEnd(f.out, f.setup.RAM.Section))); err != nil {
		return err
	}
	if err := f.await(qemu.RPShut, 0); err != nil {
		return err
	}
	time.Sleep(200 * time.Millisecond)
	return m.do("query-status", nil)
}

func (f *feeder) dial(path string) (err error) {
	for range 50 {
		if f.conn, err = net.Dial("unix", path); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	_ = f.conn.SetDeadline(time.Now().Add(20 * time.Second))
	f.state = qemu.PageState{}
	f.rp = qemu.NewRPDecoder(io.TeeReader(f.conn, &f.answers), f.setup.RAM.Blocks)
	return nil
}

// open sends all up to the switch and waits until the device state is loaded.
func (f *feeder) open() error {
	out := qemu.AppendOpening(f.out, f.setup, 1)
	for _, b := range f.setup.RAM.Blocks {
		out = qemu.AppendDiscard(out, b.Name, []qemu.Range{{Start: 0, Length: b.Length}})
	}
	out = qemu.AppendPing(out, 2)
	if err := f.flush(qemu.AppendPackage(out, f.pkg)); err != nil {
		return err
	}
	for _, v := range []uint32{1, 2, 3} {
		if err := f.await(qemu.RPPong, v); err != nil {
			return err
		}
	}
	time.Sleep(200 * time.Millisecond) // the guest asks for its first pages
	return nil
}

// half sends pages until n are sent in all, in order of their place; a huge
// page's parts must stay together.
func (f *feeder) half(n int) error {
	order := make([]page, 0, len(f.data))
	for p := range f.data {
		order = append(order, p)
	}
	slices.SortFunc(order, func(a, b page) int {
		if a.block != b.block {
			return b.block - a.block
		}
		return int(int64(a.offset) - int64(b.offset))
	})
	out := qemu.AppendPartStart(f.out, f.setup.RAM.Section)
	for _, p := range order {
		unit := f.setup.RAM.Blocks[p.block].PageSize
		begun := f.sent[page{p.block, p.offset &^ (unit - 1)}]
		if f.sent[p] || len(f.sent) >= n && !begun {
			continue
		}
		f.sent[p] = true
		name := f.setup.RAM.Blocks[p.block].Name
		if data := f.data[p]; data != nil {
			out = qemu.AppendPage(out, &f.state, name, p.block, p.offset, data)
		} else {
			out = qemu.AppendZero(out, &f.state, name, p.block, p.offset)
		}
	}
	out = qemu.AppendPartEnd(out, f.setup.RAM.Section)
	if err := f.flush(qemu.AppendPing(out, 0x1000+uint32(n))); err != nil {
		return err
	}
	return f.await(qemu.RPPong, 0x1000+uint32(n))
}

// torn returns a PART that breaks off in the middle of a page.
func (f *feeder) torn() []byte {
	out := qemu.AppendPartStart(f.out, f.setup.RAM.Section)
	for p := range f.data {
		if !f.sent[p] && p.offset%f.setup.RAM.Blocks[p.block].PageSize == 0 {
			out = qemu.AppendPageHeader(out, &f.state, f.setup.RAM.Blocks[p.block].Name, p.block, p.offset)
			break
		}
	}
	return append(out, make([]byte, 1000)...)
}

// resume asks what has arrived and goes on from there.
func (f *feeder) resume() error {
	for i, b := range f.setup.RAM.Blocks {
		if err := f.flush(qemu.AppendRecvBitmap(f.out, b.Name)); err != nil {
			return err
		}
		if err := f.await(qemu.RPRecvBitmap, 0); err != nil {
			return err
		}
		for n := range b.Length / pages.Size {
			p := page{i, n * pages.Size}
			if got := f.message.Bitmap[n/8]>>(n%8)&1 == 1; got != f.sent[p] {
				return fmt.Errorf("page %v: destination has it: %v, was sent: %v", p, got, f.sent[p])
			}
		}
	}
	if err := f.flush(qemu.AppendCommand(f.out, qemu.CommandPostcopyResume, nil)); err != nil {
		return err
	}
	return f.await(qemu.RPResumeAck, 1)
}

func (f *feeder) flush(out []byte) error {
	_, err := f.conn.Write(out)
	return err
}

// await reads messages until the one wanted.
func (f *feeder) await(t qemu.RPType, value uint32) error {
	for {
		if err := f.rp.Next(&f.message); err != nil {
			return fmt.Errorf("waiting for %v: %w", t, err)
		}
		m := &f.message
		log.Printf("  < %v %d %s", m.Type, m.Value, strings.TrimSpace(fmt.Sprintf("block %d %#x+%#x", m.Block, m.Start, m.Length)))
		if m.Type == t && m.Value == value {
			return nil
		}
	}
}
