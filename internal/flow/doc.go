// SPDX-License-Identifier: Apache-2.0

// Package flow decides how many bytes may be under way to a peer so that a link
// stays full while the queue before it stays a few milliseconds long. It is pure:
// the caller brings the clock.
//
// A Window watches the delay of acknowledgements, in the manner of LEDBAT (RFC 6817),
// FAST TCP and Swift, above whatever the kernel's TCP does below: bytes that wait in
// the sender's socket count as queue like those that wait in a switch, so a demand
// fault that comes next finds a short way on every lane.
//
// Nothing in this package is safe for concurrent use; the engine that owns a value
// guards it.
package flow
