// A virtual disk as the guest sees it: a flat base and the deltas above it.
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
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

// moment is a disk as of a snapshot: its layer was the top then.
type moment struct {
	layer  *layer
	side   *layer // a delta of the snapshot's own, beside the guest's (vss.go)
	view   *view  // set once the snapshot is gone
	digest string
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

// freeze makes the present content the snapshot's: a fresh delta takes the guest's writes from now on. With vss the
// snapshot gets a delta of its own too.
func (d *disk) freeze(snapshot string, vss bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	m := &moment{layer: d.top(), digest: d.digest}
	d.moments[snapshot] = m
	if err := d.pushDelta(); err != nil {
		return err
	}
	if vss {
		if err := d.addSide(m); err != nil {
			return err
		}
	}
	if d.lab.scenario.KeepFrozen {
		return d.keepFrozen(snapshot, m)
	}
	return nil
}

// newDelta makes an empty delta above parent, descriptor not yet written.
func (d *disk) newDelta(parent *layer) (*layer, error) {
	d.next++
	name := fmt.Sprintf("%s-%06d", d.base, d.next)
	l := &layer{descriptor: name + ".vmdk", cid: parent.cid}
	var err error
	if d.capacity/sectorSize > cowdMaxSectors {
		l.extentName = name + "-sesparse.vmdk"
		l.store, err = createSeSparse(d.path(l.extentName), d.capacity)
	} else {
		l.extentName = name + "-delta.vmdk"
		l.store, err = createCOWD(d.path(l.extentName), d.capacity, parent.descriptor)
	}
	return l, err
}

// pushDelta puts an empty delta on top.
func (d *disk) pushDelta() error {
	l, err := d.newDelta(d.top())
	if err != nil {
		return err
	}
	d.layers, d.touched = append(d.layers, l), false
	return d.writeDescriptor(len(d.layers) - 1)
}

// release ends a snapshot: the delta above the layer it had frozen is merged into that layer, unless another snapshot
// froze the same layer, or merge is false.
func (d *disk) release(snapshot string, merge bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	m := d.moments[snapshot]
	if m == nil || m.view != nil {
		return nil
	}
	if err := d.dropSide(m); err != nil {
		return err
	}
	v, err := newView(d.lab.scratch)
	if err != nil {
		return err
	}
	m.layer.views, m.view = append(m.layer.views, v), v
	if d.frozen(m.layer) || !merge {
		return nil
	}
	return d.mergeAbove(d.index(m.layer))
}

// frozen says whether a snapshot that still exists holds l.
func (d *disk) frozen(l *layer) bool {
	for _, m := range d.moments {
		if m.layer == l && m.view == nil {
			return true
		}
	}
	return false
}

func (d *disk) index(l *layer) int {
	for i := range d.layers {
		if d.layers[i] == l {
			return i
		}
	}
	return -1
}

// mergeAbove merges layer i+1 into layer i and removes its files.
func (d *disk) mergeAbove(i int) error {
	if i+1 >= len(d.layers) {
		return nil
	}
	parent, child := d.layers[i], d.layers[i+1]
	if err := d.copyUp(i, child); err != nil {
		return err
	}
	parent.cid = child.cid
	parent.views = append(parent.views, child.views...)
	for _, m := range d.moments {
		if m.layer == child {
			m.layer = parent
		}
	}
	d.layers = append(d.layers[:i+1], d.layers[i+2:]...)
	child.store.close()
	for _, file := range []string{child.descriptor, child.extentName} {
		if err := os.Remove(d.path(file)); err != nil {
			return err
		}
	}
	for j := i; j <= min(i+1, len(d.layers)-1); j++ {
		if err := d.writeDescriptor(j); err != nil {
			return err
		}
	}
	return nil
}

// copyUp writes all that child stores into layer i.
func (d *disk) copyUp(i int, child *layer) error {
	buf := make([]byte, 1<<20)
	for off := int64(0); ; {
		start, n, ok := child.store.next(off)
		if !ok {
			return nil
		}
		part := buf[:min(n, int64(len(buf)))]
		if err := child.store.readOver(part, start, nil); err != nil {
			return err
		}
		if err := d.writeLayer(i, start, part); err != nil {
			return err
		}
		off = start + int64(len(part))
	}
}

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
