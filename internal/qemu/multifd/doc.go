// SPDX-License-Identifier: Apache-2.0

// Package multifd decodes the multifd channels of a migrating source QEMU.
package multifd
