// SPDX-License-Identifier: Apache-2.0

// Package pages knows where every page of a migrating VM lies: the layout of its
// RAM blocks, the page map with versions, and the order of prepaging. It is pure:
// no I/O, no clocks, no goroutines.
package pages
