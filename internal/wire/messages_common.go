// SPDX-License-Identifier: Apache-2.0

package wire

import "fmt"

// Code says what kind of error a peer reports.
type Code uint16

// The error codes. A receiver treats codes it does not know like CodeInternal.
const (
	// CodeInternal: the peer failed for a reason of its own; see the text.
	CodeInternal Code = 1
	// CodeVersion: no common protocol version.
	CodeVersion Code = 2
	// CodeProtocol: the peer says that it received what the protocol forbids.
	CodeProtocol Code = 3
	// CodeForbidden: the identity may not do this in this migration.
	CodeForbidden Code = 4
	// CodeUnknown: the migration or session is not known here.
	CodeUnknown Code = 5
	// CodeBusy: too many connections, or another connection serves the migration.
	CodeBusy Code = 6
	// CodeFull: no room for more pages.
	CodeFull Code = 7
	// CodeIncompatible: the destination's QEMU does not accept this VM.
	CodeIncompatible Code = 8
	// CodeIncomplete: at Commit, pages are missing at the destination.
	CodeIncomplete Code = 9
	// CodeGone: the session existed and was dissolved or has run out.
	CodeGone Code = 10
	// CodeStopping: the agent is shutting down.
	CodeStopping Code = 11
)

// String returns the code's name.
func (c Code) String() string { return fmt.Sprintf("code %d", uint16(c)) }

// Error is an error reported by the peer, and the message that reports it. As a
// message, it does not by itself close the connection. The frame's number is that of
// the frame it answers, or 0.
type Error struct {
	Code Code
	// Text says what was wrong, for people; at most MaxText bytes.
	Text string
}

// Error returns the text with the code's name.
func (e *Error) Error() string { return fmt.Sprintf("peer: %v: %s", e.Code, e.Text) }

// Type returns TypeError.
func (*Error) Type() Type { return TypeError }

// Append appends the body to dst.
func (e *Error) Append(dst []byte) ([]byte, error) { return nil, errSkeleton }

// ParseError reads the body of an Error frame.
func ParseError(body []byte) (*Error, error) { return nil, errSkeleton }
