// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// testDestination plays the gather's side of the conversation and keeps books.
type testDestination struct {
	t    tb
	node wire.Identity
	addr string
	// credit is what it grants at first, in sealed bytes, and grants again for all
	// that it stores.
	credit uint64
	// readyAfter delays Ready; refuse refuses instead.
	readyAfter time.Duration
	refuse     error
	// refuseCommits is how many commits it refuses at first.
	refuseCommits int
	delay         func()
	// onFrame sees every frame before it is served; an error cuts the connection.
	onFrame func(*wire.Lane, *wire.Frame) error
	// onStored sees every data page that arrived.
	onStored func(urgent bool, i pages.Index)
	// loadedAfter delays Loaded.
	loadedAfter time.Duration

	mu        sync.Mutex
	conn      *wire.Conn
	setup     *wire.Setup
	sealer    *wire.Sealer
	layout    *pages.Layout
	pageMap   *pages.Map
	store     map[wire.PageRef][]byte
	pkg       []byte
	pkgWhole  bool
	atSwitch  pages.Counts
	applied   uint64
	granted   uint64
	phases    []wire.Phase
	aborted   string
	committed bool
	records   int
	urgent    int
	errs      []error
}

func (b *testbed) destination() *testDestination {
	d := &testDestination{t: b.t, node: "destination", credit: 1 << 40, store: map[wire.PageRef][]byte{}}
	d.addr = b.listen(d.node, d.serve)
	return d
}

func (d *testDestination) peer() Peer {
	return Peer{Name: string(d.node), Identity: d.node, Address: d.addr}
}

func (d *testDestination) serve(c *wire.Conn) {
	d.mu.Lock()
	d.conn, d.granted = c, d.credit
	resume := &wire.Resume{Known: d.setup != nil, Applied: d.applied}
	loaded, committed := d.pkgWhole, d.committed
	d.mu.Unlock()
	if err := c.Control().Send(0, resume); err != nil {
		return
	}
	if resume.Known {
		_ = c.Control().Send(0, &wire.Credit{Bytes: d.credit})
		if loaded {
			_ = c.Control().Send(0, wire.Loaded{})
		}
		if committed {
			_ = c.Control().Send(0, &wire.Committed{Pages: d.layout.Pages()})
		}
	}
	err := everyLane(c, func(l *wire.Lane, f *wire.Frame) error {
		if d.onFrame != nil {
			if err := d.onFrame(l, f); err != nil {
				return err
			}
		}
		if f.Type == wire.TypePages {
			return d.storePages(c, l, f)
		}
		return d.control(c, f)
	})
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		d.errs = append(d.errs, err)
	}
}

// control applies a journalled frame and confirms it.
func (d *testDestination) control(c *wire.Conn, f *wire.Frame) error {
	d.mu.Lock()
	if f.Seq <= d.applied {
		d.mu.Unlock()
		return fmt.Errorf("frame %d came again after %d was applied", f.Seq, d.applied)
	}
	if f.Seq != d.applied+1 {
		d.mu.Unlock()
		return fmt.Errorf("frame %d after %d", f.Seq, d.applied)
	}
	reply, err := d.apply(f)
	d.applied = f.Seq
	d.mu.Unlock()
	if err != nil {
		return err
	}
	if err := c.Control().Send(f.Seq, wire.Applied{}); err != nil {
		return err
	}
	for _, m := range reply {
		if _, ok := m.(wire.Ready); ok {
			time.Sleep(d.readyAfter)
		}
		if _, ok := m.(wire.Loaded); ok {
			time.Sleep(d.loadedAfter)
		}
		if err := c.Control().Send(f.Seq, m); err != nil {
			return err
		}
	}
	return nil
}

func (d *testDestination) apply(f *wire.Frame) (reply []wire.Message, err error) {
	switch f.Type {
	case wire.TypeSetup:
		if d.setup, err = wire.ParseSetup(f.Body); err != nil {
			return nil, err
		}
		if d.refuse != nil {
			return []wire.Message{&wire.Error{Code: wire.CodeIncompatible, Text: d.refuse.Error()}}, nil //nolint:nilerr // the refusal is the reply
		}
		d.sealer = wire.NewSealer(d.setup.Key)
		if d.layout, err = pages.NewLayout(d.setup.Blocks); err != nil {
			return nil, err
		}
		d.pageMap = pages.NewMap(d.layout)
		return []wire.Message{wire.Ready{}, &wire.Credit{Bytes: d.credit}}, nil
	case wire.TypeRecords:
		list, err := wire.ParseRecords(nil, f.Body)
		if err != nil {
			return nil, err
		}
		d.records += len(list)
		for _, r := range list {
			if _, err := d.pageMap.Apply(r); err != nil {
				return nil, err
			}
		}
		return nil, nil
	case wire.TypePackage:
		return d.applyPackage(f)
	case wire.TypeState:
		s, err := wire.ParseState(f.Body)
		d.phases = append(d.phases, s.Phase)
		return nil, err
	case wire.TypeCommit:
		return d.applyCommit(f)
	case wire.TypeAbort:
		a, err := wire.ParseAbort(f.Body)
		d.aborted = a.Reason
		return nil, errors.Join(err, errors.New("aborted by the source"))
	}
	return nil, fmt.Errorf("destination got frame type %d", f.Type)
}

