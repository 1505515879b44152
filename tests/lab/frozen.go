// keep_frozen: a copy of each chain as of its snapshot, so that qemu-img's reading can be the oracle.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

const frozenDir = "frozen"

// keepFrozen copies descriptors and extents up to the frozen layer to DIR/frozen/<snapshot>/; where a file of that name
// is there already (disks of one name on two datastores), to disk-<key>/ below it.
func (d *disk) keepFrozen(snapshot string, m *moment) error {
	if _, err := d.lab.state.claim(frozenDir); err != nil {
		return err
	}
	dir := filepath.Join(d.lab.state.path, frozenDir, snapshot)
	if _, err := os.Stat(filepath.Join(dir, d.layers[0].descriptor)); err == nil {
		dir = filepath.Join(dir, fmt.Sprintf("disk-%d", d.key))
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	layers := slices.Clone(d.layers[:d.index(m.layer)+1])
	if m.side != nil {
		layers = append(layers, m.side)
	}
	for _, l := range layers {
		for _, file := range []string{l.descriptor, l.extentName} {
			if err := copyFile(d.path(file), filepath.Join(dir, file)); err != nil {
				return err
			}
		}
	}
	return nil
}

// copyFile copies a file, holes left holes.
func copyFile(from, to string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	x, err := createFlat(to, info.Size())
	if err != nil {
		return err
	}
	defer x.close()
	return copySparse(x, from)
}
