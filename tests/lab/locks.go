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
			if held, live := d.holds(filepath.Base(file)); held {
				return m, m.on.Load() && l.refuses(live)
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

// holds says whether an extent of the disk has that name, and whether the guest writes to it.
func (d *disk) holds(name string) (held, live bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	for i, layer := range d.layers {
		if layer.extentName == name {
			return true, i == len(d.layers)-1
		}
	}
	for _, m := range d.moments {
		if m.side != nil && m.view == nil && m.side.extentName == name {
			return true, false
		}
	}
	return false, false
}
