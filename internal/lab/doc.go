// SPDX-License-Identifier: Apache-2.0

// Package lab builds several nodes on one machine: network namespaces, shaped
// links, agents and real QEMU guests.
package lab
