// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"context"
	"sync"
	"time"

	"scattergather.io/scattergather/internal/wire"
)

// rollBackTimeout bounds how long a failed migration waits for peers to forget it.
// Those that do not hear of it forget it when their grace period ends.
const rollBackTimeout = 2 * time.Second

// rollBack undoes a migration whose device state was not handed over: the source QEMU
// goes on at once, then the peers are told.
func (e *Engine) rollBack(cause error) {
	e.mu.Lock()
	src, channels, holders := e.source, e.channels, e.holders
	e.mu.Unlock()
	if src != nil {
		src.close()
	}
	for _, c := range channels {
		c.close()
	}
	ctx, cancel := context.WithTimeout(e.ctx, rollBackTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for i, h := range holders {
		e.mu.Lock()
		c := h.conn
		e.mu.Unlock()
		if c == nil {
			continue
		}
		if i == 0 {
			wg.Go(func() { e.abort(ctx, c, cause) })
		} else {
			wg.Go(func() { e.dissolve(ctx, h, c) })
		}
	}
	wg.Wait()
}

// abort tells the destination, and waits until it has closed the connection.
func (e *Engine) abort(ctx context.Context, c *wire.Conn, cause error) {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if _, err := e.journal.Send(&wire.Abort{Reason: cause.Error()}); err != nil {
		e.log.Error(err, "Telling the destination of the roll-back")
		return
	}
	<-c.Done()
}

// dissolve asks an intermediary to zero what it holds, and waits until it did.
func (e *Engine) dissolve(ctx context.Context, h *holder, c *wire.Conn) {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	err := c.Control().Send(2, wire.Dissolve{})
	if err != nil {
		e.log.Error(err, "Asking an intermediary to forget the VM", "intermediary", h.peer.Name)
		return
	}
	stopWake := context.AfterFunc(ctx, e.wakeAll)
	defer stopWake()
	e.mu.Lock()
	defer e.mu.Unlock()
	for !h.dissolved && h.conn == c && ctx.Err() == nil {
		e.changed.Wait()
	}
}
