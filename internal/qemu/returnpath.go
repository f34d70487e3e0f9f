// SPDX-License-Identifier: Apache-2.0

package qemu

import "fmt"

// RPType is the type of a return-path message, from the destination to the
// source (QEMU migration/migration.h, enum mig_rp_message_type).
type RPType uint16

// The return-path messages.
const (
	RPShut          RPType = 1 // Value: 0 for success
	RPPong          RPType = 2 // Value: of the PING
	RPReqPagesID    RPType = 3 // Block, Start, Length
	RPReqPages      RPType = 4 // likewise, of the block asked for last
	RPRecvBitmap    RPType = 5 // Block, Bitmap
	RPResumeAck     RPType = 6 // Value: 1
	RPSwitchoverAck RPType = 7
)

var rpNames = [...]string{
	RPShut: "SHUT", RPPong: "PONG", RPReqPagesID: "REQ_PAGES_ID", RPReqPages: "REQ_PAGES",
	RPRecvBitmap: "RECV_BITMAP", RPResumeAck: "RESUME_ACK", RPSwitchoverAck: "SWITCHOVER_ACK",
}

// String returns QEMU's name of the message.
func (t RPType) String() string {
	if int(t) < len(rpNames) && rpNames[t] != "" {
		return rpNames[t]
	}
	return fmt.Sprintf("return-path message %d", uint16(t))
}

// RPMessage is one message of the return path. RPDecoder.Next overwrites all of
// it.
type RPMessage struct {
	Type   RPType
	Value  uint32 // RPShut, RPPong, RPResumeAck
	Block  int    // index into the decoder's blocks: requests and RPRecvBitmap
	Start  uint64 // requests: bytes from the beginning of the block
	Length uint64 // requests: bytes, within the block
	// Bitmap is the reply to RECV_BITMAP: bit i of the little-endian bit string
	// is page i (of pages.Size bytes) of the block. It belongs to the decoder
	// until the next call of Next.
	Bitmap []byte
}

// AppendShut appends SHUT; a status of 0 tells the source that all went well.
func AppendShut(dst []byte, status uint32) []byte { return appendRPValue(dst, RPShut, status) }

// AppendPong appends the answer to a PING.
func AppendPong(dst []byte, value uint32) []byte { return appendRPValue(dst, RPPong, value) }

// AppendResumeAck appends the answer to POSTCOPY_RESUME.
func AppendResumeAck(dst []byte) []byte { return appendRPValue(dst, RPResumeAck, 1) }

// AppendSwitchoverAck appends SWITCHOVER_ACK.
func AppendSwitchoverAck(dst []byte) []byte { return appendRPHeader(dst, RPSwitchoverAck, 0) }

// AppendReqPagesID appends a request for length bytes of the named block.
func AppendReqPagesID(dst []byte, block string, start uint64, length uint32) []byte {
	dst = appendRPHeader(dst, RPReqPagesID, 13+len(block))
	dst = be.AppendUint32(be.AppendUint64(dst, start), length)
	return appendName(dst, block)
}

// AppendReqPages appends a request for length bytes of the block of the last
// AppendReqPagesID on the same connection.
func AppendReqPages(dst []byte, start uint64, length uint32) []byte {
	dst = appendRPHeader(dst, RPReqPages, 12)
	return be.AppendUint32(be.AppendUint64(dst, start), length)
}

// AppendRecvBitmapReply appends the answer to RECV_BITMAP. The bitmap is as in
// RPMessage.Bitmap and is padded to a multiple of 8 bytes.
func AppendRecvBitmapReply(dst []byte, block string, bitmap []byte) []byte {
	dst = appendName(appendRPHeader(dst, RPRecvBitmap, 1+len(block)), block)
	n := (len(bitmap) + 7) &^ 7
	dst = append(be.AppendUint64(dst, uint64(n)), bitmap...)
	for range n - len(bitmap) {
		dst = append(dst, 0)
	}
	return be.AppendUint64(dst, recvBitmapTrailer)
}

// recvBitmapTrailer is RAMBLOCK_RECV_BITMAP_ENDING of QEMU migration/ram.c.
const recvBitmapTrailer = 0x0123456789abcdef

func appendRPHeader(dst []byte, t RPType, n int) []byte {
	return be.AppendUint16(be.AppendUint16(dst, uint16(t)), uint16(n))
}

func appendRPValue(dst []byte, t RPType, v uint32) []byte {
	return be.AppendUint32(appendRPHeader(dst, t, 4), v)
}
