// VSS: a quiesced snapshot of a Windows guest leaves two redo logs a disk.
//
// One takes the guest's writes as ever. The other is the snapshot's: into it go the changes that VSS writers make to
// the frozen disk to bring it to order, so snapshot.config points at it, not at the base, and the content as of the
// snapshot is base and second redo log together. Removing the snapshot throws the second one away.
package main

import (
	"math/rand/v2"
	"os"
	"slices"

	"github.com/vmware/govmomi/vim25/types"
)

const (
	vssWrites     = 8
	vssWriteBytes = 64 << 10
)

// addSide gives the moment a delta of its own, with a few seeded writes in it.
func (d *disk) addSide(m *moment) error {
	l, err := d.newDelta(m.layer)
	if err != nil {
		return err
	}
	m.side, m.digest = l, ""
	r := rand.New(source(uint64(l.cid), "vss"))
	for range vssWrites {
		n := min(vssWriteBytes, d.capacity)
		off := r.Int64N((d.capacity-n)/seGrain+1) * seGrain
		if err = l.store.writeAt(randomBytes(r.Uint64(), n), off); err != nil {
			return err
		}
		d.tracking.markSide(off, n)
	}
	l.cid = rand.Uint32()
	return d.writeDeltaDescriptor(l, m.layer)
}

// dropSide removes the files of the moment's own delta; its bytes stay readable to us.
func (d *disk) dropSide(m *moment) error {
	if m.side == nil {
		return nil
	}
	for _, file := range []string{m.side.descriptor, m.side.extentName} {
		if err := os.Remove(d.path(file)); err != nil {
			return err
		}
	}
	return nil
}

// momentBacking is the backing that a standing snapshot's config shows, at being the layer it froze.
func (d *disk) momentBacking(ref string, at int) types.BaseVirtualDeviceBackingInfo {
	m := d.momentAt(ref)
	if m == nil {
		return d.backing(at)
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	layers := slices.Clone(d.layers[:at+1])
	if m.side != nil {
		layers = append(layers, m.side)
	}
	return withChangeID(d.chainBacking(layers), m.changeID)
}

func (d *disk) momentAt(ref string) *moment {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.moments[ref]
}
