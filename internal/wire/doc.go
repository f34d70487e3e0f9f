// SPDX-License-Identifier: Apache-2.0

// Package wire is the protocol between node agents; docs/protocol.md specifies it.
package wire
