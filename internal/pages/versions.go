// SPDX-License-Identifier: Apache-2.0

package pages

const (
	// chunkPages is the number of pages whose versions are allocated together: one
	// chunk is 64 KiB and stands for 128 MiB of RAM.
	chunkPages = 32 << 10
	chunkBytes = chunkPages * 2
)

func chunkCount(pages uint64) uint64 { return (pages + chunkPages - 1) / chunkPages }

// versions holds a version per page and no memory for chunks in which every page is
// still in version 0.
type versions struct {
	chunks [][]Version
	used   uint64 // chunks that exist
}

func newVersions(pages uint64) versions {
	return versions{chunks: make([][]Version, chunkCount(pages))}
}

func (v *versions) at(i Index) Version {
	if chunk := v.chunks[i/chunkPages]; chunk != nil {
		return chunk[i%chunkPages]
	}
	return 0
}

// put stores a version, in new heap memory where none was.
func (v *versions) put(i Index, version Version) {
	if c := i / chunkPages; v.chunks[c] == nil {
		v.add(uint64(c), make([]Version, chunkPages))
	}
	v.write(i, version)
}

// add gives chunk c its memory: zeroed, and for chunkPages versions.
func (v *versions) add(c uint64, memory []Version) {
	v.chunks[c] = memory
	v.used++
}

// write stores a version in a chunk that exists. It is a real call, so that the
// compiler joins no stores across it; see Map.supersede.
//
//go:noinline
func (v *versions) write(i Index, version Version) {
	v.chunks[i/chunkPages][i%chunkPages] = version
}

func (v *versions) bytes() uint64 { return v.used*chunkBytes + 24*uint64(len(v.chunks)) }
