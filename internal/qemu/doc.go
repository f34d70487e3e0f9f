// SPDX-License-Identifier: Apache-2.0

// Package qemu decodes and encodes QEMU's migration stream, its RAM section and
// its return path, for QEMU 7.2 to 10.x on x86-64.
//
// Decoder ends the stream of a source QEMU. Everything it reads is checked
// before it is believed: lengths are bounded, block names must be known,
// offsets must lie in their block, and whatever this package cannot carry
// faithfully (xbzrle, compression, iterable device state, TLS, …) ends in an
// error that wraps ErrUnsupported and says what to turn off.
//
// The Append functions build the stream that a destination QEMU accepts. They
// append to a slice the caller owns and never keep it.
//
// The wire format is QEMU's own: migration/savevm.c (sections, commands,
// configuration), migration/ram.c (page records), migration/postcopy-ram.c
// (discards) and migration/migration.c (return path). All integers are
// big-endian, except the bitmap of a RECV_BITMAP reply.
package qemu
