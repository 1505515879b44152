// Stream-optimised VMDKs: what a host makes, out of what qemu-img makes.
//
// qemu-img can seek: it writes the grain directory and tables first. A host cannot: each table follows its grains, then
// the directory, a footer that says where that is, and the end-of-stream marker (Virtual Disk Format 5.0,
// "Stream-Optimized Compressed Sparse Extents"). Grains and their order are taken as they are.
//
// Lies, each in the encoding that is otherwise sound: "capacity" (a header of another disk), "order" (two grains
// change places), "twice" (a grain comes twice), "beyond" (a grain past the end), "size" (a marker of another size),
// "marker" (of no known type), "deflate" (a bit in a grain), "short" (a grain that holds too little), "dropped" (a grain
// that its table has and the stream has not), "table" (an entry of a table), "directory", "footer" (no footer), "eos" (no end-of-stream
// marker), "truncated" (it ends well, half-way), "trailing" (more after the end).
package main

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"slices"
)

var leaseLies = []string{
	"capacity", "order", "twice", "beyond", "size", "marker", "deflate", "short", "dropped", "table", "directory",
	"footer", "eos", "truncated", "trailing",
}

const (
	markerEOS, markerTable, markerDirectory, markerFooter = 0, 1, 2, 3

	tableEntries  = 512
	streamTop     = 128 // sectors before the first grain
	atTheEnd      = ^uint64(0)
	markerOfGrain = 12 // bytes before a grain's data
)

// sparseHeader is the head of a hosted sparse extent (Virtual Disk Format 5.0, SparseExtentHeader).
type sparseHeader struct {
	Magic, Version, Flags                                   uint32
	Capacity, GrainSize, DescriptorOffset, DescriptorLength uint64
	TableEntries                                            uint32
	RedundantOffset, DirectoryOffset, Overhead              uint64
	Unclean                                                 uint8
	Newlines                                                [4]byte
	Compression                                             uint16
	_                                                       [433]byte
}

// grain is one as it is in the stream: sector on the disk, deflated data.
type grain struct {
	lba  uint64
	data []byte
}

// qemuStream reads the grains of qemu-img's encoding, in the order of the disk.
type qemuStream struct {
	f      *os.File
	header sparseHeader
	tables []uint32
}

func openStream(f *os.File) (*qemuStream, error) {
	s := &qemuStream{f: f}
	if err := binary.Read(f, binary.LittleEndian, &s.header); err != nil {
		return nil, err
	}
	covered := s.header.GrainSize * tableEntries
	s.tables = make([]uint32, (s.header.Capacity+covered-1)/covered)
	return s, s.readAt(s.header.DirectoryOffset, s.tables)
}

func (s *qemuStream) readAt(sector uint64, into any) error {
	return binary.Read(io.NewSectionReader(s.f, int64(sector)*sectorSize, 1<<40), binary.LittleEndian, into)
}

// table returns the grains of a table, those not stored left out.
func (s *qemuStream) table(n int) ([]grain, error) {
	entries := make([]uint32, tableEntries)
	if err := s.readAt(uint64(s.tables[n]), entries); err != nil {
		return nil, err
	}
	var grains []grain
	for _, at := range entries {
		if at == 0 {
			continue
		}
		var marker struct {
			LBA  uint64
			Size uint32
		}
		if err := s.readAt(uint64(at), &marker); err != nil {
			return nil, err
		}
		g := grain{marker.LBA, make([]byte, marker.Size)}
		if _, err := s.f.ReadAt(g.data, int64(at)*sectorSize+markerOfGrain); err != nil {
			return nil, err
		}
		grains = append(grains, g)
	}
	return grains, nil
}

// hostStream writes an encoding from front to back.
type hostStream struct {
	w         io.Writer
	lie       string
	header    sparseHeader
	sector    uint64
	directory []uint32
	err       error
}

// relay writes qemu-img's encoding as a host would, with a lie in it or none.
func relay(w io.Writer, f *os.File, lie string) error {
	in, err := openStream(f)
	if err != nil {
		return err
	}
	out := &hostStream{w: w, lie: lie, header: in.header}
	if err = out.top(f); err != nil {
		return err
	}
	for n := range in.tables {
		grains, err := in.table(n)
		if err != nil {
			return err
		}
		out.table(n, grains)
		if out.err != nil || lie == "truncated" && n >= len(in.tables)/2 {
			return out.err
		}
	}
	out.bottom()
	return out.err
}

