// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"

	"scattergather.io/scattergather/internal/pages"
)

func randomBytes(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n)})
	r.Read(b)
	return b
}

func TestSealerOpensOnlyWhatItSealed(t *testing.T) {
	s := NewSealer(NewKey())
	page := randomBytes(pages.Size)
	sealed := s.Seal(nil, page, 7, 3, EncodingRaw)
	if len(sealed) != MaxSealed {
		t.Fatalf("sealed page of %d bytes, want %d", len(sealed), MaxSealed)
	}
	got, err := s.Open([]byte("x"), sealed, 7, 3, EncodingRaw)
	if err != nil || !bytes.Equal(got, append([]byte("x"), page...)) {
		t.Fatalf("does not open as it was: %v", err)
	}
	for name, open := range map[string]func() ([]byte, error){
		"other page":     func() ([]byte, error) { return s.Open(nil, sealed, 8, 3, EncodingRaw) },
		"other version":  func() ([]byte, error) { return s.Open(nil, sealed, 7, 2, EncodingRaw) },
		"other encoding": func() ([]byte, error) { return s.Open(nil, sealed, 7, 3, 1) },
		"other key":      func() ([]byte, error) { return NewSealer(NewKey()).Open(nil, sealed, 7, 3, EncodingRaw) },
		"short":          func() ([]byte, error) { return s.Open(nil, sealed[:MaxSealed-1], 7, 3, EncodingRaw) },
		"shorter":        func() ([]byte, error) { return s.Open(nil, sealed[:3], 7, 3, EncodingRaw) },
	} {
		if _, err := open(); !errors.Is(err, ErrSealed) {
			t.Errorf("%s: %v, want ErrSealed", name, err)
		}
	}
	for bit := range 8 * len(sealed) {
		if bit%61 != 0 && bit < 8*pages.Size { // all of the tag, a sample of the page
			continue
		}
		changed := bytes.Clone(sealed)
		changed[bit/8] ^= 1 << (bit % 8)
		if _, err := s.Open(nil, changed, 7, 3, EncodingRaw); !errors.Is(err, ErrSealed) {
			t.Fatalf("opens with bit %d changed", bit)
		}
	}
}

// TestNonceNamesThePage proves that no two (page, version, encoding) share a nonce.
func TestNonceNamesThePage(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		type name struct {
			i pages.Index
			v pages.Version
			e Encoding
		}
		draw := func() (n name) {
			n.i = pages.Index(rapid.Uint64().Draw(t, "i"))
			n.v = pages.Version(rapid.Uint16().Draw(t, "v"))
			n.e = Encoding(rapid.Uint8().Draw(t, "e"))
			return n
		}
		a, b := draw(), draw()
		var na, nb [12]byte
		setNonce(&na, a.i, a.v, a.e)
		setNonce(&nb, b.i, b.v, b.e)
		if (a == b) != (na == nb) {
			t.Fatalf("%v and %v: nonces %x and %x", a, b, na, nb)
		}
	})
}

func FuzzOpen(f *testing.F) {
	s := NewSealer(Key{})
	f.Add(s.Seal(nil, []byte("page"), 1, 2, EncodingRaw), uint64(1), uint16(2), byte(0))
	f.Add([]byte{}, uint64(0), uint16(0), byte(1))
	f.Fuzz(func(t *testing.T, sealed []byte, i uint64, v uint16, e byte) {
		page, err := s.Open(nil, sealed, pages.Index(i), pages.Version(v), Encoding(e))
		if err == nil && !bytes.Equal(s.Seal(nil, page, pages.Index(i), pages.Version(v), Encoding(e)), sealed) {
			t.Fatal("opens what was not sealed so")
		}
	})
}

type content struct {
	Desc
	sealed string
}

