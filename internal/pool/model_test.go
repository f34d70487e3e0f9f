// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/wire"
)

// modelSession is a naive session: what Pool must behave like.
type modelSession struct {
	extents uint64
	w       *Writer
	r       *Reader
	held    map[pages.Index]pages.Version
}

const modelBudget = 6*extentCost + 3*sessionFixed

type model map[wire.MigrationID]*modelSession

func (m model) reserved() (sum uint64) {
	for _, s := range m {
		sum += sessionFixed + s.extents*extentCost
	}
	return sum
}

// put tells whether the pages of a batch fit, and keeps them if so.
func (s *modelSession) put(ps []Page) bool {
	want := maps.Clone(s.held)
	fresh := map[int]bool{}
	for k, p := range ps {
		if v, ok := s.held[p.Index]; !ok || v < p.Version {
			fresh[k] = true
		}
		if v, ok := want[p.Index]; !ok || v < p.Version {
			want[p.Index] = p.Version
		}
	}
	// Pages are written before older versions are given up, while there is room.
	room := s.extents*extentSlots - uint64(len(s.held))
	if uint64(len(fresh)) > room {
		for k := range fresh {
			if _, ok := s.held[ps[k].Index]; ok {
				delete(s.held, ps[k].Index)
				room++
			}
		}
		if uint64(len(fresh)) > room {
			return false
		}
	}
	s.held = want
	return true
}

// TestPoolAgainstModel compares everything that can be seen of a pool, and the memory
// that its files take, with a model, across restarts.
func TestPoolAgainstModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		dir := shm(t)
		c := config(dir)
		c.BudgetBytes = modelBudget
		p := open(t, c)
		defer func() {
			p.Close()
			os.RemoveAll(dir)
		}()
		m := model{}
		pick := func() (wire.MigrationID, *modelSession) {
			id := wire.MigrationID{byte(rapid.IntRange(1, 3).Draw(rt, "migration"))}
			return id, m[id]
		}
		rt.Repeat(map[string]func(*rapid.T){
			"reserve": func(rt *rapid.T) { modelReserve(rt, p, m, pick) },
			"put":     func(rt *rapid.T) { modelPut(rt, pick) },
			"free":    func(rt *rapid.T) { modelFree(rt, pick) },
			"dissolve": func(rt *rapid.T) {
				if id, s := pick(); s != nil {
					if err := s.r.Dissolve(); err != nil {
						rt.Fatal(err)
					}
					delete(m, id)
				}
			},
			"restart": func(rt *rapid.T) {
				if err := p.Close(); err != nil {
					rt.Fatal(err)
				}
				p = open(t, c)
				for id, s := range m {
					s.connect(rt, p, id, s.extents*extentBody)
				}
			},
			"": func(rt *rapid.T) { modelCompare(rt, p, m, dir) },
		})
	})
}

func (s *modelSession) connect(rt *rapid.T, p *Pool, id wire.MigrationID, bytes uint64) {
	var err error
	if s.w, err = p.Reserve(id, source, wire.Reserve{Bytes: bytes, Reader: destination}); err != nil {
		rt.Fatal(err)
	}
	if s.r, err = p.Attach(id, destination, s.w.Session()); err != nil {
		rt.Fatal(err)
	}
}

func modelReserve(rt *rapid.T, p *Pool, m model, pick func() (wire.MigrationID, *modelSession)) {
	want := rapid.Uint64Range(1, 5).Draw(rt, "extents")
	id, s := pick()
	free := modelBudget - m.reserved()
	if s == nil {
		if free < sessionFixed+extentCost {
			_, err := p.Reserve(id, source, wire.Reserve{Bytes: want * extentBody, Reader: destination})
			if !errors.Is(err, ErrBudget) {
				rt.Fatalf("error %v, want ErrBudget", err)
			}
			return
		}
		s = &modelSession{extents: min(want, (free-sessionFixed)/extentCost), held: map[pages.Index]pages.Version{}}
		m[id] = s
	} else if want > s.extents {
		s.extents = min(want, s.extents+free/extentCost)
	} else {
		return // how far it can shrink depends on where its pages lie
	}
	s.connect(rt, p, id, want*extentBody)
	if got := s.w.Granted(); got != min(want, s.extents)*extentBody {
		rt.Fatalf("granted %d bytes, want %d", got, s.extents*extentBody)
	}
}

func modelPut(rt *rapid.T, pick func() (wire.MigrationID, *modelSession)) {
	_, s := pick()
	if s == nil {
		return
	}
	first := pages.Index(rapid.IntRange(0, 6000).Draw(rt, "first"))
	version := pages.Version(rapid.IntRange(0, 3).Draw(rt, "version"))
	for range rapid.IntRange(1, 20).Draw(rt, "batches") {
		ps := run(first, rapid.IntRange(1, wire.MaxBatch).Draw(rt, "pages"), version)
		if rapid.Bool().Draw(rt, "twice") {
			ps[len(ps)-1] = page(first, version+1)
		}
		err := s.w.Put(ps)
		if fits := s.put(ps); fits && err != nil || !fits && !errors.Is(err, ErrFull) {
			rt.Fatalf("error %v where the model has room: %v", err, fits)
		}
		first += pages.Index(len(ps))
	}
}

