// What the lab puts on a fresh disk: a boot sector that says it ran, then seeded data, zero runs and holes.
package main

import (
	"encoding/binary"
	"hash/fnv"
	"math/rand/v2"
)

const (
	bootMessage      = "HYPER2KVM BOOT OK\r\n"
	contentUnit      = 64 << 10  // holes and runs are drawn in these
	defaultDataLimit = 256 << 20 // bytes of data written to a disk unless the scenario asks for more
)

// bootCode is 16-bit code for 0000:7C00: it prints the message behind it on COM1 and, through the BIOS, on the
// screen, then writes to the ports of QEMU's isa-debug-exit device (0x501, its default, and 0xf4, the usual
// choice) and halts.
var bootCode = []byte{
	0xFA,       // cli
	0x31, 0xC0, // xor ax, ax
	0x31, 0xDB, // xor bx, bx (page 0)
	0x8E, 0xD8, // mov ds, ax
	0x8E, 0xD0, // mov ss, ax
	0xBC, 0x00, 0x7C, // mov sp, 0x7c00
	0xBE, 0x35, 0x7C, // mov si, message
	0xAC,       // next: lodsb
	0x84, 0xC0, // test al, al
	0x74, 0x16, // jz done
	0x88, 0xC3, // mov bl, al
	0xBA, 0xFD, 0x03, // mov dx, COM1 line status
	0xEC,       // wait: in al, dx
	0xA8, 0x20, // test al, 0x20 (transmitter empty)
	0x74, 0xFB, // jz wait
	0xBA, 0xF8, 0x03, // mov dx, COM1
	0x88, 0xD8, // mov al, bl
	0xEE,       // out dx, al
	0xB4, 0x0E, // mov ah, teletype
	0xCD, 0x10, // int 0x10
	0xEB, 0xE5, // jmp next
	0xB0, 0x10, // done: mov al, 0x10
	0xBA, 0x01, 0x05, // mov dx, 0x501
	0xEE,       // out dx, al
	0xE6, 0xF4, // out 0xf4, al
	0xF4,       // hlt: hlt
	0xEB, 0xFD, // jmp hlt
}

func bootSector() []byte {
	s := make([]byte, sectorSize)
	n := copy(s, bootCode)
	copy(s[n:], bootMessage) // and a 0 after it
	s[510], s[511] = 0x55, 0xAA
	return s
}

// source is the seeded generator of one disk's content.
func source(seed uint64, name string) *rand.ChaCha8 {
	h := fnv.New64a()
	h.Write([]byte(name))
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	binary.LittleEndian.PutUint64(key[8:], h.Sum64())
	return rand.NewChaCha8(key)
}

// fill writes the content of a fresh disk: dataBytes of random data (about: runs are drawn) spread over it, about a
// sixth as much in stored zeros, the rest left as holes. First and last sector are always data.
func fill(write writeFunc, size, dataBytes int64, src *rand.ChaCha8) error {
	r := rand.New(src)
	share := float64(dataBytes) / float64(size)
	step := int64(16 * contentUnit) // one run in each step
	if n := size / step; n > 4096 { // a huge disk: fewer, wider steps
		step = size / 4096 / contentUnit * contentUnit
	}
	buf := make([]byte, 1<<20)
	for at := int64(0); at < size; at += step {
		room := min(step, size-at)
		data := min(room, int64(float64(room)*share*(0.5+r.Float64()))/sectorSize*sectorSize)
		start := at + r.Int64N((room-data)/sectorSize+1)*sectorSize
		if err := put(write, start, data, buf, src); err != nil {
			return err
		}
		zeros := min(data/6/sectorSize*sectorSize, at+room-start-data)
		if err := put(write, start+data, zeros, buf, nil); err != nil {
			return err
		}
	}
	last := make([]byte, sectorSize)
	src.Read(last)
	if err := write(last, size-sectorSize); err != nil {
		return err
	}
	return write(bootSector(), 0)
}

// put writes n bytes at off: from src, or zeros.
func put(write writeFunc, off, n int64, buf []byte, src *rand.ChaCha8) error {
	for n > 0 {
		part := buf[:min(n, int64(len(buf)))]
		if src != nil {
			src.Read(part)
		} else {
			clear(part)
		}
		if err := write(part, off); err != nil {
			return err
		}
		off, n = off+int64(len(part)), n-int64(len(part))
	}
	return nil
}

// randomBytes is what `guest-write` writes for a seed.
func randomBytes(seed uint64, n int64) []byte {
	p := make([]byte, n)
	source(seed, "guest-write").Read(p)
	return p
}