func contents(t interface{ Fatal(...any) }, each func(func(Desc, []byte) error) error) (all []content) {
	if err := each(func(d Desc, sealed []byte) error {
		all = append(all, content{d, string(sealed)})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

// body returns what a frame of b carries, as a receiver sees it.
func (b *Batch) body(stride int) []byte {
	return bytes.Clone(b.appendEntries(b.buf, stride == entrySize)[headerSize:])
}

func TestBatchRoundTrip(t *testing.T) {
	s := NewSealer(NewKey())
	rapid.Check(t, func(t *rapid.T) {
		b := NewBatch()
		b.Reset(rapid.Uint64().Draw(t, "seq"))
		n := rapid.IntRange(1, MaxBatch).Draw(t, "pages")
		for k := range n {
			i, v := pages.Index(rapid.Uint64().Draw(t, "i")), pages.Version(rapid.Uint16().Draw(t, "v"))
			size := rapid.IntRange(1, pages.Size).Draw(t, "size")
			ok := false
			switch rapid.IntRange(0, 2).Draw(t, "how") {
			case 0:
				ok = b.Append(s, i, v, 1, randomBytes(size))
			case 1:
				ok = b.AppendSealed(Desc{Index: i, Version: v, Missing: true, Length: 3}, randomBytes(size+Overhead))
			case 2:
				ok = b.AppendMissing(i, v)
			}
			if !ok || b.Len() != k+1 || b.Full() != (k+1 == MaxBatch) {
				t.Fatalf("page %d: appended %v, %d pages, full %v", k, ok, b.Len(), b.Full())
			}
		}
		for _, stride := range []int{descSize, entrySize} {
			p, err := parsePages(b.body(stride), n, stride)
			if err != nil {
				t.Fatal(err)
			}
			if size := headerSize + len(b.body(stride)) + tagSize; size > b.Bytes() || stride == entrySize && size != b.Bytes() {
				t.Fatalf("a frame of %d bytes, Bytes says %d", size, b.Bytes())
			}
			want, got := contents(t, b.Each), contents(t, p.Each)
			if len(want) != n || p.Len() != n || p.Payload() != b.Payload() {
				t.Fatalf("%d pages of %d bytes, want %d of %d", p.Len(), p.Payload(), n, b.Payload())
			}
			for k := range want {
				if want[k] != got[k] {
					t.Fatalf("page %d: %+v, want %+v", k, got[k].Desc, want[k].Desc)
				}
			}
		}
	})
}

func TestBatchRefuses(t *testing.T) {
	s, b := NewSealer(NewKey()), NewBatch()
	if b.Append(s, 0, 0, 0, nil) || b.Append(s, 0, 0, 0, make([]byte, pages.Size+1)) ||
		b.AppendSealed(Desc{}, make([]byte, Overhead)) || b.AppendSealed(Desc{}, make([]byte, MaxSealed+1)) {
		t.Error("took a page of a size that there is not")
	}
	for b.AppendMissing(0, 0) {
	}
	if b.Len() != MaxBatch || b.Append(s, 0, 0, 0, []byte{1}) || b.AppendSealed(Desc{}, make([]byte, 17)) {
		t.Errorf("took page %d", b.Len())
	}
	if b.Reset(1); b.Len() != 0 || b.Payload() != 0 {
		t.Error("not empty after Reset")
	}
}

func TestPagesRefuses(t *testing.T) {
	b := NewBatch()
	s := NewSealer(NewKey())
	b.Append(s, 1, 0, 0, []byte("one"))
	b.AppendMissing(2, 0)
	for _, stride := range []int{descSize, entrySize} {
		body := b.body(stride)
		change := func(at int, to byte) []byte {
			c := bytes.Clone(body)
			c[b.Payload()+at] = to
			return c
		}
		for name, c := range map[string]struct {
			body []byte
			n    int
		}{
			"none":             {body, 0},
			"too many":         {make([]byte, 65*stride), 65},
			"count larger":     {body, 3},
			"count smaller":    {body, 1},
			"short":            {body[:len(body)-1], 2},
			"empty":            {nil, 1},
			"length longer":    {change(11, 20), 2},
			"length shorter":   {change(11, 18), 2},
			"length only tag":  {change(11, 16), 2},
			"length huge":      {change(10, 255), 2},
			"unknown flag":     {change(13, 2), 2},
			"padding":          {change(15, 1), 2},
			"missing but long": {change(13, 1), 2},
			"missing not said": {change(stride+13, 0), 2},
		} {
			if _, err := parsePages(c.body, c.n, stride); !errors.Is(err, ErrProtocol) {
				t.Errorf("stride %d, %s: %v, want ErrProtocol", stride, name, err)
			}
		}
		if stride == entrySize {
			if _, err := parsePages(change(descSize, body[b.Payload()+descSize]^1), 2, stride); !errors.Is(err, ErrProtocol) {
				t.Errorf("tag that is not the page's: %v", err)
			}
		}
	}
	if _, err := (&Frame{Type: TypeAck}).Pages(); !errors.Is(err, ErrProtocol) {
		t.Errorf("pages of an Ack: %v", err)
	}
}

func FuzzPages(f *testing.F) {
	b := NewBatch()
	s := NewSealer(Key{})
	b.Append(s, 1, 2, 0, []byte("one"))
	b.AppendMissing(2, 0)
	f.Add(b.body(descSize), 2, false)
	f.Add(b.body(entrySize), 2, true)
	f.Fuzz(func(t *testing.T, body []byte, n int, tags bool) {
		stride := descSize
		if tags {
			stride = entrySize
		}
		p, err := parsePages(body, n&0xffff, stride)
		if err != nil {
			return
		}
		again := NewBatch()
		if err = p.Each(func(d Desc, sealed []byte) error {
			if d.Missing {
				// What a missing page says of its encoding is not kept.
				again.add(d)
			} else if !again.AppendSealed(d, sealed) {
				return errors.New("not a page")
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(again.body(stride), body) {
			t.Fatal("two forms of one frame")
		}
	})
}

func TestPagesDoNotAllocate(t *testing.T) {
	s, b, page := NewSealer(NewKey()), NewBatch(), make([]byte, pages.Size)
	store := make([]byte, 0, MaxSealed)
	key := NewKey()
	out, in := newFrameCipher(key, coverTags), newFrameCipher(key, coverTags)
	buf := make([]byte, 0, headerSize+maxPagesBody+tagSize)
	allocs := testing.AllocsPerRun(20, func() {
		b.Reset(1)
		for !b.Full() {
			b.Append(s, 1, 0, EncodingRaw, page)
		}
		frame := out.seal(b.appendEntries(b.buf, true), len(b.buf))
		buf = append(buf[:0], frame...)
		opened, err := in.open(buf, len(b.buf))
		if err != nil {
			t.Fatal(err)
		}
		p, err := parsePages(opened[headerSize:], MaxBatch, entrySize)
		if err != nil {
			t.Fatal(err)
		}
		if err = p.Each(func(d Desc, sealed []byte) error {
			store = append(store[:0], sealed...)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations for %d pages, want none", allocs, MaxBatch)
	}
	store = store[:0]
	// One page a run: AllocsPerRun rounds down what the race detector takes out of
	// the nonces' pool.
	sealed := s.Seal(nil, page, 1, 0, EncodingRaw)
	if allocs := testing.AllocsPerRun(100, func() {
		s.Seal(store, page, 1, 0, EncodingRaw)
		s.Open(store, sealed, 1, 0, EncodingRaw)
	}); allocs != 0 {
		t.Errorf("%v allocations to seal and open a page, want none", allocs)
	}
}
