// What a disk was at a snapshot that is gone: blocks kept aside before a merge or a guest write changes them.
//
// Removing a snapshot merges a delta into the extent it had frozen, and with that its content is lost. So
// that `/sha256?snapshot=` still answers, the extent keeps a list of views, oldest first. Before a block
// changes, its old bytes go into the newest view, once. A view is read through itself, then the newer
// ones, then the extent as it is: it costs what is written afterwards, not the size of the disk.
package main

import (
	"os"
)

const historyBlock = 64 << 10

// view is the content of an extent, with all below it, at one moment.
type view struct {
	f    *os.File // old blocks at their own offsets; sparse
	have map[int64]bool
}

func newView(dir string) (*view, error) {
	f, err := os.CreateTemp(dir, "view-")
	if err != nil {
		return nil, err
	}
	_ = os.Remove(f.Name()) // goes with the process
	return &view{f: f, have: map[int64]bool{}}, nil
}

// preserve keeps the blocks of [off, off+n) that a write to layer i is about to change.
func (d *disk) preserve(i int, off, n int64) error {
	views := d.layers[i].views
	if len(views) == 0 {
		return nil
	}
	v := views[len(views)-1]
	buf := make([]byte, historyBlock)
	for b := off / historyBlock; b*historyBlock < off+n; b++ {
		if v.have[b] {
			continue
		}
		part := buf[:min(historyBlock, d.capacity-b*historyBlock)]
		if err := d.readLayer(i, part, b*historyBlock); err != nil {
			return err
		}
		if _, err := v.f.WriteAt(part, b*historyBlock); err != nil {
			return err
		}
		v.have[b] = true
	}
	return nil
}

// readView reads what layer i held when its view number k was taken.
func (d *disk) readView(i, k int, p []byte, off int64) error {
	for len(p) > 0 {
		b := off / historyBlock
		part := p[:min(int64(len(p)), (b+1)*historyBlock-off)]
		if err := d.readViewBlock(i, k, b, part, off); err != nil {
			return err
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return nil
}

func (d *disk) readViewBlock(i, k int, block int64, p []byte, off int64) error {
	for _, v := range d.layers[i].views[k:] {
		if v.have[block] {
			_, err := v.f.ReadAt(p, off)
			return err
		}
	}
	return d.readLayer(i, p, off)
}
