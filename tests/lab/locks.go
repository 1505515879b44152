// File locks, as a host holds them on the disks of its running VMs.
package main

import "path/filepath"

const (
	locksLive   = "live"   // the extent the guest writes to is refused, those below a delta are readable
	locksStrict = "strict" // every extent of a running VM is refused
	locksOff    = "off"
)

// holder finds the VM whose folder a file lies in, and says whether the host's lock refuses its reading.
func (l *lab) holder(file string) (owner *machine, locked bool) {
	for _, m := range l.order {
		for _, d := range m.disks {
			if filepath.Dir(file) != filepath.Dir(d.path("x")) {
				continue
			}
			owner = m
			if at := d.layerOf(filepath.Base(file)); at >= 0 {
				return m, m.on.Load() && l.refuses(at == d.depth()-1)
			}
		}
		if owner == nil && filepath.Dir(file) == filepath.Join(m.ds.dir, m.dir) {
			owner = m
		}
	}
	return owner, false
}

func (l *lab) refuses(live bool) bool {
	return l.scenario.Locks == locksStrict || l.scenario.Locks == locksLive && live
}

// layerOf is the layer whose extent has that name, -1 if none.
func (d *disk) layerOf(name string) int {
	d.mu.RLock()
	defer d.mu.RUnlock()
	for i, layer := range d.layers {
		if layer.extentName == name {
			return i
		}
	}
	return -1
}

func (d *disk) depth() int {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return len(d.layers)
}
