// SPDX-License-Identifier: Apache-2.0

// Command capture records the migration streams of a QEMU into files. It plays
// the destination: it answers pings and says at the end that all went well. Its
// guest is a firmware of a few instructions that fills some pages and dirties
// three of them for ever, so that the streams stay small.
//
//	go run ./internal/qemu/testdata/capture -qemu qemu-system-x86_64 -label 10.0 -out internal/qemu/testdata
package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"flag"
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

// scenario is one migration to record.
type scenario struct {
	name         string
	machine      string   // default q35
	args         []string // further arguments of QEMU
	capabilities []string
	postcopy     bool // switch to post-copy after the first section
	refused      bool // the decoder is expected to give up: keep what came so far
	bitmap       bool // give the drive a dirty bitmap first
}

var scenarios = []scenario{
	{name: "precopy"},
	{name: "precopy-returnpath", capabilities: []string{"return-path"}},
	{name: "precopy-advised", capabilities: []string{"postcopy-ram"}},
	{name: "postcopy", capabilities: []string{"postcopy-ram"}, postcopy: true},
	{name: "postcopy-hugepages", capabilities: []string{"postcopy-ram"}, postcopy: true, args: []string{
		"-object", "memory-backend-memfd,id=huge,size=6M,hugetlb=on,hugetlbsize=2M",
		"-m", "6M", "-numa", "node,memdev=huge"}},
	{name: "postcopy-virtio-mem", capabilities: []string{"postcopy-ram"}, postcopy: true, args: []string{
		"-m", "2M,maxmem=64M", "-object", "memory-backend-ram,id=vm0,size=4M",
		"-device", "virtio-mem-pci,id=vmem,memdev=vm0,requested-size=0"}},
	{name: "refused-compress", capabilities: []string{"compress"}, refused: true},
	{name: "refused-ignore-shared", capabilities: []string{"x-ignore-shared"}, refused: true},
	{name: "refused-dirty-bitmaps", capabilities: []string{"dirty-bitmaps"}, bitmap: true, refused: true, args: []string{
		"-drive", "if=none,id=d0,file=null-co://,format=raw,node-name=n0"}},
	{name: "refused-dirty-bitmaps-postcopy", capabilities: []string{"dirty-bitmaps", "postcopy-ram"}, bitmap: true, refused: true, args: []string{
		"-drive", "if=none,id=d0,file=null-co://,format=raw,node-name=n0"}},
	{name: "refused-block", capabilities: []string{"block"}, refused: true, args: []string{
		"-drive", "if=none,id=d0,file=DISK,format=raw", "-device", "virtio-blk-pci,drive=d0"}},
	{name: "multifd", capabilities: []string{"multifd"}},
	{name: "multifd-old-sync", machine: "pc-q35-7.2", capabilities: []string{"multifd"}},
}

func main() {
	binary := flag.String("qemu", "qemu-system-x86_64", "QEMU to record")
	data := flag.String("L", "", "directory of its firmware, if not the default")
	label := flag.String("label", "", "suffix of the files, such as 10.0")
	out := flag.String("out", ".", "directory of the files")
	only := flag.String("only", "", "comma-separated scenarios, default all")
	flag.Parse()
	base := []string{"-accel", "tcg", "-display", "none", "-nodefaults"}
	if *data != "" {
		base = append(base, "-L", *data)
	}
	for _, s := range scenarios {
		if *only != "" && !slices.Contains(strings.Split(*only, ","), s.name) {
			continue
		}
		stream, err := record(*binary, base, s)
		if err != nil {
			log.Printf("%s: %v", s.name, err)
			continue
		}
		file := filepath.Join(*out, s.name+"-"+*label+".gz")
		if err := write(file, stream); err != nil {
			log.Fatal(err)
		}
		if s.refused || slices.Contains(s.capabilities, "multifd") {
			continue
		}
		answers, err := replay(*binary, base, s, stream)
		if err != nil {
			log.Printf("replay of %s: %v", s.name, err)
			continue
		}
		if err := write(filepath.Join(*out, "returnpath-"+s.name+"-"+*label+".gz"), answers); err != nil {
			log.Fatal(err)
		}
	}
}

// write writes a file compressed: most of a small VM is zeros.
func write(file string, data []byte) error {
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		return err
	}
	if _, err := z.Write(data); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	log.Printf("%s: %d bytes, %d in the file", file, len(data), b.Len())
	return os.WriteFile(file, b.Bytes(), 0o644)
}

// firmware returns 64 KiB of BIOS that writes a word into each of the first 160
// pages and then counts in three of them.
func firmware() []byte {
	b := make([]byte, 64<<10)
	copy(b, []byte{
		0x31, 0xc0, // xor ax,ax
		0x8e, 0xd8, // fill: mov ds,ax
		0xa3, 0x00, 0x08, // mov [0x800],ax
		0x05, 0x00, 0x01, // add ax,0x100
		0x3d, 0x00, 0xa0, // cmp ax,0xa000
		0x72, 0xf3, // jb fill
		0x31, 0xc0, 0x8e, 0xd8, // xor ax,ax; mov ds,ax
		0xff, 0x06, 0x00, 0x10, // count: inc word [0x1000]
		0xff, 0x06, 0x00, 0x20, // inc word [0x2000]
		0xff, 0x06, 0x00, 0x50, // inc word [0x5000]
		0xeb, 0xf2, // jmp count
	})
	copy(b[0xfff0:], []byte{0xea, 0x00, 0x00, 0x00, 0xf0}) // jmp f000:0000
	return b
}

