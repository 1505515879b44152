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
	if !d.hasBytes() {
		return "", fmt.Errorf("disk %d holds no bytes in the lab", d.key)
	}
	if snapshot == "" {
		return d.hashInto(&d.digest, d.at(len(d.layers)-1, -1))
	}
	m := d.moments[snapshot]
	if m == nil {
		return "", fmt.Errorf("disk %d has no snapshot %q", d.key, snapshot)
	}
	return d.hashInto(&m.digest, d.of(m))
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

// hashInto computes and remembers a digest.
func (d *disk) hashInto(known *string, c content) (string, error) {
	if *known != "" {
		return *known, nil
	}
	const chunk = 1 << 20
	h, buf, zeros := sha256.New(), make([]byte, chunk), make([]byte, chunk)
	for off := int64(0); off < d.capacity; off += chunk {
		part := buf[:min(chunk, d.capacity-off)]
		if c.hole(off, int64(len(part))) {
			h.Write(zeros[:len(part)])
			continue
		}
		if err := c.read(part, off); err != nil {
			return "", err
		}
		h.Write(part)
	}
	*known = hex.EncodeToString(h.Sum(nil))
	return *known, nil
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
