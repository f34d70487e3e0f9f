// SPDX-License-Identifier: Apache-2.0

package wire

// Journal keeps the control frames of a source that the destination has not applied
// yet, so that they can be sent again when the connection was lost. It numbers them
// from 1. It is safe for concurrent use.
//
// Journalled are Setup, Holders, Records, Package, State, Commit and Abort.
type Journal struct{}

// NewJournal returns an empty journal without a lane.
func NewJournal() *Journal { return &Journal{} }

// Send numbers and keeps a message, and sends it on the attached lane. While no lane
// is attached, or when sending fails, the message waits for the next Attach. It fails
// only for messages beyond a limit of the protocol.
func (j *Journal) Send(m Message) (seq uint64, err error) { return 0, errSkeleton }

// Attach sends everything after applied on a new control lane and uses the lane from
// now on. It fails when the lane does, or when applied is a number that was never
// given, or is older than what Applied reported before.
func (j *Journal) Attach(l *Lane, applied uint64) error { return errSkeleton }

// Detach forgets the lane: messages are kept only.
func (j *Journal) Detach() {}

// Applied drops the frames up to and including seq.
func (j *Journal) Applied(seq uint64) error { return errSkeleton }

// Pending returns the number of frames and bytes that are not applied yet.
func (j *Journal) Pending() (frames, bytes int) { return 0, 0 }
