// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
	"scattergather.io/scattergather/internal/qemu/qemutest"
)

// parser reads one connection.
type parser struct {
	q    *fakeQEMU
	r    *bufio.Reader
	last int // block of the last record

	host     pages.Index // host page being received
	hostNext pages.Index
	hostLeft uint64
	hostData []byte
	discards int
}

const fakeSection = qemutest.Section

func (p *parser) run(again bool) error {
	if !again {
		if err := p.opening(); err != nil {
			return err
		}
	}
	for {
		over, err := p.item()
		if err != nil || over {
			return err
		}
	}
}

func (p *parser) bytes(n int) ([]byte, error) {
	b := make([]byte, n)
	if _, err := io.ReadFull(p.r, b); err != nil {
		return nil, fmt.Errorf("%w: %w", errCut, err)
	}
	return b, nil
}

func (p *parser) u(n int) (uint64, error) {
	b, err := p.bytes(n)
	if err != nil {
		return 0, err
	}
	var full [8]byte
	copy(full[8-n:], b)
	return binary.BigEndian.Uint64(full[:]), nil
}

func (p *parser) opening() error {
	c, err := p.bytes(len(p.q.config))
	if err != nil {
		return err
	}
	if !bytes.Equal(c, p.q.config) {
		return fmt.Errorf("configuration %x", c)
	}
	if p.q.refuseSetup {
		return errCut
	}
	return nil
}

// item reads one item of the stream.
func (p *parser) item() (over bool, err error) {
	t, err := p.u(1)
	if err != nil {
		return false, err
	}
	switch t {
	case 0x00:
		return true, p.eof()
	case 0x01:
		return false, p.start()
	case 0x02, 0x03:
		return false, p.part(t == 0x03)
	case 0x08:
		return false, p.command()
	}
	return false, fmt.Errorf("item type %#x", t)
}

func (p *parser) name() (string, error) {
	n, err := p.u(1)
	if err != nil {
		return "", err
	}
	b, err := p.bytes(int(n))
	return string(b), err
}

func (p *parser) start() error {
	want := qemu.AppendRAMStart(nil, &qemu.Setup{RAM: qemu.RAMStart{
		Section: fakeSection, Version: 4, Blocks: p.q.blocks}}, true)
	b := make([]byte, len(want)-1)
	if _, err := io.ReadFull(p.r, b); err != nil {
		return fmt.Errorf("%w: %w", errCut, err)
	}
	if !bytes.Equal(b, want[1:]) {
		return fmt.Errorf("RAM section starts with % x, want % x", b, want[1:])
	}
	return nil
}

func (p *parser) footer() error {
	b, err := p.bytes(5)
	if err != nil {
		return err
	}
	if b[0] != 0x7e || binary.BigEndian.Uint32(b[1:]) != fakeSection {
		return fmt.Errorf("footer % x", b)
	}
	return nil
}

func (p *parser) command() error {
	cmd, err := p.u(2)
	if err != nil {
		return err
	}
	n, err := p.u(2)
	if err != nil {
		return err
	}
	payload, err := p.bytes(int(n))
	if err != nil {
		return err
	}
	q := p.q
	switch qemu.Command(cmd) {
	case qemu.CommandOpenReturnPath:
	case qemu.CommandPing:
		q.mu.Lock()
		q.say(qemu.AppendPong(nil, binary.BigEndian.Uint32(payload)))
		q.mu.Unlock()
	case qemu.CommandPostcopyAdvise:
		var sum uint64
		for _, b := range q.blocks {
			sum |= b.PageSize
		}
		if binary.BigEndian.Uint64(payload) != sum || binary.BigEndian.Uint64(payload[8:]) != pages.Size {
			return fmt.Errorf("ADVISE % x", payload)
		}
	case qemu.CommandPostcopyDiscard:
		p.discards++
	case qemu.CommandPackaged:
		return p.pkg(int(binary.BigEndian.Uint32(payload)))
	case qemu.CommandRecvBitmap:
		return p.recvBitmap(string(payload[1:]))
	case qemu.CommandPostcopyResume:
		return p.resume()
	default:
		return fmt.Errorf("command %d", cmd)
	}
	return nil
}

func (p *parser) pkg(n int) error {
	data, err := p.bytes(n)
	if err != nil {
		return err
	}
	if p.discards < len(p.q.blocks) {
		return fmt.Errorf("LISTEN after %d DISCARDs: the real QEMU would hang for ever", p.discards)
	}
	if !bytes.Equal(data, fakePackage) {
		return errors.New("another package than the source's")
	}
	if p.q.refusePackage {
		return errCut
	}
	q := p.q
	q.mu.Lock()
	defer q.mu.Unlock()
	q.loaded = true
	q.say(qemu.AppendPong(nil, 3))
	for first := range q.waiting {
		q.request(first)
	}
	q.changed.Broadcast()
	return nil
}

