// Making a disk: descriptor, flat extent and content.
package main

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path"
)

// makeDisk makes disk i of the VM on its datastore.
func (m *machine) makeDisk(i int, spec diskSpec, key int32) (*disk, error) {
	ds := m.dc.datastores[spec.Datastore]
	if ds == nil {
		return nil, fmt.Errorf("no datastore %q here", spec.Datastore)
	}
	d := &disk{
		lab: m.lab, spec: spec, key: key, uuid: diskUUID(), ds: ds, dir: m.dir, base: spec.File,
		capacity: int64(spec.Size), moments: map[string]*moment{},
	}
	if ds != m.ds {
		d.dir = m.dirOn(ds)
	}
	if err := os.MkdirAll(path.Join(ds.dir, d.dir), 0o755); err != nil {
		return nil, err
	}
	if spec.Backing != backingFlat && spec.Backing != backingSeSparse {
		return d, d.createObject()
	}
	err := d.createBase(fmt.Sprintf("%s#%d", m.path, i))
	d.track(m.spec.CBT)
	return d, err
}

// diskUUID is a new disk UUID, with the first bytes VMware gives to virtual disks.
func diskUUID() string { return "6000C29" + newUUID(0x60, 0x00, 0xC2, 0x90)[7:] }

// createBase makes the base extent and its content, which follows from the seed and the name.
func (d *disk) createBase(name string) (err error) {
	l := &layer{descriptor: d.base + ".vmdk", extentName: d.base + "-flat.vmdk", cid: rand.Uint32()}
	if d.spec.Backing == backingSeSparse {
		l.extentName = d.base + "-sesparse.vmdk"
		l.store, err = createSeSparse(d.path(l.extentName), d.capacity)
	} else {
		l.store, err = createFlat(d.path(l.extentName), d.capacity)
	}
	if err != nil {
		return err
	}
	d.layers = []*layer{l}
	if err = d.writeDescriptor(0); err != nil {
		return err
	}
	if flat, ok := l.store.(*flatFile); ok && d.spec.From != "" {
		return copySparse(flat, d.spec.From)
	}
	seed := d.lab.opts.seed
	if d.spec.Seed != nil {
		seed = *d.spec.Seed
	}
	write := func(p []byte, off int64) error { return d.writeLayer(0, off, p) }
	return fill(write, d.capacity, int64(*d.spec.Data), source(seed, name))
}

// copySparse copies a raw image into x, leaving out its holes.
func copySparse(x *flatFile, from string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	src := &flatFile{f: f, size: info.Size()}
	for off := int64(0); ; {
		start, n, ok := src.next(off)
		if !ok {
			return nil
		}
		to := io.NewOffsetWriter(x.f, start)
		if _, err = io.Copy(to, io.NewSectionReader(f, start, n)); err != nil {
			return err
		}
		off = start + n
	}
}
