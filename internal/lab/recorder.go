// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"sync"
	"time"
)

// sampleEvery is the distance of two readings of the links' counters.
const sampleEvery = 50 * time.Millisecond

// Recorder reads the counters of all links while a run lasts.
type Recorder struct {
	net *Network

	mu      sync.Mutex
	samples []Sample
	err     error
	stop    context.CancelFunc
	done    chan struct{}
}

// NewRecorder begins to record.
func NewRecorder(net *Network) *Recorder {
	ctx, cancel := context.WithCancel(context.Background())
	r := &Recorder{net: net, stop: cancel, done: make(chan struct{})}
	go r.record(ctx)
	return r
}

func (r *Recorder) record(ctx context.Context) {
	defer close(r.done)
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for {
		s, err := r.net.Sample()
		r.mu.Lock()
		if err != nil {
			r.err = err
		} else {
			r.samples = append(r.samples, s)
		}
		r.mu.Unlock()
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// Stop ends the recording and returns the samples.
func (r *Recorder) Stop() ([]Sample, error) {
	r.stop()
	<-r.done
	return r.samples, r.err
}

// Last gives the two samples that the rates of the last half second come from.
func (r *Recorder) Last() (before, now Sample, ok bool) {
	const back = int(500 * time.Millisecond / sampleEvery)
	r.mu.Lock()
	defer r.mu.Unlock()
	n := len(r.samples)
	if n <= back {
		return Sample{}, Sample{}, false
	}
	return r.samples[n-1-back], r.samples[n-1], true
}

// trafficAt gives the traffic of every node at a moment, between two samples.
func trafficAt(samples []Sample, at time.Time, node int) Traffic {
	for i := 1; i < len(samples); i++ {
		if a, b := samples[i-1], samples[i]; !b.At.Before(at) {
			share := float64(at.Sub(a.At)) / float64(b.At.Sub(a.At))
			share = min(max(share, 0), 1)
			between := func(a, b uint64) uint64 { return a + uint64(share*float64(b-a)) }
			return Traffic{Out: between(a.Nodes[node].Out, b.Nodes[node].Out), In: between(a.Nodes[node].In, b.Nodes[node].In)}
		}
	}
	if len(samples) == 0 {
		return Traffic{}
	}
	return samples[len(samples)-1].Nodes[node]
}

// series turns counters into rates, in bits per second for every step.
func series(samples []Sample, node int, from time.Time, step time.Duration, n int) (out, in []float64) {
	before := trafficAt(samples, from, node)
	for i := range n {
		now := trafficAt(samples, from.Add(time.Duration(i+1)*step), node)
		out = append(out, float64(now.Out-before.Out)*8/step.Seconds())
		in = append(in, float64(now.In-before.In)*8/step.Seconds())
		before = now
	}
	return out, in
}
