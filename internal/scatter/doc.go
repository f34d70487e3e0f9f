// SPDX-License-Identifier: Apache-2.0

// Package scatter is the source engine: it ends the source QEMU's migration
// stream and scatters the VM's memory to the destination and to intermediaries.
package scatter
