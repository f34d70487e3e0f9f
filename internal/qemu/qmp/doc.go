// SPDX-License-Identifier: Apache-2.0

// Package qmp is a small client of the QEMU Machine Protocol.
package qmp
