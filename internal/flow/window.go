// SPDX-License-Identifier: Apache-2.0

package flow

import "time"

// WindowConfig bounds a window.
type WindowConfig struct {
	// Target is the queueing delay to keep before the bottleneck; 0 means 5 ms.
	Target time.Duration
	// MinBytes is what may always be under way; 0 means 512 KiB. It should hold two
	// of the largest frames.
	MinBytes int
	// MaxBytes is what may be under way at most; 0 means 64 MiB.
	MaxBytes int
}

// Window says how many bytes may be under way to a peer.
type Window struct {
	cfg         WindowConfig
	outstanding int
	base, last  time.Duration
	meter       Meter
	rate        float64
}

// NewWindow returns the window of a fresh connection.
func NewWindow(cfg WindowConfig) *Window {
	if cfg.Target <= 0 {
		cfg.Target = 5 * time.Millisecond
	}
	if cfg.MinBytes <= 0 {
		cfg.MinBytes = 512 << 10
	}
	if cfg.MaxBytes <= 0 {
		cfg.MaxBytes = 64 << 20
	}
	cfg.MaxBytes = max(cfg.MaxBytes, cfg.MinBytes)
	return &Window{cfg: cfg}
}

// Room returns how many bytes may be sent now. A sender sends a frame when it fits.
func (w *Window) Room() int { return max(0, w.cfg.MaxBytes-w.outstanding) }

// Sent notes that a frame of that many bytes was given to the connection.
func (w *Window) Sent(bytes int, now time.Time) { w.outstanding += bytes }

// Acked notes that the peer acknowledged a frame of that many bytes, rtt after it was
// given to the connection.
func (w *Window) Acked(bytes int, rtt time.Duration, now time.Time) {
	w.outstanding = max(0, w.outstanding-bytes)
	if w.base == 0 || rtt < w.base {
		w.base = rtt
	}
	w.last = rtt
	w.meter.Add(bytes, now)
	w.rate = w.meter.Rate(now)
}

// Lost notes that a frame of that many bytes will never be acknowledged, since its
// connection broke.
func (w *Window) Lost(bytes int) { w.outstanding = max(0, w.outstanding-bytes) }

// Outstanding returns the bytes under way.
func (w *Window) Outstanding() int { return w.outstanding }

// Rate returns the delivered bytes a second, smoothed, at the last acknowledgement.
func (w *Window) Rate() float64 { return w.rate }

// Queue returns the filtered queueing delay: round-trip time less that of an empty path.
func (w *Window) Queue() time.Duration { return w.last - w.base }

// Finish returns the expected time until that many bytes more would be delivered.
func (w *Window) Finish(bytes int) time.Duration {
	if w.rate <= 0 {
		return w.cfg.Target
	}
	return w.base + time.Duration(float64(w.outstanding+bytes)/w.rate*float64(time.Second))
}
