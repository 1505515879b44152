// Digests of the guest-visible content: now, or as of a snapshot that stands or is gone. Holes are not read.
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
)

// sha256 is the digest of the guest-visible content now, or as of a snapshot, gone or not.
func (d *disk) sha256(snapshot string) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c, known, err := d.contentOf(snapshot)
	if err != nil || *known != "" {
		return *known, err
	}
	*known, err = hash(c, 0, d.capacity)
	return *known, err
}

// sha256Range is the digest of a part, for disks too large to be read whole.
func (d *disk) sha256Range(snapshot string, off, length int64) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c, _, err := d.contentOf(snapshot)
	if err != nil {
		return "", err
	}
	if off < 0 || length < 0 || length > d.capacity-off {
		return "", fmt.Errorf("offset %d, length %d: beyond the disk's %d bytes", off, length, d.capacity)
	}
	return hash(c, off, length)
}

// contentOf is the content now, or as of a snapshot, and where its digest is remembered.
func (d *disk) contentOf(snapshot string) (content, *string, error) {
	none := ""
	if !d.hasBytes() {
		return content{}, &none, fmt.Errorf("disk %d holds no bytes in the lab", d.key)
	}
	if snapshot == "" {
		return d.at(len(d.layers)-1, -1), &d.digest, nil
	}
	m := d.moments[snapshot]
	if m == nil {
		return content{}, &none, fmt.Errorf("disk %d has no snapshot %q", d.key, snapshot)
	}
	return d.of(m), &m.digest, nil
}

func (m *moment) viewIndex() int {
	for k, v := range m.layer.views {
		if v == m.view {
			return k
		}
	}
	return -1
}

// content is something to hash: how to read it, and a test for ranges that nothing stores.
type content struct {
	read readFunc
	hole func(off, n int64) bool
}

// at is the content of layer i, as of its view k unless that is -1.
func (d *disk) at(i, k int) content {
	if k < 0 {
		return content{func(p []byte, off int64) error { return d.readLayer(i, p, off) }, d.holes(i, k)}
	}
	return content{func(p []byte, off int64) error { return d.readView(i, k, p, off) }, d.holes(i, k)}
}

// of is the content as of a snapshot.
func (d *disk) of(m *moment) content {
	c := d.at(d.index(m.layer), m.viewIndex())
	if m.side == nil {
		return c
	}
	below, hole := c.read, storedIn(m.side.store, d.capacity)
	return content{
		func(p []byte, off int64) error { return m.side.store.readOver(p, off, below) },
		func(off, n int64) bool { return !hole(off, n) && c.hole(off, n) },
	}
}

// hash reads [off, off+length) of c, of which any part may begin within a sector.
func hash(c content, off, length int64) (string, error) {
	const chunk = 1 << 20
	h, buf, zeros := sha256.New(), make([]byte, chunk), make([]byte, chunk)
	for end := off + length; off < end; {
		part := buf[:min(chunk-off%chunk, end-off)]
		if c.hole(off, int64(len(part))) {
			h.Write(zeros[:len(part)])
		} else if err := readBytes(c.read, part, off); err != nil {
			return "", err
		} else {
			h.Write(part)
		}
		off += int64(len(part))
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// readBytes reads any bytes through a function that reads whole sectors.
func readBytes(read readFunc, p []byte, off int64) error {
	head := off % sectorSize
	if head == 0 && len(p)%sectorSize == 0 {
		return read(p, off)
	}
	whole := make([]byte, (head+int64(len(p))+sectorSize-1)/sectorSize*sectorSize)
	if err := read(whole, off-head); err != nil {
		return err
	}
	copy(p, whole[head:])
	return nil
}

// storedIn gives a test whether x stores any of a range; it must be asked in rising order of offsets.
func storedIn(x extent, capacity int64) func(off, n int64) bool {
	start, end := int64(0), int64(0) // the next stored run, looked up when passed
	return func(off, n int64) bool {
		if end <= off {
			s, l, ok := x.next(off)
			if !ok {
				s, l = capacity, 1
			}
			start, end = s, s+l
		}
		return start < off+n
	}
}

// holes gives a test for ranges that no layer up to i stores, nor view k of it.
func (d *disk) holes(i, k int) func(off, n int64) bool {
	var stored []func(off, n int64) bool
	for _, l := range d.layers[:i+1] {
		stored = append(stored, storedIn(l.store, d.capacity))
	}
	var views []*view
	if k >= 0 {
		views = d.layers[i].views[k:]
	}
	return func(off, n int64) bool {
		for _, in := range stored {
			if in(off, n) {
				return false
			}
		}
		for b := off / historyBlock; b*historyBlock < off+n; b++ {
			for _, v := range views {
				if v.have[b] {
					return false
				}
			}
		}
		return true
	}
}