func (h *hostStream) write(p []byte) {
	if h.err == nil {
		_, h.err = h.w.Write(p)
	}
	h.sector += uint64(len(p)) / sectorSize
}

// padded writes whole sectors.
func (h *hostStream) padded(parts ...any) {
	var b bytes.Buffer
	for _, part := range parts {
		_ = binary.Write(&b, binary.LittleEndian, part)
	}
	b.Write(make([]byte, -b.Len()&(sectorSize-1)))
	h.write(b.Bytes())
}

func (h *hostStream) top(f *os.File) error {
	descriptor := make([]byte, h.header.DescriptorLength*sectorSize)
	if _, err := f.ReadAt(descriptor, int64(h.header.DescriptorOffset)*sectorSize); err != nil {
		return err
	}
	h.header.Flags = 1 | 1<<16 | 1<<17 // newline test, compressed, markers; no redundant tables
	h.header.RedundantOffset, h.header.DirectoryOffset = 0, atTheEnd
	h.header.Overhead, h.header.DescriptorOffset = streamTop, 1
	if h.lie == "capacity" {
		h.header.Capacity += h.header.GrainSize
	}
	h.padded(h.header)
	h.padded(descriptor)
	h.write(make([]byte, (streamTop-h.sector)*sectorSize))
	return nil
}

func (h *hostStream) grain(g grain) {
	size := uint32(len(g.data))
	if h.lie == "size" {
		size += 64
		h.lie = ""
	}
	h.padded(g.lba, size, g.data)
}

// metadata writes a marker and what follows it.
func (h *hostStream) metadata(kind uint32, content ...any) {
	sectors := 0
	for _, part := range content {
		sectors += (binary.Size(part) + sectorSize - 1) / sectorSize
	}
	h.padded(uint64(sectors), uint32(0), kind)
	if sectors > 0 {
		h.padded(content...)
	}
}

// table writes grains, and the table of them behind; nothing where there are none.
func (h *hostStream) table(n int, grains []grain) {
	h.directory = append(h.directory, 0)
	if len(grains) == 0 {
		return
	}
	entries := make([]uint32, tableEntries)
	for _, g := range h.spoiled(grains) {
		entries[g.lba/h.header.GrainSize%tableEntries] = uint32(h.sector)
		if h.lie == "dropped" {
			h.lie = ""
			continue
		}
		h.grain(g)
	}
	if h.lie == "table" {
		entries[grains[0].lba/h.header.GrainSize%tableEntries]++
		h.lie = ""
	}
	if h.lie == "marker" {
		h.metadata(7)
		h.lie = ""
	}
	h.directory[n] = uint32(h.sector) + 1
	h.metadata(markerTable, entries)
}

// spoiled are the grains with the lie in them.
func (h *hostStream) spoiled(grains []grain) []grain {
	last := len(grains) - 1
	switch {
	case h.lie == "order" && last > 0:
		grains[last], grains[last-1] = grains[last-1], grains[last]
	case h.lie == "twice":
		grains = append(grains, grains[last])
	case h.lie == "beyond":
		grains[last].lba = (h.header.Capacity/h.header.GrainSize + 1) * h.header.GrainSize
	case h.lie == "deflate":
		grains[last].data = slices.Clone(grains[last].data)
		grains[last].data[len(grains[last].data)/2] ^= 1
	case h.lie == "short":
		var b bytes.Buffer
		z := zlib.NewWriter(&b)
		_, _ = z.Write(make([]byte, sectorSize))
		z.Close()
		grains[0].data = b.Bytes()
	default:
		return grains
	}
	h.lie = ""
	return grains
}

func (h *hostStream) bottom() {
	if h.lie == "directory" {
		for i := range h.directory {
			h.directory[i] += 3
		}
	}
	at := h.sector + 1
	h.metadata(markerDirectory, h.directory)
	h.header.DirectoryOffset = at
	if h.lie != "footer" {
		h.metadata(markerFooter, h.header)
	}
	if h.lie != "eos" {
		h.metadata(markerEOS)
	}
	if h.lie == "trailing" {
		h.write(bytes.Repeat([]byte{0x5a}, sectorSize))
	}
}

func checkLeaseLie(lie string) error {
	if lie != "" && !slices.Contains(leaseLies, lie) {
		return fmt.Errorf("lease: no lie %q here: %v", lie, leaseLies)
	}
	return nil
}
