// SPDX-License-Identifier: Apache-2.0

// Package multifd decodes the multifd channels of a migrating source QEMU, for
// QEMU 7.2 to 10.x on x86-64, without compression.
//
// With the capability "multifd" a source opens, beside the main connection, a
// fixed number of channels (parameter "multifd-channels"). Pages with data travel
// on them in packets of up to [MaxPages] pages; everything else stays on the main
// connection. Pages of zeros are in the packets since QEMU 9.0 (machine types up
// to 8.2 keep them on the main connection).
//
// All connections go to one listener, in any order. A channel begins with
// [Magic], the main connection with 'QEVM', so that the first four bytes tell;
// which channel it is says [Receiver.Hello].
//
// # Order
//
// Within one channel packets are in order; between channels, and between them and
// the main connection, there is none, but for synchronisation points. At such a
// point the source puts the flag SYNC into one packet of every channel and then a
// mark into the main connection:
//
//   - a MULTIFD_FLUSH record (0x200), since QEMU 8.1 with machine types from 8.1
//     on: behind the block table and then once per round over the memory;
//   - else every EOS record of the RAM section, that of its START included.
//
// Which of the two holds tells the START of the RAM section: it has a
// MULTIFD_FLUSH record before its EOS in the first case and none in the second
// (QEMU migration/ram.c, property "multifd-flush-after-each-section"). The decoder
// of the main connection reports both as the same event. QEMU 8.1.0 to 8.1.2 send
// MULTIFD_FLUSH although multifd is off; then it means nothing.
//
// Between two points QEMU sends a page once, but for a race up to version 7.2 by
// which the last page of a packet may be the first of the next one too, on another
// channel. Then either copy may win: if they differ, the guest has written to the
// page meanwhile and it comes again behind the next point. But two readers may hold
// the same page at the same time.
//
// So the newest version of each page is known if, and only if, nothing behind a
// point is taken before everything in front of it was, on all channels and on the
// main connection. [Barrier] brings them together: whoever reads a channel calls
// [Barrier.Channel] after it has taken all pages of a packet with the flag SYNC
// and before it reads the next packet, and whoever reads the main connection calls
// [Barrier.Main] at each mark.
//
// The mark must be acted upon as soon as its own eight bytes have arrived. What
// follows it (the footer of the section, the next section) stays in the source's
// buffer while the source waits for a channel to take pages, and the channels wait
// for the mark: a reader that asks for one byte more never gets it.
//
// After the last point the source closes the channels, and [Receiver.Next]
// returns [io.EOF].
//
// The format is that of QEMU's migration/multifd.h (MultiFDInit_t,
// MultiFDPacket_t); all integers are big-endian.
package multifd