func (d *testDestination) applyPackage(f *wire.Frame) ([]wire.Message, error) {
	p, err := wire.ParsePackage(f.Body)
	if err != nil {
		return nil, err
	}
	if p.Offset != uint64(len(d.pkg)) {
		return nil, fmt.Errorf("package at %d, have %d", p.Offset, len(d.pkg))
	}
	if d.pkg = append(d.pkg, p.Data...); uint64(len(d.pkg)) < p.Total {
		return nil, nil
	}
	d.pkgWhole, d.atSwitch = true, d.pageMap.Counts()
	return []wire.Message{wire.Loaded{}}, nil
}

func (d *testDestination) applyCommit(f *wire.Frame) ([]wire.Message, error) {
	m, err := wire.ParseCommit(f.Body)
	if err != nil {
		return nil, err
	}
	if d.refuseCommits > 0 {
		d.refuseCommits--
		return []wire.Message{&wire.Error{Code: wire.CodeIncomplete, Text: "not yet"}}, nil
	}
	c := d.pageMap.Counts()
	if have := d.layout.Pages() - c.Absent; have != m.Pages || !d.pkgWhole {
		return nil, fmt.Errorf("commit to %d pages, have %d, package %v", m.Pages, have, d.pkgWhole)
	}
	d.committed = true
	return []wire.Message{&wire.Committed{Pages: m.Pages}}, nil
}

// storePages opens a batch, keeps what the map takes, and acknowledges it.
func (d *testDestination) storePages(c *wire.Conn, l *wire.Lane, f *wire.Frame) error {
	p, err := f.Pages()
	if err != nil {
		return err
	}
	if d.delay != nil && l.Kind() == wire.LaneBulk {
		d.delay()
	}
	urgent := l.Kind() == wire.LaneUrgent
	d.mu.Lock()
	err = p.Each(func(desc wire.Desc, sealed []byte) error {
		plain, err := d.sealer.Open(nil, sealed, desc.Index, desc.Version, desc.Encoding)
		if err != nil {
			return err
		}
		fresh, err := d.pageMap.Store(desc.Index, desc.Version)
		if err != nil {
			return err
		}
		if fresh {
			d.store[wire.PageRef{Index: desc.Index, Version: desc.Version}] = plain
		}
		if !urgent {
			d.granted += uint64(len(sealed))
		} else {
			d.urgent++
		}
		if d.onStored != nil {
			d.onStored(urgent, desc.Index)
		}
		return nil
	})
	granted := d.granted
	d.mu.Unlock()
	if err != nil {
		return err
	}
	return errors.Join(l.Send(f.Seq, wire.Ack{}), c.Control().Send(0, &wire.Credit{Bytes: granted}))
}

// want asks the source for pages.
func (d *testDestination) want(list ...pages.Index) error {
	d.mu.Lock()
	c := d.conn
	d.mu.Unlock()
	return c.Urgent().Send(0, wire.Want(list))
}

// told returns the reason of the source's Abort, or "".
func (d *testDestination) told() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.aborted
}

// verify compares every page that the destination can reach with the guest's memory.
func (d *testDestination) verify(mem memory, unsent map[pages.Index]bool, lenders ...*testLender) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.committed {
		d.t.Fatal("the destination was never asked to commit")
	}
	wrong := 0
	var buf [pages.Size]byte
	for i := range pages.Index(len(mem)) {
		gen := mem[i]
		if unsent[i] {
			gen = 0
		}
		got, err := d.read(i, lenders)
		if err != nil {
			d.t.Errorf("page %d: %v", i, err)
			wrong++
		} else if string(got) != string(content(buf[:], i, gen)) {
			h, v := d.pageMap.At(i)
			d.t.Errorf("page %d (%v, version %d) is not generation %d", i, h, v, gen)
			wrong++
		}
		if wrong > 5 {
			d.t.FailNow()
		}
	}
}

func (d *testDestination) read(i pages.Index, lenders []*testLender) ([]byte, error) {
	h, v := d.pageMap.At(i)
	ref := wire.PageRef{Index: i, Version: v}
	switch h {
	case pages.Zero:
		return make([]byte, pages.Size), nil
	case pages.Local:
		if p, ok := d.store[ref]; ok {
			return p, nil
		}
		return nil, fmt.Errorf("local in version %d, but not in the store", v)
	}
	k, ok := h.Intermediary()
	if !ok {
		return nil, fmt.Errorf("lies with %v", h)
	}
	for _, l := range lenders {
		if l.node != d.setup.Holders[k].Identity {
			continue
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		sealed, ok := l.held[ref]
		if !ok {
			return nil, fmt.Errorf("%s does not hold version %d", l.node, v)
		}
		return d.sealer.Open(nil, sealed, i, v, wire.EncodingRaw)
	}
	return nil, fmt.Errorf("no such lender: %v", h)
}
