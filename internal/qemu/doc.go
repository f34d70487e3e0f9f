// SPDX-License-Identifier: Apache-2.0

// Package qemu decodes and encodes QEMU's migration stream, its RAM section and
// its return path, for QEMU 7.2 to 10.x.
package qemu
