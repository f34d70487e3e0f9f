// SPDX-License-Identifier: Apache-2.0

// Package pages knows where every page of a migrating VM lies: the layout of its
// RAM blocks, the page map with versions, the versions given out, and the order of
// prepaging. It has no clocks and no goroutines, and its only I/O is the file that
// may lie under a Map.
//
// Nothing in this package is safe for concurrent use; the engine that owns a value
// guards it.
package pages
