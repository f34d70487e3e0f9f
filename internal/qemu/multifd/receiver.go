// SPDX-License-Identifier: Apache-2.0

package multifd

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

const (
	// Magic is how every channel and every packet begins.
	Magic uint32 = 0x11223344
	// PageSize is the size of a page in bytes (x86-64's target page).
	PageSize = 4096
	// MaxPages is the most pages of one packet: QEMU's MULTIFD_PACKET_SIZE of
	// 512 KiB. It cannot be configured, and each packet has room for as many
	// offsets, used or not.
	MaxPages = 512 << 10 / PageSize

	version      = 1
	helloBytes   = 64
	nameBytes    = 256
	namesAt      = 64
	offsetsAt    = namesAt + nameBytes
	headerBytes  = offsetsAt + 8*MaxPages
	maxBlocks    = 4096 // more block names than that on one channel are refused
	defaultBytes = 128 << 10
)

// Flags are those of a packet.
type Flags uint32

const (
	// FlagSync says that a synchronisation point follows the packet's pages.
	FlagSync Flags = 1 << 0

	flagCompression Flags = 31 << 1
	flagDeviceState Flags = 32 << 1
)

var compressions = map[Flags]string{1 << 1: "zlib", 2 << 1: "zstd", 4 << 1: "qpl", 8 << 1: "uadk", 16 << 1: "qatzip"}

// Sync tells whether a synchronisation point follows the packet's pages.
func (f Flags) Sync() bool { return f&FlagSync != 0 }

// Hello is how a channel introduces itself.
type Hello struct {
	// ID is the channel's number, from 0.
	ID uint8
	// UUID is that of the VM, all zero when it has none.
	UUID [16]byte
}

// Packet is what one packet says about its pages. [Receiver.Next] overwrites it
// and keeps its memory.
type Packet struct {
	// Num is the packet's number, counted over all channels of the source.
	Num   uint64
	Flags Flags
	// BlockName is the RAM block all pages lie in, empty when there are none.
	BlockName string
	// Normal are the offsets in bytes of the pages whose data follows, in the
	// order in which [Receiver.Page] returns it.
	Normal []uint64
	// Zero are the offsets in bytes of the pages that are all zeros.
	Zero []uint64
}

// Options of a receiver; the zero value is a good choice.
type Options struct {
	// BufferBytes is the most that is read at once, and the receiver's only
	// memory of note. 0 means 128 KiB.
	BufferBytes int
}

// Receiver reads one channel. It has one user at a time.
type Receiver struct {
	r       *bufio.Reader
	greeted bool
	names   map[string]string // interned, so that a packet allocates nothing
	packets uint64
	pages   int // of the current packet, not taken yet
	held    int // bytes handed out by Page, still in r
	err     error
}

// NewReceiver returns a receiver that reads r, which the caller owns: deadlines
// and closing are the caller's.
func NewReceiver(r io.Reader, o Options) *Receiver {
	n := o.BufferBytes
	if n <= 0 {
		n = defaultBytes
	}
	return &Receiver{r: bufio.NewReaderSize(r, max(n, headerBytes, PageSize)), names: make(map[string]string)}
}

// Hello reads the channel's first packet. It must be called once, before Next.
func (r *Receiver) Hello() (Hello, error) {
	p, err := r.r.Peek(helloBytes)
	if err != nil {
		return Hello{}, fmt.Errorf("multifd hello of %d bytes, got %d: %w", helloBytes, len(p), unexpected(err))
	}
	if err := checkMagic(p); err != nil {
		return Hello{}, fmt.Errorf("multifd hello: %w", err)
	}
	var h Hello
	copy(h.UUID[:], p[8:24])
	h.ID = p[24]
	r.greeted = true
	_, _ = r.r.Discard(helloBytes) // peeked, so that it cannot fail
	return h, nil
}

// Next reads the head of the next packet; its pages follow by Page. It returns
// [io.EOF] when the source has closed the channel between packets. Any other error
// is final; it wraps [errors.ErrUnsupported] for what a source may send but this
// package does not decode, and [io.ErrUnexpectedEOF] if the channel ended early.
func (r *Receiver) Next(p *Packet) error {
	if r.err == nil {
		r.err = r.next(p)
		if r.err != nil && r.err != io.EOF {
			r.err = fmt.Errorf("multifd packet %d of the channel: %w", r.packets, r.err)
		}
	}
	return r.err
}

func (r *Receiver) next(p *Packet) error {
	switch {
	case !r.greeted:
		return errors.New("read before the hello")
	case r.pages > 0:
		return fmt.Errorf("read with %d pages of the one before not taken", r.pages)
	}
	r.release()
	head, err := r.r.Peek(headerBytes)
	if err == io.EOF && len(head) == 0 {
		return io.EOF
	}
	// What a packet is tells before all of it is here: one of device state is shorter.
	if len(head) >= 12 {
		if err := r.kind(p, head); err != nil {
			return err
		}
	}
	if err != nil {
		return fmt.Errorf("head of %d bytes, got %d: %w", headerBytes, len(head), unexpected(err))
	}
	if err := r.head(p, head); err != nil {
		return err
	}
	_, _ = r.r.Discard(headerBytes) // peeked
	r.pages = len(p.Normal)
	r.packets++
	return nil
}

