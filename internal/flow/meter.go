// SPDX-License-Identifier: Apache-2.0

package flow

import "time"

const (
	meterSlots = 10
	meterSlot  = 100 * time.Millisecond
)

// Meter counts bytes and knows the rate of the last second. The zero value is ready.
type Meter struct {
	total  uint64
	first  int64 // slot of the first byte
	slots  [meterSlots + 1]uint64
	newest int64 // the slot that is being filled
}

// Add counts bytes at a time, which must not go backwards.
func (m *Meter) Add(bytes int, now time.Time) {
	slot := m.advance(now)
	if m.total == 0 {
		m.first = slot
	}
	m.total += uint64(bytes)
	m.slots[slot%int64(len(m.slots))] += uint64(bytes)
}

// Total returns all bytes counted.
func (m *Meter) Total() uint64 { return m.total }

// Rate returns the bytes a second over the last second before now, or since the first
// byte when that is more recent.
func (m *Meter) Rate(now time.Time) float64 {
	if m.total == 0 {
		return 0
	}
	slot := m.advance(now)
	var sum uint64
	for _, n := range m.slots {
		sum += n
	}
	into := time.Duration(now.UnixNano() - slot*int64(meterSlot))
	span := time.Duration(min(slot-m.first, meterSlots))*meterSlot + into
	return float64(sum) / max(span, meterSlot).Seconds()
}

// Left returns the time that bytes more take at the present rate; ok is false while
// nothing moves.
func (m *Meter) Left(bytes uint64, now time.Time) (left time.Duration, ok bool) {
	rate := m.Rate(now)
	if rate <= 0 {
		return 0, false
	}
	seconds := float64(bytes) / rate
	const most = 365 * 24 * time.Hour
	if seconds > most.Seconds() {
		return most, true
	}
	return time.Duration(seconds * float64(time.Second)), true
}

// advance empties the slots between the newest one and that of now.
func (m *Meter) advance(now time.Time) int64 {
	slot := now.UnixNano() / int64(meterSlot)
	if slot <= m.newest {
		return m.newest
	}
	for s := max(m.newest+1, slot-int64(len(m.slots))+1); s <= slot; s++ {
		m.slots[s%int64(len(m.slots))] = 0
	}
	m.newest = slot
	return slot
}
