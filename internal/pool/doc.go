// SPDX-License-Identifier: Apache-2.0

// Package pool is the memory that an intermediary lends to migrations of other
// nodes. It holds ciphertext only.
package pool
