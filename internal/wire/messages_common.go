// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"encoding/binary"
	"fmt"
)

// Code says what kind of error a peer reports.
type Code uint16

// The error codes. Newer peers may send others; treat those like CodeInternal.
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

var codeNames = [...]string{
	CodeInternal: "internal error", CodeVersion: "version", CodeProtocol: "protocol violation",
	CodeForbidden: "forbidden", CodeUnknown: "unknown", CodeBusy: "busy", CodeFull: "full",
	CodeIncompatible: "incompatible", CodeIncomplete: "incomplete", CodeGone: "gone",
	CodeStopping: "stopping",
}

// String returns the code's name.
func (c Code) String() string {
	if int(c) < len(codeNames) && codeNames[c] != "" {
		return codeNames[c]
	}
	return fmt.Sprintf("code %d", uint16(c))
}

// Error is an error that the peer reports, and the message that reports it. As a
// message, it does not by itself close the connection. The frame's number is that of
// the frame it answers, or 0.
type Error struct {
	Code Code
	// Text says what was wrong, for people. Append cuts it to MaxText bytes.
	Text string
}

// Error returns the code's name with the text, quoted when it is not printable.
func (e *Error) Error() string {
	return fmt.Sprintf("the peer reports: %v: %s", e.Code, printable(e.Text))
}

// printable keeps a peer from writing control characters into our logs.
func printable(s string) string {
	for _, r := range s {
		if r < ' ' || r == 0x7f || r == '\ufffd' {
			return fmt.Sprintf("%q", s)
		}
	}
	return s
}

// Type returns TypeError.
func (*Error) Type() Type { return TypeError }

// Append appends the body to dst.
func (e *Error) Append(dst []byte) ([]byte, error) {
	dst = binary.BigEndian.AppendUint16(dst, uint16(e.Code))
	return appendText(dst, "Error", "text", cut(e.Text), MaxText)
}

// ParseError reads the body of an Error frame.
func ParseError(body []byte) (*Error, error) {
	d := decoder{message: "Error", rest: body}
	e := &Error{Code: Code(d.u16("code")), Text: d.text("text", MaxText)}
	if err := d.end(); err != nil {
		return nil, err
	}
	return e, nil
}
