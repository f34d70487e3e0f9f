// SPDX-License-Identifier: Apache-2.0

// Package pool is the memory that an intermediary lends to migrations of other
// nodes. It holds ciphertext only: the key never comes here.
//
// # Arenas
//
// Every session has one sparse file on a tmpfs, its arena, so that pages outlive the
// agent's process: an agent that was killed and started again finds every page that
// it acknowledged. The file has three regions, at fixed places whatever its size:
//
//	offset 0     header         one page: who may do what, format, size, phase
//	offset 4096  descriptors    32 bytes a slot, mapped into the process
//	offset 2^36  bodies         4096 bytes a slot, read and written by system calls
//
// A sealed page has up to 4112 bytes. The first 4096 are the slot's body and the rest
// lies in the descriptor, so that a body is exactly one page of the node's memory and
// is given back by punching a hole. Bodies are not mapped: a full tmpfs is then an
// error to answer and no SIGBUS, a batch of 64 pages is one system call without the
// kernel zeroing pages first (1.8 times as fast as a mapping when measured), and
// giving memory back needs no TLB shoot-down.
//
// A descriptor becomes live by one atomic store, after the body is in place, and dead
// by another before the body goes. So a process that dies at any instruction leaves
// slots that are live and whole, or dead. The index from page to slot is rebuilt from
// the descriptors; it is never trusted to a file.
//
// Slots come in extents of 1024. Slots of low extents are used first, so that high
// ones run empty; a dead slot's body is given back at once, and the descriptors of an
// extent when its last slot dies.
//
// # Whose session it is
//
// A session has an owner, the source's node, which alone writes, and a reader, the
// destination's node, which alone reads. Both may free pages: the source those that it
// discards, the destination those that it has placed. It has two phases:
//
//	filling   from Reserve until the reader first attaches. The source still has the
//	          VM, or everything that it is made of. The session is the owner's: the
//	          owner may dissolve it, and when the owner is not connected for the
//	          owner's grace period it is dropped.
//	shared    from the reader's first Attach to the end. The VM may run at the
//	          destination with these pages as their only copy, and the source may be
//	          gone by right. Only the reader dissolves it. It is kept while either of
//	          the two is connected, and dropped when neither was for the reader's
//	          grace period, which is longer: a destination's agent is restarted in it.
//
// The phase lies in the arena, so a restarted agent keeps it; grace periods start
// again when the pool is opened, because nobody could connect while it was not.
//
// Dropped and dissolved sessions give back all memory, which the kernel zeroes before
// anybody sees it again, and their arena is zero to whoever has it open.
package pool
