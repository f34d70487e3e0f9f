// SPDX-License-Identifier: Apache-2.0

// Package bench measures what the project promises: each row of its table is a
// ratio of two times, both taken in the same round of runs on the same machine, so
// that the machine's own speed drops out.
//
// A round is a list of scenarios: one migration each, by one method, over given
// links. Rows share scenarios, and a row's value is computed from the runs of one
// round only. What the table shows is the median over the rounds, with the smallest
// and the largest value beside it.
//
// The links are shaped so slow that they, and not the machine's processors, are what
// every method waits for; only the rows about throughput run unshaped. A missed
// target is told and is no failure. A wrong page or a run that fails is one.
package bench
