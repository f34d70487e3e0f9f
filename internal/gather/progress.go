// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"fmt"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"scattergather.io/scattergather/internal/flow"
	"scattergather.io/scattergather/internal/pages"
)

// Phase is how far a gather is, for people and programs that watch.
type Phase uint8

// The phases in their order.
const (
	// Waiting: the source has not described the VM yet.
	Waiting Phase = iota
	// Opening: the destination QEMU is being asked whether it accepts the VM.
	Opening
	// Precopy: pages may come, the guest runs at the source.
	Precopy
	// Switching: the device state is on its way into the destination QEMU.
	Switching
	// Gathering: the guest runs here and the source is still needed.
	Gathering
	// Released: the source is not needed any more, intermediaries are.
	Released
	// Dissolving: QEMU has every page, intermediaries are told to forget.
	Dissolving
	// Done: it is all over.
	Done
	// Failed: the gather ended before the guest ran here, or was interrupted.
	Failed
)

var phaseNames = [...]string{"waiting", "opening", "precopy", "switching", "gathering", "released", "dissolving", "done", "failed"}

// String returns the phase's name in lower case.
func (p Phase) String() string {
	if int(p) < len(phaseNames) {
		return phaseNames[p]
	}
	return fmt.Sprintf("phase %d", uint8(p))
}

// MarshalText makes a phase readable in JSON.
func (p Phase) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText is the inverse of MarshalText.
func (p *Phase) UnmarshalText(text []byte) error {
	for i, name := range phaseNames {
		if name == string(text) {
			*p = Phase(i)
			return nil
		}
	}
	return fmt.Errorf("unknown phase %.40q", text)
}

// PageCounts says where the VM's pages are.
type PageCounts struct {
	Total uint64 `json:"total"`
	// Absent pages are not known here; after the source was released they are zero.
	Absent uint64 `json:"absent"`
	// Zero pages are known to be zero and not placed yet.
	Zero uint64 `json:"zero"`
	// Stored pages came from the source and wait here.
	Stored uint64 `json:"stored"`
	// Remote pages are at intermediaries.
	Remote uint64 `json:"remote"`
	// Placed pages are in the guest's memory.
	Placed uint64 `json:"placed"`
}

// Leg is the traffic from one intermediary.
type Leg struct {
	Name      string `json:"name"`
	Connected bool   `json:"connected"`
	// Reason says why it is not connected.
	Reason string `json:"reason,omitempty"`
	// Bytes of page frames received, and their rate in bytes a second.
	Bytes uint64  `json:"bytes"`
	Rate  float64 `json:"rate"`
	// UrgentPages were fetched because a guest waited for them.
	UrgentPages uint64 `json:"urgentPages"`
	// Left is the number of pages that it still holds and QEMU does not have.
	Left uint64 `json:"left"`
	// Outstanding bytes are asked for by prepaging and have not come.
	Outstanding int `json:"outstanding"`
	// QueueMicros is the queueing delay of prepaging on the way here.
	QueueMicros int64 `json:"queueMicros"`
}

// Faults tells of the pages that the guest waited for. Latencies are in microseconds
// from QEMU's request to the page being written into its stream.
type Faults struct {
	// Requests of QEMU, those for pages under way included.
	Requests uint64 `json:"requests"`
	// Served host pages, and Waiting ones.
	Served    uint64 `json:"served"`
	Waiting   int    `json:"waiting"`
	P50Micros int64  `json:"p50Micros"`
	P99Micros int64  `json:"p99Micros"`
	MaxMicros int64  `json:"maxMicros"`
}

// Progress is a snapshot of a gather.
type Progress struct {
	Phase Phase `json:"phase"`
	// Switched is true from the moment on which only this gather can save the guest.
	Switched bool `json:"switched"`
	// Stalled says why nothing moves, or not everything; empty while all is well.
	Stalled         string     `json:"stalled,omitempty"`
	SourceConnected bool       `json:"sourceConnected"`
	Committed       bool       `json:"committed"`
	Pages           PageCounts `json:"pages"`
	// DirectBytes of sealed pages came from the source, GatheredBytes of frames from
	// intermediaries; rates are in bytes a second over the last second.
	DirectBytes    uint64  `json:"directBytes"`
	DirectRate     float64 `json:"directRate"`
	GatheredBytes  uint64  `json:"gatheredBytes"`
	GatheredRate   float64 `json:"gatheredRate"`
	Intermediaries []Leg   `json:"intermediaries"`
	// PlaceRate is the rate at which pages go into the guest's memory.
	PlaceRate float64 `json:"placeRate"`
	// Left is the expected time until QEMU has every page; negative while unknown.
	Left   time.Duration `json:"left"`
	Faults Faults        `json:"faults"`
}

// Result tells how a gather went.
type Result struct {
	// Started is when the source connected, Switched when its device state was here,
	// Loaded when QEMU had taken that, Committed when the source was not needed any
	// more, Gathered when QEMU had every page. Zero for what did not happen in this
	// process.
	Started   time.Time `json:"started"`
	Switched  time.Time `json:"switched"`
	Loaded    time.Time `json:"loaded"`
	Committed time.Time `json:"committed"`
	Gathered  time.Time `json:"gathered"`
	// GatherSeconds is Gathered - Started.
	GatherSeconds float64 `json:"gatherSeconds"`
	DirectBytes   uint64  `json:"directBytes"`
	// IntermediaryBytes came from each intermediary, by name.
	IntermediaryBytes map[string]uint64 `json:"intermediaryBytes"`
	Pages             PageCounts        `json:"pages"`
	Faults            Faults            `json:"faults"`
	// Recoveries counts how often QEMU's stream was restored.
	Recoveries int `json:"recoveries"`
}

