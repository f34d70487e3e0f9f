// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// cpioEntry is one file of an initramfs.
type cpioEntry struct {
	name         string
	mode         uint32 // type and permissions as in stat(2)
	major, minor uint32 // of a device node
	data         []byte
}

// File types of a cpio mode field.
const (
	modeDirectory = 0o040000
	modeCharacter = 0o020000
	modeRegular   = 0o100000
)

// writeCPIO writes an archive in the "newc" format, the one that the kernel
// unpacks as its first file system (Documentation/driver-api/early-userspace).
func writeCPIO(w io.Writer, entries []cpioEntry) error {
	for i, e := range append(entries, cpioEntry{name: "TRAILER!!!"}) {
		var b bytes.Buffer
		links := 1
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
			i+1, e.mode, 0, 0, links, 0, len(e.data), 0, 0, e.major, e.minor, len(e.name)+1, 0)
		b.WriteString(e.name)
		b.WriteByte(0)
		pad(&b)
		b.Write(e.data)
		pad(&b)
		if _, err := w.Write(b.Bytes()); err != nil {
			return fmt.Errorf("writing %s into the initramfs: %w", e.name, err)
		}
	}
	return nil
}

// pad fills up to a multiple of four bytes, as the format asks after each
// header and each file.
func pad(b *bytes.Buffer) {
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
}

// writeInitramfs makes the guest's initramfs: the init program and a console
// for its first words.
func writeInitramfs(path, init string) error {
	program, err := os.ReadFile(init)
	if err != nil {
		return fmt.Errorf("reading the guest's init: %w", err)
	}
	var archive bytes.Buffer
	err = writeCPIO(&archive, []cpioEntry{
		{name: "dev", mode: modeDirectory | 0o755},
		{name: "dev/console", mode: modeCharacter | 0o600, major: 5, minor: 1},
		{name: "proc", mode: modeDirectory | 0o755},
		{name: "init", mode: modeRegular | 0o755, data: program},
	})
	if err != nil {
		return err
	}
	return writeAtomically(path, archive.Bytes())
}

// writeAtomically writes a file so that another process sees all of it or
// nothing.
func writeAtomically(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // there is none once it was renamed
	if _, err := f.Write(data); err != nil {
		f.Close()
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
