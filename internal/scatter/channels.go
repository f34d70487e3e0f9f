// SPDX-License-Identifier: Apache-2.0

package scatter

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu"
	"scattergather.io/scattergather/internal/qemu/multifd"
)

// accept takes the source QEMU's next connection.
func (e *Engine) accept() (*source, error) {
	ctx, cancel := context.WithTimeout(e.ctx, e.cfg.AcceptTimeout)
	defer cancel()
	c, err := e.cfg.Accept(ctx)
	if err != nil {
		return nil, fmt.Errorf("waiting for the source QEMU to connect: %w", err)
	}
	return newSource(c), nil
}

// acceptMain waits for the main connection. With multifd the channels come to the same
// socket: those that come earlier are read at once, the others by a goroutine.
func (e *Engine) acceptMain() (*source, error) {
	if e.cfg.MultifdChannels == 0 {
		src, err := e.accept()
		if err == nil {
			e.wg.Go(e.refuseMore)
		}
		return src, err
	}
	for left := e.cfg.MultifdChannels; ; left-- {
		src, channel, err := e.sniff()
		if err != nil {
			return nil, err
		}
		if !channel {
			e.wg.Go(func() { e.acceptChannels(left) })
			return src, nil
		}
		if left == 0 {
			src.close()
			return nil, fmt.Errorf("the source QEMU opened more than %d multifd channels and no main connection", e.cfg.MultifdChannels)
		}
		e.wg.Go(func() { e.readChannel(src) })
	}
}

// acceptChannels takes as many multifd channels.
func (e *Engine) acceptChannels(left int) {
	for range left {
		src, channel, err := e.sniff()
		if err == nil && !channel {
			src.close()
			err = errors.New("the source QEMU opened a second main connection")
		}
		if err != nil {
			e.fail(err)
			e.barrier.Break(err)
			return
		}
		e.wg.Go(func() { e.readChannel(src) })
	}
	e.refuseMore()
}

// refuseMore waits for a connection too many. Pages that QEMU sends there would be
// missed, and taken for pages that it never sent. A stock QEMU opens it before it sends
// the device state, so that the migration still fails in time; later the connection is
// kept open, for closing it would break the stream.
func (e *Engine) refuseMore() {
	c, err := e.cfg.Accept(e.ctx)
	if err != nil {
		return // the engine or the listener ended
	}
	err = fmt.Errorf("the source QEMU opened more connections than expected; turn the capabilities postcopy-preempt and multifd off, or say how many multifd channels there are: %w",
		qemu.ErrUnsupported)
	e.mu.Lock()
	handed := e.handed
	if handed {
		e.surplus = err
	}
	e.mu.Unlock()
	if handed {
		e.stall(err.Error())
		return
	}
	e.fail(err)
	_ = c.Close() // nothing was read or written
}

// sniff takes a connection and looks at its first bytes, which tell a multifd channel
// from the main stream.
func (e *Engine) sniff() (src *source, channel bool, err error) {
	if src, err = e.accept(); err != nil {
		return nil, false, err
	}
	if err = src.until(time.Now().Add(e.cfg.AcceptTimeout)); err == nil {
		_, err = io.ReadFull(src.conn, src.first[:])
	}
	if err != nil {
		src.close()
		return nil, false, fmt.Errorf("a connection of the source QEMU says nothing: %w", err)
	}
	src.ahead = src.first[:]
	return src, binary.BigEndian.Uint32(src.first[:]) == multifd.Magic, nil
}

// channel is the state of reading one multifd channel.
type channel struct {
	e    *Engine
	recv *multifd.Receiver
	feed *feeder
	id   int
	// open is set once the books are open for pages: see reader.prepare.
	open bool
}

// readChannel reads a multifd channel until QEMU closes it, which it does when it has
// sent everything.
func (e *Engine) readChannel(src *source) {
	stop := context.AfterFunc(e.ctx, func() { src.halt(context.Cause(e.ctx)) })
	defer stop()
	e.mu.Lock()
	e.channels = append(e.channels, src)
	e.mu.Unlock()
	feed := &feeder{e: e}
	c := &channel{e: e, feed: feed, recv: multifd.NewReceiver(&tap{src: src, feed: feed}, multifd.Options{})}
	err := c.run()
	src.close()
	if errors.Is(err, io.EOF) {
		err = errors.New("QEMU closed it")
		if flushed := feed.flush(true); flushed != nil {
			err = flushed
		}
	} else {
		err = fmt.Errorf("reading multifd channel %d of the source QEMU: %w", c.id, err)
		e.sourceFailed(err)
	}
	// The main stream is past the last point by now, or waits at one in vain.
	e.barrier.Break(fmt.Errorf("multifd channel %d has ended: %w", c.id, err))
}

func (c *channel) run() error {
	hello, err := c.recv.Hello()
	if err != nil {
		return err
	}
	c.id = int(hello.ID)
	if c.id >= c.e.cfg.MultifdChannels {
		return fmt.Errorf("channel %d of %d", c.id, c.e.cfg.MultifdChannels)
	}
	var p multifd.Packet
	for {
		if err := c.recv.Next(&p); err != nil {
			return err
		}
		if err := c.packet(&p); err != nil {
			return err
		}
		if !p.Flags.Sync() {
			continue
		}
		// The pages before the point have their versions now, so those that come after
		// it, on whatever channel, supersede them.
		if err := c.e.barrier.Channel(c.e.ctx, c.id); err != nil {
			return err
		}
	}
}

func (c *channel) packet(p *multifd.Packet) error {
	if len(p.Normal)+len(p.Zero) == 0 {
		return nil
	}
	e := c.e
	if !c.open {
		if err := e.wait(e.ctx, func() bool { return e.layout != nil }); err != nil {
			return err
		}
		c.open = true
	}
	block, ok := e.layout.Lookup(p.BlockName)
	if !ok {
		return fmt.Errorf("pages of unknown block %q", p.BlockName)
	}
	for _, offset := range p.Zero {
		i, err := c.index(block, offset)
		if err != nil {
			return err
		}
		if err := c.feed.zero(i); err != nil {
			return err
		}
	}
	for _, offset := range p.Normal {
		i, err := c.index(block, offset)
		if err != nil {
			return err
		}
		data, err := c.recv.Page()
		if err != nil {
			return err
		}
		if err := c.feed.page(i, data); err != nil {
			return err
		}
	}
	return nil
}

func (c *channel) index(block int, offset uint64) (pages.Index, error) {
	i, err := c.e.layout.Index(block, offset)
	if err != nil {
		return 0, fmt.Errorf("page of a multifd channel: %w", err)
	}
	return i, nil
}
