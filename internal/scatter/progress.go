// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"fmt"
	"time"
)

// Phase is how far a migration is.
type Phase uint8

// The phases in their order. Precopy is short with Immediate.
const (
	// Connecting: peers are dialled, memory is reserved, QEMU's stream is awaited.
	Connecting Phase = iota
	// Preparing: the destination's QEMU is being prepared.
	Preparing
	// Precopy: pages are sent while the guest runs at the source.
	Precopy
	// Switching: the hypervisor was asked to stop the guest here.
	Switching
	// Scattering: the guest runs at the destination, its memory is leaving.
	Scattering
	// Draining: QEMU has sent its last page; acknowledgements are awaited.
	Draining
	// Committing: the destination is asked to take the whole VM over.
	Committing
	// Releasing: the source QEMU was told to go.
	Releasing
	// Done: nothing of the VM is needed from this node any more.
	Done
	// Failed: rolled back, the guest runs on here.
	Failed
)

var phaseNames = [...]string{"Connecting", "Preparing", "Precopy", "Switching", "Scattering",
	"Draining", "Committing", "Releasing", "Done", "Failed"}

// String returns the phase's name.
func (p Phase) String() string {
	if int(p) < len(phaseNames) {
		return phaseNames[p]
	}
	return fmt.Sprintf("Phase(%d)", uint8(p))
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

// Leg is the traffic to one holder.
type Leg struct {
	Name string `json:"name"`
	// Connected is false for a holder that is lost or was left out; Reason says why.
	Connected bool   `json:"connected"`
	Reason    string `json:"reason,omitempty"`
	// Bytes of page frames sent, sent-again ones included.
	Bytes uint64 `json:"bytes"`
	// Rate in bytes a second of what the holder acknowledged over the last second.
	Rate float64 `json:"rate"`
	// Outstanding bytes are under way.
	Outstanding int `json:"outstanding"`
	// QueueMicros is the queueing delay on the way to the holder.
	QueueMicros int64 `json:"queueMicros"`
	// LeftBytes of sealed pages is what the holder is still ready to store.
	LeftBytes uint64 `json:"leftBytes"`
}

// PageCounts counts page versions by what became of them.
type PageCounts struct {
	// Total pages of the VM.
	Total uint64 `json:"total"`
	// Safe pages are acknowledged in their newest version and known at the destination.
	Safe uint64 `json:"safe"`
	// Data and Zero count what QEMU sent; Duplicate were sent although QEMU had sent
	// them in that version before, and were dropped.
	Data      uint64 `json:"data"`
	Zero      uint64 `json:"zero"`
	Duplicate uint64 `json:"duplicate"`
	// Discarded pages were dirtied after they were sent.
	Discarded uint64 `json:"discarded"`
	// Unsent pages never came from QEMU (balloon, unplugged memory): they are zero.
	Unsent uint64 `json:"unsent"`
	// Wanted pages were asked for by the destination's guest; of these Fetched were
	// asked of QEMU and Repeated were sent again while under way.
	Wanted   uint64 `json:"wanted"`
	Fetched  uint64 `json:"fetched"`
	Repeated uint64 `json:"repeated"`
	// Replaced pages were placed again after a refusal or a lost holder.
	Replaced uint64 `json:"replaced"`
}

// Progress is a snapshot of a migration.
type Progress struct {
	Phase Phase `json:"phase"`
	// Stalled says why nothing moves; empty while all is well.
	Stalled string     `json:"stalled,omitempty"`
	Since   time.Time  `json:"since"`
	Pages   PageCounts `json:"pages"`
	// Destination is the direct leg without the urgent lane, Urgent that lane.
	Destination    Leg    `json:"destination"`
	UrgentBytes    uint64 `json:"urgentBytes"`
	Intermediaries []Leg  `json:"intermediaries"`
	// ControlBytes that the destination has not applied yet.
	ControlBytes int `json:"controlBytes"`
	// Rate in bytes a second of all legs over the last second.
	Rate float64 `json:"rate"`
	// Left is the expected time until everything is safe; negative while unknown.
	Left time.Duration `json:"left"`
}

// Result tells how a migration went.
type Result struct {
	Strategy Strategy `json:"strategy"`
	// Started is when the first byte left, Switched when the device state was handed
	// over (zero before that), Released when nothing of the VM was needed here any more.
	Started  time.Time `json:"started"`
	Switched time.Time `json:"switched"`
	Released time.Time `json:"released"`
	// EvictionSeconds is Released - Started.
	EvictionSeconds float64 `json:"evictionSeconds"`
	// StreamBytes came from QEMU.
	StreamBytes uint64 `json:"streamBytes"`
	// DirectBytes, UrgentBytes and IntermediaryBytes left for each.
	DirectBytes       uint64            `json:"directBytes"`
	UrgentBytes       uint64            `json:"urgentBytes"`
	IntermediaryBytes map[string]uint64 `json:"intermediaryBytes"`
	PackageBytes      int               `json:"packageBytes"`
	Pages             PageCounts        `json:"pages"`
	// Reconnects counts how often the destination's connection was restored.
	Reconnects int `json:"reconnects"`
}

// progressEvery is how often subscribers hear of a change.
const progressEvery = 100 * time.Millisecond

// Progress returns how the migration stands. It may be called at any time.
func (e *Engine) Progress() Progress {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	p := Progress{
		Phase: e.phase, Stalled: e.stalled, Since: e.since, Pages: e.counts,
		UrgentBytes: e.urgent.bytes, ControlBytes: e.unapplied(), Left: -1,
	}
	for i, h := range e.holders {
		leg := h.leg(now)
		p.Rate += leg.Rate
		if i == 0 {
			p.Destination = leg
		} else {
			p.Intermediaries = append(p.Intermediaries, leg)
		}
	}
	p.Intermediaries = append(p.Intermediaries, e.leftOut...)
	if e.safe != nil {
		p.Pages.Total, p.Pages.Safe = e.layout.Pages(), e.safe.Count()
		missing := (p.Pages.Total - p.Pages.Safe) * pageBytes
		switch {
		case missing == 0:
			p.Left = 0
		case p.Rate > 0:
			p.Left = time.Duration(float64(missing) / p.Rate * float64(time.Second))
		}
	}
	return p
}

// Subscribe returns a channel with the newest snapshot, renewed at most ten times a
// second while Run runs, and a function that ends it. A slow reader misses snapshots,
// never the last one. The channel is closed when Run returns.
func (e *Engine) Subscribe() (<-chan Progress, func()) {
	ch := make(chan Progress, 1)
	e.subMu.Lock()
	defer e.subMu.Unlock()
	if e.subClosed {
		ch <- e.Progress()
		close(ch)
		return ch, func() {}
	}
	e.subs[ch] = struct{}{}
	return ch, func() {
		e.subMu.Lock()
		defer e.subMu.Unlock()
		if _, ok := e.subs[ch]; ok {
			delete(e.subs, ch)
			close(ch)
		}
	}
}

// publish gives every subscriber the newest snapshot in place of an unread one.
func (e *Engine) publish(last bool) {
	p := e.Progress()
	e.subMu.Lock()
	defer e.subMu.Unlock()
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
	e.subClosed = e.subClosed || last
}

// report publishes until the engine stops.
func (e *Engine) report() {
	t := time.NewTicker(progressEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			e.publish(false)
		case <-e.ctx.Done():
			return
		}
	}
}