func modelFree(rt *rapid.T, pick func() (wire.MigrationID, *modelSession)) {
	_, s := pick()
	if s == nil {
		return
	}
	first := pages.Index(rapid.IntRange(0, 7000).Draw(rt, "first"))
	count := rapid.Uint64Range(0, 3000).Draw(rt, "count")
	if rapid.Bool().Draw(rt, "all") {
		count = 1 << 62
	}
	var want uint64
	for i := range s.held {
		if i >= first && uint64(i-first) < count {
			delete(s.held, i)
			want++
		}
	}
	if got, err := s.r.Free(first, count); err != nil || got != want {
		rt.Fatalf("freed %d, error %v; want %d", got, err, want)
	}
}

func modelCompare(rt *rapid.T, p *Pool, m model, dir string) {
	st := p.Stats()
	if len(st.Sessions) != len(m) || st.Reserved != m.reserved() || st.Reserved > st.Budget {
		rt.Fatalf("%d sessions that reserve %d of %d, want %d that reserve %d",
			len(st.Sessions), st.Reserved, st.Budget, len(m), m.reserved())
	}
	if got := blocks(rt, dir); got != st.Used || st.Used+st.Index > st.Reserved+1<<16 {
		rt.Fatalf("files take %d bytes, the pool counts %d and %d of index, reserved are %d", got, st.Used, st.Index, st.Reserved)
	}
	for _, one := range st.Sessions {
		s := m[one.Migration]
		if one.Pages != uint64(len(s.held)) || one.Capacity != s.extents*extentSlots {
			rt.Fatalf("%d of %d pages, want %d of %d", one.Pages, one.Capacity, len(s.held), s.extents*extentSlots)
		}
		for i, v := range s.held {
			if i%97 == 0 { // reading all would take most of the test's time
				wantPages(rt, s.r, i, 1, int(v))
				wantPages(rt, s.r, i+100_000, 1, -1)
			}
		}
	}
}

// TestLanesAtOnce lets lanes put overlapping pages in several versions while others
// read and free them. A reader gets the bytes of just the version that it asked for,
// or nothing.
func TestLanesAtOnce(t *testing.T) {
	dir := shm(t)
	p := open(t, config(dir))
	w := reserve(t, p, 8<<20)
	r := attach(t, p, w.Session())
	const universe, versions, rounds = 1500, 6, 120
	want := make([][]byte, universe*versions)
	for k := range want {
		want[k] = content(nil, pages.Index(k/versions), pages.Version(k%versions))
	}
	errs := make(chan error, 8)
	var lanes sync.WaitGroup
	lane := func(seed uint64, step func(*rand.Rand, []Page) error) {
		lanes.Go(func() {
			rng := rand.New(rand.NewPCG(seed, 0))
			ps := make([]Page, wire.MaxBatch)
			for range rounds {
				first := rng.IntN(universe - len(ps))
				for k := range ps {
					ps[k] = Page{Index: pages.Index(first + k), Version: pages.Version(rng.IntN(versions))}
				}
				if err := step(rng, ps); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	for seed := range uint64(3) {
		lane(seed, func(_ *rand.Rand, ps []Page) error {
			for k := range ps {
				ps[k].Sealed = want[int(ps[k].Index)*versions+int(ps[k].Version)]
				ps[k].Encoding = encodingOf(ps[k].Index)
			}
			return w.Put(ps)
		})
		buf := make([]byte, len(getBuffer))
		lane(10+seed, func(_ *rand.Rand, ps []Page) error {
			if err := r.Get(ps, buf); err != nil {
				return err
			}
			for _, p := range ps {
				if p.Sealed != nil && !slices.Equal(p.Sealed, want[int(p.Index)*versions+int(p.Version)]) {
					return fmt.Errorf("page %d in version %d holds other bytes than were put", p.Index, p.Version)
				}
			}
			return nil
		})
	}
	lane(20, func(rng *rand.Rand, ps []Page) error {
		_, err := r.Free(ps[0].Index, uint64(rng.IntN(500)))
		return err
	})
	lanes.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	if st := p.Stats(); blocks(t, dir) != st.Used {
		t.Errorf("files take %d bytes, the pool counts %d", blocks(t, dir), st.Used)
	}
	// Whatever came out of it, a restart finds the same.
	before := p.Stats().Pages
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if after := open(t, config(dir)).Stats().Pages; after != before {
		t.Errorf("%d pages after a restart, want %d", after, before)
	}
}

// TestDissolveMeetsLanes ends a session under lanes that use it.
func TestDissolveMeetsLanes(t *testing.T) {
	for range 20 {
		p := open(t, config(shm(t)))
		w := reserve(t, p, 8<<20)
		r := attach(t, p, w.Session())
		var lanes sync.WaitGroup
		errs := make(chan error, 3)
		ps, buf := run(0, wire.MaxBatch, 0), make([]byte, len(getBuffer))
		loop := func(step func(k int) error) {
			lanes.Go(func() {
				for k := 0; ; k++ {
					if err := step(k); err != nil {
						errs <- err
						return
					}
				}
			})
		}
		loop(func(k int) error { return w.Put(run(pages.Index(k%2000), 8, pages.Version(k))) })
		loop(func(int) error { return r.Get(slices.Clone(ps), buf) })
		loop(func(int) error { _, err := r.Free(0, 5000); return err })
		if err := r.Dissolve(); err != nil {
			t.Fatal(err)
		}
		lanes.Wait()
		for range 3 {
			wantError(t, <-errs, ErrGone)
		}
	}
}
