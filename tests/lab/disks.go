// A virtual disk as the guest sees it: a flat base and the deltas above it.
package main

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
)

// readFunc fills p with the bytes at off.
type readFunc func(p []byte, off int64) error

// writeFunc stores p at off.
type writeFunc func(p []byte, off int64) error

// extent is the file that holds a layer's bytes. Offsets and lengths are multiples of a sector, for writes of a grain.
type extent interface {
	// readOver fills p at off, asking below for what this extent does not hold.
	readOver(p []byte, off int64, below readFunc) error
	writeAt(p []byte, off int64) error
	// next finds the first run of stored bytes at or after off.
	next(off int64) (start, length int64, ok bool)
	grain() int64
	close() error
}

// layer is one link of a disk's chain: a descriptor and its extent.
type layer struct {
	descriptor string // file name of the descriptor, in the disk's folder
	extentName string // file name of the extent
	cid        uint32
	store      extent
	views      []*view // what it held at snapshots since removed, oldest first
}

// disk is one virtual disk. layers[0] is the base; the guest writes to the last.
type disk struct {
	mu       sync.RWMutex
	lab      *lab
	spec     diskSpec
	key      int32
	uuid     string // as in config: 6000C29x-…
	ds       *datastore
	dir      string // folder on the datastore, "" for its root
	base     string // file name without .vmdk
	capacity int64
	layers   []*layer
	moments  map[string]*moment // by snapshot moref
	next     int                // number of the next delta
	digest   string             // of the content now; "" when not known
	touched  bool               // the top layer was written since it became the top
	tracking *tracking          // of changes; nil where there is none (cbt.go)
	objectID string             // of a disk without an extent file (kinds.go)
}

// path is where file lies on this machine.
func (d *disk) path(file string) string { return filepath.Join(d.ds.dir, d.dir, file) }

// datastorePath is file as vSphere names it.
func (d *disk) datastorePath(file string) string {
	return fmt.Sprintf("[%s] %s", d.ds.name, filepath.Join(d.dir, file))
}

func (d *disk) top() *layer { return d.layers[len(d.layers)-1] }

// snapshotted says whether a snapshot puts a delta above this disk (independent disks and RDMs in physical mode are
// left out of snapshots; kinds without a flat file hold no bytes here).
func (d *disk) snapshotted() bool { return d.spec.inSnapshots() && d.hasBytes() }

func (d *disk) hasBytes() bool { return len(d.layers) > 0 }

// readLayer reads what layer i and those below it make up.
func (d *disk) readLayer(i int, p []byte, off int64) error {
	if i < 0 {
		clear(p)
		return nil
	}
	return d.layers[i].store.readOver(p, off, func(p []byte, off int64) error {
		return d.readLayer(i-1, p, off)
	})
}

// guestWrite writes as the guest does: into the top layer.
func (d *disk) guestWrite(off int64, p []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.hasBytes() {
		return fmt.Errorf("disk %d holds no bytes in the lab", d.key)
	}
	if off < 0 || off+int64(len(p)) > d.capacity {
		return fmt.Errorf("offset %d, length %d: beyond the disk's %d bytes", off, len(p), d.capacity)
	}
	if err := d.markTouched(); err != nil {
		return err
	}
	d.digest = ""
	if d.tracking != nil {
		d.tracking.mark(off, int64(len(p)))
	}
	return d.writeLayer(len(d.layers)-1, off, p)
}

// markTouched gives the top layer a new CID at its first write, as a host does at the first write after opening.
func (d *disk) markTouched() error {
	if d.touched {
		return nil
	}
	d.touched = true
	d.top().cid = rand.Uint32()
	return d.writeDescriptor(len(d.layers) - 1)
}

// writeLayer writes into layer i, whole grains at a time, after keeping aside what that changes.
func (d *disk) writeLayer(i int, off int64, p []byte) error {
	grain := d.layers[i].store.grain()
	start := off / grain * grain
	end := min((off+int64(len(p))+grain-1)/grain*grain, d.capacity)
	if err := d.preserve(i, start, end-start); err != nil {
		return err
	}
	if start != off || end != off+int64(len(p)) {
		whole := make([]byte, end-start)
		if err := d.readLayer(i, whole, start); err != nil {
			return err
		}
		copy(whole[off-start:], p)
		p = whole
	}
	return d.layers[i].store.writeAt(p, start)
}
