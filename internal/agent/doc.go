// SPDX-License-Identifier: Apache-2.0

// Package agent binds the engines of one node to those who drive them.
package agent
