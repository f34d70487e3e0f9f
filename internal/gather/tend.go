// SPDX-License-Identifier: Apache-2.0

package gather

import (
	"context"
	"strings"
	"time"

	"scattergather.io/scattergather/internal/wire"
)

const (
	// tendEvery is how often what is not urgent is looked after.
	tendEvery = 20 * time.Millisecond
	// retryEvery is how often pages that could not be had are asked for again.
	retryEvery = time.Second
	// punchPages is how many placed pages are given back to the state directory's
	// file system at once.
	punchPages = 256
)

// tend looks after what is not urgent: memory of placed pages, pages to ask for again,
// intermediaries that are new in the table.
func (e *Engine) tend(ctx context.Context) {
	ticker := time.NewTicker(tendEvery)
	defer ticker.Stop()
	var punches []wire.Run
	var retried, told time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		case <-e.wakeTend:
		}
		now := time.Now()
		e.mu.Lock()
		punches = append(punches[:0], e.punches.list...)
		e.punches.reset()
		st, c := e.state.store, e.clients
		if e.book != nil {
			if now.Sub(retried) >= retryEvery {
				retried = now
				e.retry()
			}
			if e.stage >= stageFeeding {
				e.book.hedge(now)
			}
			e.wakeAll()
		}
		e.mu.Unlock()
		if len(punches) > 0 {
			if err := st.punch(punches); err != nil {
				e.log.Error(err, "Placed pages keep taking memory")
			}
		}
		if c != nil {
			c.start()
		}
		if now.Sub(told) >= progressEvery {
			told = now
			e.publish(false)
		}
	}
}

// retry asks again for the pages that could not be had; the caller holds e.mu.
func (e *Engine) retry() {
	if e.book.retry() == 0 {
		e.unstall(stallMissing)
	}
}

// What may keep a gather from going on.
const (
	stallSource  = "source"
	stallStream  = "stream"
	stallStore   = "store"
	stallPages   = "pages"
	stallMissing = "missing"
	stallHolder  = "intermediary "
)

// stall notes why something does not go on; the caller holds e.mu.
func (e *Engine) stall(key, reason string) {
	if e.stalls[key] != reason {
		e.stalls[key] = reason
		e.log.Info("Stalled", "reason", reason)
	}
}

// unstall notes that it goes on; the caller holds e.mu.
func (e *Engine) unstall(key string) {
	if _, ok := e.stalls[key]; ok {
		delete(e.stalls, key)
		e.log.Info("Goes on again", "was", key)
	}
}

// stalled says why the gather does not go on, empty if it does. An intermediary that
// holds nothing any more is no reason. The caller holds e.mu.
func (e *Engine) stalled() string {
	var reasons []string
	for _, key := range []string{stallPages, stallStream, stallStore, stallMissing, stallSource} {
		if r := e.stalls[key]; r != "" {
			reasons = append(reasons, r)
		}
	}
	for _, h := range e.holders {
		if r := e.stalls[h.stallKey()]; r != "" && e.left(h) > 0 {
			reasons = append(reasons, r)
		}
	}
	return strings.Join(reasons, "; ")
}

// pause waits for d; it returns false when ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
