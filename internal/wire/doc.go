// SPDX-License-Identifier: Apache-2.0

// Package wire is the protocol between node agents. docs/protocol.md specifies it;
// this package is its only implementation.
//
// A Conn is a set of lanes that belongs to one migration and one pair of agents:
// one control lane, one urgent lane for what a stalled guest waits for, and a few
// bulk lanes. It lives and dies as a whole: when one lane fails, all are closed.
//
// Every lane carries frames. Small messages are structs with an Append method and a
// Parse function; they travel by Lane.Send and Lane.Receive. Pages travel in a
// Batch, which is one contiguous buffer filled without allocating and written by one
// system call.
//
// Who owns a buffer: a Batch and a Frame own their memory, and belong to whoever got
// them from New… or from a Pool until they are Put back. What Parse functions, Frame
// and PageFrame return aliases the Frame and is valid until its next Receive; only
// ParseSetup, ParseHolders and the ones that return strings copy.
package wire
