// SPDX-License-Identifier: Apache-2.0

// Package scatter is the source engine. To the source QEMU it is the destination
// of a migration: it ends the stream, and scatters the VM's memory to the
// destination's agent and to intermediaries, so that the source is free as soon as
// its own uplink has carried everything out.
//
// # How a page travels
//
//  1. source.go reads the stream of QEMU by internal/qemu. The data of a page is a
//     slice of the decoder's buffer. With multifd, channels.go reads more streams
//     beside it, and orders them by QEMU's synchronisation points.
//  2. page.go asks whether it is all zeros; such a page becomes a record and nothing
//     else. Any other gets its version from the ledger and is sealed straight into
//     the open batch: that is its only copy in this process.
//  3. A full batch is placed: place.go chooses the holder (destination first, else
//     the intermediary that would finish soonest), flight.go keeps the batch until
//     it is acknowledged. When nobody has room the batch waits in the backlog, and
//     QEMU waits with it.
//  4. lane.go writes a batch by one call and reads the acknowledgements. A batch that
//     a holder refused, or lost with its connection, goes back to the backlog with
//     its sealed bytes and is placed again.
//  5. An acknowledged page is safe. If an intermediary has it, records.go tells the
//     destination; the destination knows its own pages. A record is never sent before
//     the acknowledgement, and never for a version that is not the newest any more.
//  6. When the destination's guest waits for a page (faults.go), a page still in QEMU
//     is asked for there, and a page under way is sent again on the urgent lane.
//  7. When the stream has ended, everything is safe, and the destination has loaded
//     the device state, engine.go commits, and only then tells QEMU to go.
//
// # What may never happen
//
// Before the package with the device state is handed over to the destination, every
// failure is rolled back: QEMU's stream is closed, which makes its guest run on, the
// destination is told to abort and the intermediaries to forget. After it, the guest
// lives at the destination: no failure closes QEMU's stream; the engine stalls, says
// why, and reconnects until its context ends.
package scatter
