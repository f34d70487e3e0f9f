// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"encoding/binary"

	"scattergather.io/scattergather/internal/pages"
)

// Holder is one intermediary in the table of a migration. Its place in the table, 0
// first, is pages.FirstHolder+place in page map records.
type Holder struct {
	// Name is for people. At most 253 bytes.
	Name string
	// Addr is "host:port" to dial. At most 261 bytes.
	Addr string
	// Identity is what the intermediary must prove.
	Identity Identity
	// Session is the reservation that holds the pages.
	Session Session
}

// Setup tells the destination what comes: the first message of a source about a
// migration.
type Setup struct {
	// Key opens the pages. It never leaves source and destination.
	Key Key
	// Strategy is the name of the way of the migration, "immediate" or "hybrid"; at
	// most 63 bytes.
	Strategy string
	// Machine is the machine type, for a check before QEMU's own and for people. At
	// most 255 bytes.
	Machine string
	// Config is the beginning of QEMU's stream up to its configuration section,
	// verbatim; at most MaxSetupStream bytes together with Early.
	Config []byte
	// Early holds the device sections of the stream's set-up phase, verbatim.
	Early []byte
	// Section, Instance and Version are from the header of the RAM section.
	Section, Instance, Version uint32
	// Postcopy is true when the source's stream announced post-copy, and with it the
	// blocks' true page sizes.
	Postcopy bool
	// Blocks are the RAM blocks in the stream's order. ParseSetup bounds them;
	// pages.NewLayout validates them.
	Blocks []pages.Block
	// Holders is the table of intermediaries as it is known now.
	Holders []Holder
}

// MaxSetupStream bounds Config and Early of a Setup in bytes, together.
const MaxSetupStream = 256 << 10

// Holders adds intermediaries at the end of the table of Setup. Places never change
// their meaning. First is the size of the table before; a repeated message adds
// nothing.
type Holders struct {
	First   uint16
	Holders []Holder
}

const (
	maxStrategy = 63
	maxMachine  = 255
	maxName     = 253
	maxAddr     = len("[]:65535") + maxName
	// minHolder and minBlock are the sizes of those items with empty strings.
	minHolder = 2 + 2 + 2 + 16
	minBlock  = 2 + 8 + 8
)

// Type returns TypeSetup.
func (*Setup) Type() Type { return TypeSetup }

// Append appends the body to dst.
func (m *Setup) Append(dst []byte) ([]byte, error) {
	if n := len(m.Config) + len(m.Early); n > MaxSetupStream {
		return nil, tooMany("Setup", "bytes of the stream's set-up phase", n, MaxSetupStream)
	}
	if n := len(m.Blocks); n > pages.MaxBlocks {
		return nil, tooMany("Setup", "RAM blocks", n, pages.MaxBlocks)
	}
	dst = append(dst, m.Key[:]...)
	var err error
	if dst, err = appendText(dst, "Setup", "strategy", m.Strategy, maxStrategy); err != nil {
		return nil, err
	}
	if dst, err = appendText(dst, "Setup", "machine", m.Machine, maxMachine); err != nil {
		return nil, err
	}
	for _, b := range [][]byte{m.Config, m.Early} {
		dst = binary.BigEndian.AppendUint32(dst, uint32(len(b)))
		dst = append(dst, b...)
	}
	for _, v := range []uint32{m.Section, m.Instance, m.Version} {
		dst = binary.BigEndian.AppendUint32(dst, v)
	}
	dst = appendBool(dst, m.Postcopy)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(m.Blocks)))
	for i := range m.Blocks {
		b := &m.Blocks[i]
		if dst, err = appendText(dst, "Setup", "block name", b.Name, pages.MaxName); err != nil {
			return nil, err
		}
		dst = binary.BigEndian.AppendUint64(dst, b.Length)
		dst = binary.BigEndian.AppendUint64(dst, b.PageSize)
	}
	return appendHolders(dst, "Setup", m.Holders)
}

// ParseSetup reads the body of a Setup frame and copies it.
func ParseSetup(body []byte) (*Setup, error) {
	d := decoder{message: "Setup", rest: body}
	m := &Setup{Key: d.array("key")}
	m.Strategy = d.text("strategy", maxStrategy)
	m.Machine = d.text("machine", maxMachine)
	m.Config = d.bytes("stream configuration", MaxSetupStream)
	m.Early = d.bytes("early sections", MaxSetupStream-len(m.Config))
	m.Section, m.Instance, m.Version = d.u32("section"), d.u32("instance"), d.u32("section version")
	m.Postcopy = d.bool("postcopy")
	if n := d.count("RAM blocks", pages.MaxBlocks, minBlock); n > 0 {
		m.Blocks = make([]pages.Block, n)
	}
	for i := range m.Blocks {
		m.Blocks[i] = pages.Block{
			Name:   d.text("block name", pages.MaxName),
			Length: d.u64("block length"), PageSize: d.u64("block page size"),
		}
	}
	m.Holders = d.holders()
	if err := d.end(); err != nil {
		return nil, err
	}
	return m, nil
}

// Type returns TypeHolders.
func (*Holders) Type() Type { return TypeHolders }

// Append appends the body to dst.
func (m *Holders) Append(dst []byte) ([]byte, error) {
	if n := int(m.First) + len(m.Holders); n > MaxHolders {
		return nil, tooMany("Holders", "intermediaries", n, MaxHolders)
	}
	return appendHolders(binary.BigEndian.AppendUint16(dst, m.First), "Holders", m.Holders)
}

// ParseHolders reads the body of a Holders frame and copies it.
func ParseHolders(body []byte) (*Holders, error) {
	d := decoder{message: "Holders", rest: body}
	m := &Holders{First: d.u16("first"), Holders: d.holders()}
	if n := int(m.First) + len(m.Holders); n > MaxHolders {
		d.fail("first", "a table of %d intermediaries, at most %d allowed", n, MaxHolders)
	}
	if err := d.end(); err != nil {
		return nil, err
	}
	return m, nil
}

func appendHolders(dst []byte, message string, holders []Holder) ([]byte, error) {
	if len(holders) > MaxHolders {
		return nil, tooMany(message, "intermediaries", len(holders), MaxHolders)
	}
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(holders)))
	var err error
	for i := range holders {
		h := &holders[i]
		if dst, err = appendText(dst, message, "holder name", h.Name, maxName); err != nil {
			return nil, err
		}
		if dst, err = appendText(dst, message, "holder address", h.Addr, maxAddr); err != nil {
			return nil, err
		}
		if err = h.Identity.check(); err != nil {
			return nil, err
		}
		if dst, err = appendText(dst, message, "holder identity", string(h.Identity), MaxIdentity); err != nil {
			return nil, err
		}
		dst = append(dst, h.Session[:]...)
	}
	return dst, nil
}

func (d *decoder) holders() []Holder {
	n := d.count("holders", MaxHolders, minHolder)
	if n == 0 {
		return nil
	}
	holders := make([]Holder, n)
	for i := range holders {
		holders[i] = Holder{
			Name: d.text("holder name", maxName), Addr: d.text("holder address", maxAddr),
			Identity: d.identity("holder identity"), Session: d.array("holder session"),
		}
	}
	return holders
}
