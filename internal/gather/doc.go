// SPDX-License-Identifier: Apache-2.0

// Package gather is the destination engine. To the destination QEMU it is the source
// of a post-copy migration: it begins a stream, delivers the device state, and from
// then on gives QEMU every page exactly once, from wherever the page lies: the source
// that is still being emptied, or intermediaries.
//
// # How a page travels
//
//  1. source.go takes the source's connections. Its control lane brings the VM's
//     description, page map records, the device state and the commit (control.go);
//     its other lanes bring pages (direct.go). While QEMU keeps up, these go straight
//     into its stream (parcel.go), else into the store, a sparse file (store.go). A page
//     is acknowledged when one of the two has it for good.
//  2. book.go knows where each page is. It is told of records, stored pages, faults and
//     answers, and decides what is read and written next: faults.go what is done for a
//     page that a guest waits for, choose.go what QEMU is given next, units.go when a
//     large host page is complete. None of it does I/O.
//  3. holders.go keeps a connection to each intermediary, and reads.go asks there:
//     demand Reads at once on the urgent lane, prepaging in an order bent by faults as
//     far as a delay-bounded window allows, so that the queue before the bottleneck,
//     which every demand fault pays, stays a few milliseconds long.
//  4. writer.go is the only goroutine that writes pages into QEMU's stream. It claims
//     them in the book first; a page that was claimed is never written again, because
//     QEMU takes a second copy for a failure. Pages of intermediaries are opened
//     straight into its buffer.
//  5. Behind every batch goes a PING. QEMU's PONG (feed.go) says that the batch is
//     placed: placed.go frees the pages at their intermediaries and in the store.
//  6. When the source has committed and everything is written, QEMU is told the end,
//     answers SHUT, and the intermediaries are dissolved (engine.go).
//
// # What may never happen
//
// Until the device state goes into QEMU, every failure ends the gather and leaves
// nothing behind: the guest is the source's. From then on the guest is nowhere else.
// What goes wrong stalls the gather, is said in Progress.Stalled, and is tried again;
// QEMU's stream is never closed. If it breaks, or this process ends, recover.go goes on
// by QEMU's own recovery, with QEMU's bitmap of received pages as the truth and the
// state directory (state.go) for everything else.
package gather
