// The flat extent: a plain sparse file of the disk's capacity, `x-flat.vmdk`.
package main

import (
	"errors"
	"os"
	"syscall"
)

// lseek(2); package syscall does not name them.
const (
	seekData = 3
	seekHole = 4
)

// flatFile is one open flat extent. Its caller serialises access.
type flatFile struct {
	f    *os.File
	size int64
}

func createFlat(path string, size int64) (*flatFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err = f.Truncate(size); err != nil {
		f.Close()
		return nil, err
	}
	return &flatFile{f: f, size: size}, nil
}

func (x *flatFile) readOver(p []byte, off int64, _ readFunc) error {
	_, err := x.f.ReadAt(p, off)
	return err
}

func (x *flatFile) writeAt(p []byte, off int64) error {
	_, err := x.f.WriteAt(p, off)
	return err
}

// next is the first run at or after off that is not a hole.
func (x *flatFile) next(off int64) (start, length int64, ok bool) {
	start, err := syscall.Seek(int(x.f.Fd()), off, seekData)
	if errors.Is(err, syscall.ENXIO) {
		return 0, 0, false
	}
	if err != nil { // a file system without holes: all is data
		return off, x.size - off, off < x.size
	}
	end, err := syscall.Seek(int(x.f.Fd()), start, seekHole)
	if err != nil {
		end = x.size
	}
	return start, end - start, true
}

func (x *flatFile) grain() int64 { return sectorSize }

func (x *flatFile) close() error { return x.f.Close() }
