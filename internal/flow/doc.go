// SPDX-License-Identifier: Apache-2.0

// Package flow decides how many bytes may be under way to a peer so that a link
// stays full while the queue before it stays a few milliseconds long. It is pure:
// the caller brings the clock.
package flow