// stats is what the engine counts; Engine.mu guards it.
type stats struct {
	started, switched, loaded, committed, gathered time.Time

	direct, into, gatheredIn flow.Meter
	directAt                 time.Time // of the last direct page
	requests, placed, served uint64
	recoveries               int
	latency                  *hdrhistogram.Histogram
}

type legStats struct {
	in     flow.Meter
	urgent uint64
}

// maxLatency is the longest latency that the histogram tells apart, in microseconds.
const maxLatency = 60_000_000

func newStats() stats { return stats{latency: hdrhistogram.New(1, maxLatency, 2)} }

func (s *stats) fault(d time.Duration) {
	s.served++
	// The value is within the histogram's range, so this cannot fail.
	_ = s.latency.RecordValue(min(max(d.Microseconds(), 1), maxLatency))
}

func (s *stats) faults(waiting int) Faults {
	return Faults{
		Requests: s.requests, Served: s.served, Waiting: waiting,
		P50Micros: s.latency.ValueAtQuantile(50), P99Micros: s.latency.ValueAtQuantile(99), MaxMicros: s.latency.Max(),
	}
}

// Progress returns how the gather stands. It may be called at any time.
func (e *Engine) Progress() Progress {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.progress()
}

func (e *Engine) progress() Progress {
	if e.over {
		return e.last
	}
	now := time.Now()
	s := &e.stats
	p := Progress{
		Phase: e.phaseNow(), Switched: e.handed(), Stalled: e.stalled(), SourceConnected: e.session != nil,
		DirectBytes: s.direct.Total(), DirectRate: s.direct.Rate(now),
		GatheredBytes: s.gatheredIn.Total(), GatheredRate: s.gatheredIn.Rate(now),
		PlaceRate: s.into.Rate(now), Left: -1,
	}
	if e.book == nil {
		return p
	}
	p.Committed = e.book.committed
	p.Pages = e.pageCounts()
	p.Faults = s.faults(len(e.book.faults))
	for _, h := range e.holders {
		p.Intermediaries = append(p.Intermediaries, e.leg(h, now))
	}
	if todo := p.Pages.Zero + p.Pages.Stored + p.Pages.Remote; p.Committed && todo == 0 {
		p.Left = 0
	} else if left, ok := s.into.Left((todo+p.Pages.Absent)*pages.Size, now); ok && !p.Committed {
		p.Left = left
	} else if left, ok := s.into.Left(todo*pages.Size, now); ok {
		p.Left = left
	}
	return p
}

func (e *Engine) pageCounts() PageCounts {
	c := e.book.where.Counts()
	return PageCounts{Total: e.layout.Pages(), Absent: c.Absent, Zero: c.Zero, Stored: c.Local, Remote: c.Remote, Placed: c.Placed}
}

// left returns the pages that only this intermediary has.
func (e *Engine) left(h *holder) uint64 {
	holder, _ := pages.HolderOf(h.k)
	return e.book.where.Counts().ByHolder[holder]
}

func (e *Engine) leg(h *holder, now time.Time) Leg {
	return Leg{
		Name: h.info.Name, Connected: h.link != nil, Reason: e.stalls[h.stallKey()],
		Bytes: h.stats.in.Total(), Rate: h.stats.in.Rate(now), UrgentPages: h.stats.urgent, Left: e.left(h),
		Outstanding: h.window.Outstanding(), QueueMicros: h.window.Queue().Microseconds(),
	}
}

// handed tells whether the device state is here or was.
func (e *Engine) handed() bool {
	select {
	case <-e.packaged:
		return true
	default:
		return false
	}
}

func (e *Engine) phaseNow() Phase {
	switch {
	case e.dissolving:
		return Dissolving
	case e.book == nil:
		return Waiting
	case e.book.committed:
		return Released
	case e.stage >= stageFeeding:
		return Gathering
	case e.handed():
		return Switching
	case e.ready:
		return Precopy
	}
	return Opening
}

func (e *Engine) result() Result {
	s := &e.stats
	r := Result{
		Started: s.started, Switched: s.switched, Loaded: s.loaded, Committed: s.committed, Gathered: s.gathered,
		DirectBytes: s.direct.Total(), IntermediaryBytes: map[string]uint64{}, Recoveries: s.recoveries,
	}
	if !s.gathered.IsZero() && !s.started.IsZero() {
		r.GatherSeconds = s.gathered.Sub(s.started).Seconds()
	}
	if e.book != nil {
		r.Pages = e.pageCounts()
		r.Faults = s.faults(len(e.book.faults))
	}
	for _, h := range e.holders {
		r.IntermediaryBytes[h.info.Name] = h.stats.in.Total()
	}
	return r
}

// progressEvery is how often subscribers hear of a change.
const progressEvery = 100 * time.Millisecond

// Subscribe returns a channel with the newest snapshot, renewed at most ten times a
// second while Run runs, and a function that ends it. A slow reader misses snapshots,
// never the last one. The channel is closed when Run returns.
func (e *Engine) Subscribe() (<-chan Progress, func()) {
	ch := make(chan Progress, 1)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.over {
		ch <- e.last
		close(ch)
		return ch, func() {}
	}
	e.subs[ch] = struct{}{}
	return ch, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		if _, ok := e.subs[ch]; ok {
			delete(e.subs, ch)
			close(ch)
		}
	}
}

// publish gives every subscriber the newest snapshot in place of an unread one; the
// last one ends the subscriptions.
func (e *Engine) publish(last bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.subs) == 0 {
		return
	}
	p := e.progress()
	for ch := range e.subs {
		select {
		case <-ch:
		default:
		}
		ch <- p
		if last {
			close(ch)
			delete(e.subs, ch)
		}
	}
}
