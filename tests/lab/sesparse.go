// The seSparse delta file: what ESXi uses for disks above 2 TiB, and for all on VMFS 6.
//
// The format is not published; what is known is what qemu's block/vmdk.c reads (4 KiB grains, tables of 4096 entries
// of 8 bytes, a directory of the same), and qemu-img is the judge of what is written here. The lab uses it only where
// vmfsSparse cannot reach. Journal, free bitmap and back map stay empty.
package main

import (
	"encoding/binary"
	"os"
)

const (
	seGrain        = 4096
	seTableEntries = 4096
	seTableSectors = seTableEntries * 8 / sectorSize
	seTableSpan    = seTableEntries * seGrain
	seConstMagic   = 0xcafebabe
	seVolatile     = 0xcafecafe
	seVersion      = 0x0000000200000001
	seDirSector    = 4096 // headers, then a journal at 2048, come before
	seAllocated    = 0x3 << 60
	seTablePresent = 0x1 << 60
)

// seSparseFile is one open delta. Its caller serialises access.
type seSparseFile struct {
	f        *os.File
	capacity int64
	dir      []int64           // number of each table plus 1, 0 where there is none
	tables   map[int64][]int64 // by directory index: number of each grain plus 1
	nTables  int64
	nGrains  int64
	tablesAt int64 // sector of the first table
	grainsAt int64 // sector of the first grain
}

func createSeSparse(path string, capacity int64) (*seSparseFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	n := (capacity + seTableSpan - 1) / seTableSpan
	x := &seSparseFile{f: f, capacity: capacity, dir: make([]int64, n), tables: map[int64][]int64{}}
	if err = x.writeHeaders(n); err != nil {
		f.Close()
		return nil, err
	}
	return x, nil
}

// writeHeaders lays out a file for n tables at most, each area as long as it could have to be.
func (x *seSparseFile) writeHeaders(n int64) error {
	dirSectors := (n*8 + sectorSize - 1) / sectorSize
	grains := n * seTableEntries
	bitmapSectors := (grains/8 + sectorSize - 1) / sectorSize
	backmapSectors := (grains*8 + sectorSize - 1) / sectorSize
	x.tablesAt = seDirSector + dirSectors
	bitmapAt := x.tablesAt + n*seTableSectors
	backmapAt := bitmapAt + bitmapSectors
	x.grainsAt = (backmapAt + backmapSectors + 7) / 8 * 8
	head := make([]byte, 2*sectorSize)
	for i, v := range []int64{
		seConstMagic, seVersion, x.capacity / sectorSize, seGrain / sectorSize, seTableSectors, 0, 0, 0, 0, 0,
		1, 1, 2, 2, 2048, 2048, // volatile header, journal header, journal
		seDirSector, dirSectors, x.tablesAt, n * seTableSectors, bitmapAt, bitmapSectors,
		backmapAt, backmapSectors, x.grainsAt, grains * (seGrain / sectorSize),
	} {
		binary.LittleEndian.PutUint64(head[8*i:], uint64(v))
	}
	binary.LittleEndian.PutUint64(head[sectorSize:], seVolatile)
	if _, err := x.f.WriteAt(head, 0); err != nil {
		return err
	}
	return x.f.Truncate(x.grainsAt * sectorSize)
}

// place is where in the file the grain at off lies, -1 for nowhere.
func (x *seSparseFile) place(off int64) int64 {
	table := x.tables[off/seTableSpan]
	if table == nil || table[off%seTableSpan/seGrain] == 0 {
		return -1
	}
	return x.grainsAt*sectorSize + (table[off%seTableSpan/seGrain]-1)*seGrain + off%seGrain
}

func (x *seSparseFile) readOver(p []byte, off int64, below readFunc) error {
	for len(p) > 0 {
		if span := (off/seTableSpan+1)*seTableSpan - off; x.tables[off/seTableSpan] == nil {
			part := p[:min(int64(len(p)), span)]
			if err := below(part, off); err != nil {
				return err
			}
			p, off = p[len(part):], off+int64(len(part))
			continue
		}
		part := p[:min(int64(len(p)), seGrain-off%seGrain)]
		var err error
		if at := x.place(off); at < 0 {
			err = below(part, off)
		} else {
			_, err = x.f.ReadAt(part, at)
		}
		if err != nil {
			return err
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return nil
}

// writeAt writes whole grains: off is a multiple of one, and so is len(p) but at the end of the disk.
func (x *seSparseFile) writeAt(p []byte, off int64) error {
	for len(p) > 0 {
		part := p[:min(int64(len(p)), seGrain)]
		if x.place(off) < 0 {
			if err := x.allocate(off); err != nil {
				return err
			}
		}
		if _, err := x.f.WriteAt(part, x.place(off)); err != nil {
			return err
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return nil
}

// allocate gives the grain at off its place, and its table one if need be.
func (x *seSparseFile) allocate(off int64) error {
	d, e := off/seTableSpan, off%seTableSpan/seGrain
	if x.tables[d] == nil {
		x.tables[d] = make([]int64, seTableEntries)
		x.nTables++
		x.dir[d] = x.nTables
		if err := x.put64(seDirSector*sectorSize+d*8, seTablePresent|uint64(x.nTables-1)); err != nil {
			return err
		}
	}
	n := uint64(x.nGrains)
	x.nGrains++
	x.tables[d][e] = x.nGrains
	if err := x.f.Truncate(x.grainsAt*sectorSize + x.nGrains*seGrain); err != nil {
		return err
	}
	entry := (x.tablesAt+(x.dir[d]-1)*seTableSectors)*sectorSize + e*8
	return x.put64(entry, seAllocated|(n&0xfff)<<48|n>>12) // the low bits of the number stand on top
}

func (x *seSparseFile) put64(off int64, v uint64) error {
	_, err := x.f.WriteAt(binary.LittleEndian.AppendUint64(nil, v), off)
	return err
}

func (x *seSparseFile) next(off int64) (start, length int64, ok bool) {
	for off = off / seGrain * seGrain; off < x.capacity; {
		if x.tables[off/seTableSpan] == nil {
			off = (off/seTableSpan + 1) * seTableSpan
			continue
		}
		if x.place(off) >= 0 {
			return off, min(seGrain, x.capacity-off), true
		}
		off += seGrain
	}
	return 0, 0, false
}

func (x *seSparseFile) grain() int64 { return seGrain }

func (x *seSparseFile) close() error { return x.f.Close() }