func (p *parser) recvBitmap(name string) error {
	q := p.q
	q.mu.Lock()
	defer q.mu.Unlock()
	k, ok := q.layout.Lookup(name)
	if !ok {
		return fmt.Errorf("RECV_BITMAP of block %q", name)
	}
	first, n := q.layout.Extent(k)
	q.say(qemu.AppendRecvBitmapReply(nil, name, q.placed.AppendLittleEndian(nil, first, n)))
	return nil
}

func (p *parser) resume() error {
	q := p.q
	q.mu.Lock()
	defer q.mu.Unlock()
	q.say(qemu.AppendResumeAck(nil))
	for first := range q.waiting {
		q.request(first)
	}
	return nil
}

// part reads a section of page records.
func (p *parser) part(end bool) error {
	id, err := p.u(4)
	if err != nil {
		return err
	}
	if id != fakeSection {
		return fmt.Errorf("section %d", id)
	}
	p.q.mu.Lock()
	loaded := p.q.loaded
	p.q.mu.Unlock()
	if !loaded {
		return errors.New("pages before LISTEN")
	}
	for {
		h, err := p.u(8)
		if err != nil {
			return err
		}
		if h == 0x10 {
			if p.hostLeft > 0 {
				return fmt.Errorf("section ends within the host page at page %d", p.host)
			}
			return p.footer()
		}
		if end {
			return fmt.Errorf("record %#x in the END section", h)
		}
		if err := p.record(h); err != nil {
			return err
		}
	}
}

func (p *parser) record(h uint64) error {
	flags, offset := h&0xfff, h&^0xfff
	if flags&0x20 == 0 {
		name, err := p.name()
		if err != nil {
			return err
		}
		k, ok := p.q.layout.Lookup(name)
		if !ok {
			return fmt.Errorf("record of block %q", name)
		}
		p.last = k
	}
	if p.last < 0 {
		return errors.New("first record of a channel continues a block")
	}
	i, err := p.q.layout.Index(p.last, offset)
	if err != nil {
		return err
	}
	var data []byte
	switch flags &^ 0x20 {
	case 0x02:
		v, err := p.u(1)
		if err != nil {
			return err
		}
		if v != 0 {
			return fmt.Errorf("zero page of %d", v)
		}
		data = make([]byte, pages.Size)
	case 0x08:
		if p.q.cut() {
			_, _ = p.bytes(100)
			return errCut
		}
		if data, err = p.bytes(pages.Size); err != nil {
			return err
		}
	default:
		return fmt.Errorf("record with flags %#x", flags)
	}
	return p.page(i, data)
}

// cut tells whether the connection is to break now.
func (q *fakeQEMU) cut() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.breakAfter == 0 || q.placed.Count() < uint64(q.breakAfter) {
		return false
	}
	q.breakAfter = 0
	return true
}

// page collects host pages and places them.
func (p *parser) page(i pages.Index, data []byte) error {
	first, n := p.q.layout.Unit(i)
	if p.hostLeft == 0 {
		if i != first {
			return fmt.Errorf("host page at %d begins with page %d", first, i)
		}
		p.host, p.hostNext, p.hostLeft, p.hostData = first, first, n, p.hostData[:0]
	}
	if i != p.hostNext {
		return fmt.Errorf("page %d within the host page at %d, of which %d is next", i, p.host, p.hostNext)
	}
	p.hostData = append(p.hostData, data...)
	p.hostNext++
	p.hostLeft--
	if p.hostLeft > 0 {
		return nil
	}
	if p.q.slow > 0 {
		time.Sleep(p.q.slow)
	}
	q := p.q
	q.mu.Lock()
	defer q.mu.Unlock()
	for k := range n {
		if q.placed.Test(first + pages.Index(k)) {
			return fmt.Errorf("page %d was placed before: EEXIST", first+pages.Index(k))
		}
		q.placed.Set(first + pages.Index(k))
	}
	copy(q.mem[first*pages.Size:], p.hostData)
	q.order = append(q.order, first)
	delete(q.waiting, first)
	q.changed.Broadcast()
	return nil
}

func (p *parser) eof() error {
	q := p.q
	q.mu.Lock()
	defer q.mu.Unlock()
	q.complete = true
	q.say(qemu.AppendShut(nil, 0))
	q.changed.Broadcast()
	return nil
}
