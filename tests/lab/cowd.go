// The vmfsSparse delta file ("COWD"): what ESXi puts beside a frozen base on VMFS 5.
//
// Layout (Virtual Disk Format 1.1, "ESX Server Sparse Extent"; read the same by qemu's block/vmdk.c): a
// header of four sectors, a grain directory, then grain tables of 4096 entries and grains in the order in
// which they were first written. An entry is a sector number, 0 for "ask the parent". A grain is one sector.
// There is no mark for a zeroed grain: zeros the guest writes are stored.
package main

import (
	"encoding/binary"
	"fmt"
	"os"
)

const (
	sectorSize       = 512
	cowdMagic        = 0x44574f43 // "COWD", little-endian
	cowdHeaderLen    = 2048
	cowdTableEntries = 4096
	cowdTableSectors = cowdTableEntries * 4 / sectorSize
	cowdMaxSectors   = 1<<32 - 1 // the format counts sectors in 32 bits
)

// cowdFile is one open delta. Its caller serialises access.
type cowdFile struct {
	f       *os.File
	sectors int64
	dir     []uint32         // grain directory: sector of each table, 0 where there is none
	tables  map[int][]uint32 // by directory index
	free    uint32           // first unused sector of the file
}

func createCOWD(path string, capacityBytes int64, parent string) (*cowdFile, error) {
	sectors := capacityBytes / sectorSize
	if sectors > cowdMaxSectors {
		return nil, fmt.Errorf("%s: vmfsSparse holds at most 2 TiB", path)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	tables := (sectors + cowdTableEntries - 1) / cowdTableEntries
	c := &cowdFile{f: f, sectors: sectors, dir: make([]uint32, tables), tables: map[int][]uint32{}}
	dirSectors := (tables*4 + sectorSize - 1) / sectorSize
	c.free = uint32(cowdHeaderLen/sectorSize + dirSectors)
	if err = f.Truncate(int64(c.free) * sectorSize); err == nil {
		err = c.writeHeader(parent)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return c, nil
}

// writeHeader lays the header down; parent is the name of the parent's descriptor.
func (c *cowdFile) writeHeader(parent string) error {
	h := make([]byte, cowdHeaderLen)
	for i, v := range []uint32{
		cowdMagic, 1 /* version */, 3, /* flags */
		uint32(c.sectors), 1 /* grain, sectors */, cowdHeaderLen / sectorSize, uint32(len(c.dir)), c.free,
	} {
		binary.LittleEndian.PutUint32(h[4*i:], v)
	}
	copy(h[32:32+1023], parent)
	_, err := c.f.WriteAt(h, 0)
	return err
}

// entry is the file sector that holds disk sector s, 0 if the parent has it.
func (c *cowdFile) entry(s int64) uint32 {
	if t := c.tables[int(s/cowdTableEntries)]; t != nil {
		return t[s%cowdTableEntries]
	}
	return 0
}

// run is the length in sectors of the run at s, up to limit, that is in the delta contiguously or not at all.
func (c *cowdFile) run(s, limit int64) (at uint32, n int64) {
	at = c.entry(s)
	for n = 1; n < limit; n++ {
		if at == 0 && (s+n)%cowdTableEntries == 0 && c.dir[(s+n)/cowdTableEntries] == 0 {
			n += min(cowdTableEntries, limit-n) - 1
			continue
		}
		e := c.entry(s + n)
		if at == 0 && e != 0 || at != 0 && e != at+uint32(n) {
			break
		}
	}
	return at, n
}

func (c *cowdFile) readOver(p []byte, off int64, below readFunc) error {
	for len(p) > 0 {
		at, n := c.run(off/sectorSize, int64(len(p))/sectorSize)
		part := p[:n*sectorSize]
		var err error
		if at == 0 {
			err = below(part, off)
		} else {
			_, err = c.f.ReadAt(part, int64(at)*sectorSize)
		}
		if err != nil {
			return err
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return nil
}

func (c *cowdFile) writeAt(p []byte, off int64) error {
	for len(p) > 0 {
		s := off / sectorSize
		at, n := c.run(s, min(int64(len(p))/sectorSize, cowdTableEntries-s%cowdTableEntries))
		part := p[:n*sectorSize]
		if at == 0 {
			var err error
			if at, err = c.allocate(s, n); err != nil {
				return err
			}
		}
		if _, err := c.f.WriteAt(part, int64(at)*sectorSize); err != nil {
			return err
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return nil
}

// allocate gives n sectors from s on, all within one table, their places in the file.
func (c *cowdFile) allocate(s, n int64) (uint32, error) {
	d := int(s / cowdTableEntries)
	if c.tables[d] == nil {
		c.tables[d] = make([]uint32, cowdTableEntries)
		c.dir[d] = c.free
		c.free += cowdTableSectors
		if err := c.put32(cowdHeaderLen+int64(d)*4, c.dir[d:d+1]); err != nil {
			return 0, err
		}
	}
	at, first := c.free, s%cowdTableEntries
	for i := int64(0); i < n; i++ {
		c.tables[d][first+i] = at + uint32(i)
	}
	c.free += uint32(n)
	if err := c.f.Truncate(int64(c.free) * sectorSize); err != nil {
		return 0, err
	}
	if err := c.put32(int64(c.dir[d])*sectorSize+first*4, c.tables[d][first:first+n]); err != nil {
		return 0, err
	}
	return at, c.put32(28, []uint32{c.free})
}

func (c *cowdFile) put32(off int64, values []uint32) error {
	b := make([]byte, 4*len(values))
	for i, v := range values {
		binary.LittleEndian.PutUint32(b[4*i:], v)
	}
	_, err := c.f.WriteAt(b, off)
	return err
}

// next is the first run of data at or after off: its offset and length, ok false at the end.
func (c *cowdFile) next(off int64) (start, length int64, ok bool) {
	for s := off / sectorSize; s < c.sectors; {
		at, n := c.run(s, min(c.sectors-s, 16*cowdTableEntries))
		if at != 0 {
			return s * sectorSize, n * sectorSize, true
		}
		s += n
	}
	return 0, 0, false
}

func (c *cowdFile) grain() int64 { return sectorSize }

func (c *cowdFile) close() error { return c.f.Close() }
