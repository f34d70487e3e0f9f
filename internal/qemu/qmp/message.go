// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// Error is a command that QEMU refused or could not carry out.
type Error struct {
	// Class is QEMU's error class: "GenericError", "CommandNotFound", ...
	Class string
	// Desc is QEMU's text for humans. It differs between versions.
	Desc string
	// Command is the command it answers.
	Command string
}

// Error names the command, QEMU's text and its class.
func (e *Error) Error() string {
	return fmt.Sprintf("qemu refused %s: %s (%s)", e.Command, e.Desc, e.Class)
}

// Event is something QEMU reports on its own.
type Event struct {
	// Name is the event's kind, such as "MIGRATION" or "SHUTDOWN".
	Name string
	// Data is the event's payload, a JSON object, or nil. It belongs to the
	// receiver, but subscriptions of one client share it: it is read only.
	Data json.RawMessage
	// Time is QEMU's own clock; zero when QEMU could not tell.
	Time time.Time
}

// Version is the version of the QEMU at the other end.
type Version struct {
	Major, Minor, Micro int
	// Package is the distributor's version, and may be empty.
	Package string
}

// String returns the version as "major.minor.micro".
func (v Version) String() string {
	return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro)
}

type kind uint8

const (
	kindGreeting kind = iota + 1
	kindReturn
	kindError
	kindEvent
)

// message is one decoded line. Which fields are set depends on its kind.
type message struct {
	kind    kind
	hasID   bool
	id      uint64
	payload json.RawMessage // of a return or of an event
	err     Error           // without Command
	event   string
	time    time.Time
	version Version
	oob     bool
}

// rawMessage has every member that a line of QEMU's may carry.
type rawMessage struct {
	QMP    *rawGreeting    `json:"QMP"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp *struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
	ID json.RawMessage `json:"id"`
}

type rawGreeting struct {
	Version struct {
		QEMU struct {
			Major int `json:"major"`
			Minor int `json:"minor"`
			Micro int `json:"micro"`
		} `json:"qemu"`
		Package string `json:"package"`
	} `json:"version"`
	Capabilities []json.RawMessage `json:"capabilities"`
}

var errShape = errors.New("neither greeting, reply, error nor event")

// decode reads one line. What it returns shares no memory with the line.
func decode(line []byte) (message, error) {
	var raw rawMessage
	if err := json.Unmarshal(line, &raw); err != nil {
		return message{}, fmt.Errorf("message %s: %w", excerpt(line), err)
	}
	m, err := raw.message()
	if err != nil {
		return message{}, fmt.Errorf("message %s: %w", excerpt(line), err)
	}
	return m, nil
}

func (raw *rawMessage) message() (message, error) {
	var m message
	if raw.ID != nil {
		// An id that is no number of ours answers nothing we asked.
		if err := json.Unmarshal(raw.ID, &m.id); err != nil {
			return m, fmt.Errorf("id: %w", err)
		}
		m.hasID = true
	}
	switch {
	case raw.QMP != nil:
		m.kind = kindGreeting
		q := raw.QMP.Version.QEMU
		m.version = Version{q.Major, q.Minor, q.Micro, raw.QMP.Version.Package}
		m.oob = raw.QMP.offersOOB()
	case raw.Error != nil:
		m.kind = kindError
		m.err = Error{Class: raw.Error.Class, Desc: raw.Error.Desc}
	case raw.Event != "":
		m.kind, m.event, m.payload = kindEvent, raw.Event, raw.Data
		// QEMU writes -1 for both where the host's clock failed.
		if t := raw.Timestamp; t != nil && t.Seconds >= 0 && t.Microseconds >= 0 {
			m.time = time.Unix(t.Seconds, 0).Add(time.Duration(t.Microseconds%1e6) * time.Microsecond)
		}
	case raw.Return != nil:
		m.kind, m.payload = kindReturn, raw.Return
	default:
		return m, errShape
	}
	return m, nil
}

func (g *rawGreeting) offersOOB() bool {
	for _, raw := range g.Capabilities {
		// A later QEMU may list capabilities that are no strings: they are not ours.
		var name string
		if json.Unmarshal(raw, &name) == nil && name == "oob" {
			return true
		}
	}
	return false
}

// excerpt quotes the beginning of a line for an error message.
func excerpt(line []byte) string {
	const most = 120
	if len(line) > most {
		return fmt.Sprintf("%q...", line[:most])
	}
	return fmt.Sprintf("%q", line)
}