// kind checks what all kinds of packets begin with.
func (r *Receiver) kind(p *Packet, head []byte) error {
	if err := checkMagic(head); err != nil {
		return err
	}
	p.Flags = Flags(binary.BigEndian.Uint32(head[8:]))
	if p.Flags&flagDeviceState != 0 {
		return fmt.Errorf("device state travels on multifd channels; detach the vfio device or turn its x-migration-multifd-transfer off: %w", errors.ErrUnsupported)
	}
	if c := p.Flags & flagCompression; c != 0 {
		name, ok := compressions[c]
		if !ok {
			name = fmt.Sprintf("%#x", uint32(c))
		}
		return fmt.Errorf("compressed with %s; set the parameter multifd-compression to none: %w", name, errors.ErrUnsupported)
	}
	if unknown := p.Flags &^ FlagSync; unknown != 0 {
		return fmt.Errorf("unknown flags %#x: %w", uint32(unknown), errors.ErrUnsupported)
	}
	return nil
}

func (r *Receiver) head(p *Packet, head []byte) error {
	room, normal, size := binary.BigEndian.Uint32(head[12:]), binary.BigEndian.Uint32(head[16:]), binary.BigEndian.Uint32(head[20:])
	p.Num = binary.BigEndian.Uint64(head[24:])
	zero := binary.BigEndian.Uint32(head[32:]) // reserved, and zero, before QEMU 9.0
	switch {
	case room > MaxPages:
		return fmt.Errorf("room for %d pages, the most is %d", room, MaxPages)
	case normal > room || zero > room-normal:
		return fmt.Errorf("%d pages and %d of zeros with room for %d", normal, zero, room)
	// Without pages QEMU up to 8.2 leaves the size and the name of the packet before.
	case normal > 0 && size != normal*PageSize:
		return fmt.Errorf("%d bytes of data for %d pages of %d bytes", size, normal, PageSize)
	}
	p.BlockName = ""
	if normal+zero > 0 {
		var err error
		if p.BlockName, err = r.name(head[namesAt:offsetsAt]); err != nil {
			return err
		}
	}
	var err error
	if p.Normal, err = offsets(p.Normal[:0], head[offsetsAt:], int(normal)); err != nil {
		return err
	}
	p.Zero, err = offsets(p.Zero[:0], head[offsetsAt+8*normal:], int(zero))
	return err
}

// name interns the name in field, which is padded with zeros.
func (r *Receiver) name(field []byte) (string, error) {
	n := bytes.IndexByte(field, 0)
	switch {
	case n < 0:
		return "", fmt.Errorf("block name %q... has no end", field[:32])
	case n == 0:
		return "", errors.New("pages without a block name")
	}
	if s, ok := r.names[string(field[:n])]; ok {
		return s, nil
	}
	if len(r.names) == maxBlocks {
		return "", fmt.Errorf("more than %d different block names", maxBlocks)
	}
	s := string(field[:n])
	r.names[s] = s
	return s, nil
}

func offsets(dst []uint64, src []byte, n int) ([]uint64, error) {
	for i := range n {
		o := binary.BigEndian.Uint64(src[8*i:])
		if o%PageSize != 0 || o>>63 != 0 {
			return dst, fmt.Errorf("page %d at offset %#x, which no page has", i, o)
		}
		dst = append(dst, o)
	}
	return dst, nil
}

// Page returns the data of the packet's next normal page, PageSize bytes that are
// the receiver's and valid until the next call of Page or Next. It must be called
// once for each of Packet.Normal; one call more is an error.
func (r *Receiver) Page() ([]byte, error) {
	if r.err != nil {
		return nil, r.err
	}
	if r.pages == 0 {
		return nil, errors.New("multifd: all pages of the packet are taken")
	}
	r.release()
	p, err := r.r.Peek(PageSize)
	if err != nil {
		r.err = fmt.Errorf("multifd packet %d of the channel: data, %d pages missing: %w", r.packets-1, r.pages, unexpected(err))
		return nil, r.err
	}
	r.pages--
	r.held = PageSize
	return p, nil
}

// Buffered returns how many bytes have arrived and are not taken yet: with fewer
// than PageSize the next call may have to wait.
func (r *Receiver) Buffered() int { return r.r.Buffered() - r.held }

// release gives back what Page has handed out.
func (r *Receiver) release() {
	_, _ = r.r.Discard(r.held) // peeked
	r.held = 0
}

func checkMagic(p []byte) error {
	if m := binary.BigEndian.Uint32(p); m != Magic {
		return fmt.Errorf("magic %#08x instead of %#08x", m, Magic)
	}
	if v := binary.BigEndian.Uint32(p[4:]); v != version {
		return fmt.Errorf("version %d, known is %d: %w", v, version, errors.ErrUnsupported)
	}
	return nil
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
