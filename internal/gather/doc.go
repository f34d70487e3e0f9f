// SPDX-License-Identifier: Apache-2.0

// Package gather is the destination engine: it begins a migration stream into the
// destination QEMU and gathers the VM's memory from wherever it lies.
package gather
