// A disk's chain under snapshots: freezing a layer, putting a delta above it, merging it away again.
package main

import (
	"fmt"
	"os"
)

// moment is a disk as of a snapshot: its layer was the top then.
type moment struct {
	layer  *layer
	side   *layer // a delta of the snapshot's own, beside the guest's (vss.go)
	view   *view  // set once the snapshot is gone
	digest string

	changeID string // of the point in its tracking
}

// freeze makes the present content the snapshot's: a fresh delta takes the guest's writes from now on. With vss the
// snapshot gets a delta of its own too.
func (d *disk) freeze(snapshot string, vss, tracked bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.track(tracked)
	m := &moment{layer: d.top(), digest: d.digest, changeID: d.changeID()}
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

// isYoungest says whether a standing snapshot froze the layer below the top one, of which nothing has to be remembered.
func (d *disk) isYoungest(snapshot string) bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	m := d.moments[snapshot]
	return m != nil && m.view == nil && d.index(m.layer) == len(d.layers)-2 && len(d.top().views) == 0
}

// revert throws the top layer away and puts an empty delta in its place; tracking is of the snapshot's point again.
func (d *disk) revert(snapshot string) error {
	if !d.snapshotted() {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	m, old := d.moments[snapshot], d.top()
	d.layers = d.layers[:len(d.layers)-1]
	old.store.close()
	for _, file := range []string{old.descriptor, old.extentName} {
		if err := os.Remove(d.path(file)); err != nil {
			return err
		}
	}
	d.digest = m.digest
	if d.tracking != nil {
		d.tracking.revert(m.changeID)
	}
	return d.pushDelta()
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
