// SPDX-License-Identifier: Apache-2.0

// Package qmp is a small client of the QEMU Machine Protocol, with typed helpers
// for the commands a migration needs.
//
// It is written for a QEMU that may hang: while a destination waits for a page
// that nobody sends, its main loop holds a lock and no ordinary command is
// answered. Therefore every call ends with its context (or with [DefaultTimeout]
// where that has no deadline), a reply that comes later is matched by its id and
// dropped, commands that QEMU can run out of band have [Client.ExecuteOOB], and
// the number of unanswered ordinary commands stays below the length of QEMU's
// queue (QEMU monitor/qmp.c), because a full queue stops out-of-band commands too.
//
// The peer is not trusted: lines are bounded by [MaxLine], events by the buffer
// of each [Subscription], and a message that makes no sense ends the connection
// with an error that names it.
//
// The protocol is QEMU's docs/interop/qmp-spec.rst.
package qmp