func record(binary string, base []string, s scenario) ([]byte, error) {
	dir, err := os.MkdirTemp("", "capture")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	bios, disk := filepath.Join(dir, "bios"), filepath.Join(dir, "disk")
	if err := errors.Join(os.WriteFile(bios, firmware(), 0o600), os.WriteFile(disk, make([]byte, 64<<10), 0o600)); err != nil {
		return nil, err
	}
	machine := s.machine
	if machine == "" {
		machine = "q35"
	}
	args := append(slices.Clone(base), "-machine", machine, "-m", "2M", "-bios", bios,
		"-qmp", "unix:"+dir+"/qmp,server=on,wait=off")
	for _, a := range s.args {
		args = append(args, strings.ReplaceAll(a, "DISK", disk))
	}
	cmd := exec.Command(binary, args...)
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	stream, err := migrate(dir, s)
	if err != nil {
		return nil, fmt.Errorf("%w %s", err, complaints.String())
	}
	return stream, nil
}

// migrate starts a migration to a socket of our own and records it.
func migrate(dir string, s scenario) ([]byte, error) {
	m, err := dialMonitor(dir + "/qmp")
	if err != nil {
		return nil, err
	}
	time.Sleep(300 * time.Millisecond) // the firmware fills its pages
	var caps []map[string]any
	for _, c := range s.capabilities {
		caps = append(caps, map[string]any{"capability": c, "state": true})
	}
	if s.bitmap {
		if err := m.do("block-dirty-bitmap-add", map[string]any{"node": "n0", "name": "b0"}); err != nil {
			return nil, err
		}
	}
	if len(caps) > 0 {
		if err := m.do("migrate-set-capabilities", map[string]any{"capabilities": caps}); err != nil {
			return nil, err
		}
	}
	if s.postcopy {
		if err := m.do("migrate-set-parameters", map[string]any{"downtime-limit": 0, "max-bandwidth": 50000}); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("unix", dir+"/mig")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	if err := m.do("migrate", map[string]any{"uri": "unix:" + dir + "/mig"}); err != nil {
		return nil, err
	}
	c, err := l.Accept()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if slices.Contains(s.capabilities, "multifd") {
		go swallow(l)
	}
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	var stream bytes.Buffer
	end, err := receive(io.TeeReader(c, &stream), c, m, s)
	if s.refused && errors.Is(err, qemu.ErrUnsupported) {
		log.Printf("%s: %v", s.name, err)
		return stream.Bytes()[:end], nil
	} else if s.refused {
		err = fmt.Errorf("not refused: %w", err)
	}
	return stream.Bytes(), err
}

// swallow plays the multifd channels.
func swallow(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() { _, _ = io.Copy(io.Discard, c) }()
	}
}

// receive plays the destination and returns how far it came.
func receive(r io.Reader, w io.Writer, m *monitor, s scenario) (uint64, error) {
	d := qemu.NewDecoder(r, qemu.DecoderOptions{Multifd: slices.Contains(s.capabilities, "multifd")})
	var ev qemu.Event
	switched := false
	for {
		if err := d.Next(&ev); err == io.EOF {
			return d.Offset(), nil
		} else if err != nil {
			return d.Offset(), err
		}
		var out []byte
		switch ev.Kind {
		case qemu.EventCommand:
			log.Printf("  %v %x", ev.Command, ev.Payload)
			if ev.Command == qemu.CommandPing {
				out = qemu.AppendPong(out, ev.Ping)
			}
		case qemu.EventSetup, qemu.EventSync, qemu.EventRAMEnd, qemu.EventTail:
			log.Printf("  %v at %d, %d bytes", ev.Kind, d.Offset(), len(ev.Payload))
		case qemu.EventPackage:
			pings, err := qemu.PackagePings(ev.Payload)
			log.Printf("  package of %d bytes, pings %d %v", len(ev.Payload), pings, err)
			for _, p := range pings {
				out = qemu.AppendPong(out, p)
			}
		case qemu.EventRAMStart, qemu.EventSectionEnd:
			// Huge pages are sent whole, whatever the bandwidth allows: to catch
			// such a source before it has converged, it is not read meanwhile.
			if ev.Kind == qemu.EventRAMStart && d.Setup().RAM.PageSizes() == pages.Size {
				break
			}
			if s.postcopy && !switched {
				switched = true
				if err := m.do("migrate-start-postcopy", nil); err != nil {
					return d.Offset(), err
				}
			}
		case qemu.EventEnd:
			out = qemu.AppendShut(out, 0)
		}
		if len(out) > 0 {
			if _, err := w.Write(out); err != nil && ev.Kind != qemu.EventEnd {
				return d.Offset(), err
			}
		}
	}
}

// monitor is as much of a QMP client as this needs.
type monitor struct {
	c net.Conn
	r *bufio.Reader
}

func dialMonitor(path string) (*monitor, error) {
	var c net.Conn
	err := errors.New("never tried")
	for i := 0; i < 100 && err != nil; i++ {
		if c, err = net.Dial("unix", path); err != nil {
			time.Sleep(50 * time.Millisecond)
		}
	}
	if err != nil {
		return nil, err
	}
	m := &monitor{c, bufio.NewReader(c)}
	return m, m.do("qmp_capabilities", nil)
}

func (m *monitor) do(command string, args map[string]any) error {
	q := map[string]any{"execute": command}
	if args != nil {
		q["arguments"] = args
	}
	if err := json.NewEncoder(m.c).Encode(q); err != nil {
		return err
	}
	for {
		line, err := m.r.ReadBytes('\n')
		if err != nil {
			return err
		}
		var a struct {
			Return json.RawMessage
			Error  *struct{ Desc string }
		}
		if err := json.Unmarshal(line, &a); err != nil {
			return err
		}
		if a.Error != nil {
			return fmt.Errorf("%s: %s", command, a.Error.Desc)
		}
		if a.Return != nil {
			return nil
		}
	}
}
