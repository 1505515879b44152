// layout, layoutEx and storage figures from the files that are really there.
//
// The simulator guesses the names of a disk's files ("x-flat.vmdk" beside every "x.vmdk"), which is wrong for deltas.
package main

import (
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

// updateLayout rebuilds all three; the VM's lock is held.
func (m *machine) updateLayout(ctx *simulator.Context) error {
	files, err := m.listFiles()
	if err != nil {
		return err
	}
	ex := &types.VirtualMachineFileLayoutEx{File: files, Timestamp: time.Now()}
	plain := &types.VirtualMachineFileLayout{}
	for _, f := range files {
		switch f.Type {
		case string(types.VirtualMachineFileLayoutExFileTypeLog):
			plain.LogFile = append(plain.LogFile, path.Base(f.Name))
		case string(types.VirtualMachineFileLayoutExFileTypeNvram), string(types.VirtualMachineFileLayoutExFileTypeConfig):
			plain.ConfigFile = append(plain.ConfigFile, path.Base(f.Name))
		}
	}
	for _, d := range m.disks {
		if d.hasBytes() {
			ex.Disk = append(ex.Disk, m.diskLayout(d, len(d.layers)-1))
			plain.Disk = append(plain.Disk, types.VirtualMachineFileLayoutDiskLayout{
				Key: d.key, DiskFile: d.chainNames(),
			})
		}
	}
	m.snapshotLayouts(plain, ex)
	ctx.Update(m.VirtualMachine, []types.PropertyChange{
		{Name: "layout", Val: plain}, {Name: "layoutEx", Val: ex},
	})
	m.updateStorage(ctx)
	return nil
}

// listFiles lists the VM's folders, keys kept from one listing to the next.
func (m *machine) listFiles() ([]types.VirtualMachineFileLayoutExFileInfo, error) {
	var files []types.VirtualMachineFileLayoutExFileInfo
	seen := map[string]bool{}
	list := func(ds *datastore, dir string) error {
		local := filepath.Join(ds.dir, dir)
		if seen[local] {
			return nil
		}
		seen[local] = true
		entries, err := os.ReadDir(local)
		if err != nil {
			return err
		}
		for _, e := range entries {
			info, err := e.Info()
			if err != nil || e.IsDir() {
				continue
			}
			name := (&object.DatastorePath{Datastore: ds.name, Path: path.Join(dir, e.Name())}).String()
			files = append(files, types.VirtualMachineFileLayoutExFileInfo{
				Key: m.fileKey(name), Name: name, Type: string(fileType(e.Name())),
				Size: info.Size(), UniqueSize: info.Size(), Accessible: types.NewBool(true),
			})
		}
		return nil
	}
	err := list(m.ds, m.dir)
	for _, d := range m.disks {
		if err == nil {
			err = list(d.ds, d.dir)
		}
	}
	return files, err
}

func (m *machine) fileKey(name string) int32 {
	key, known := m.fileKeys[name]
	if !known {
		key = int32(len(m.fileKeys))
		m.fileKeys[name] = key
	}
	return key
}

// extentSuffixes are the names of files that hold a disk's bytes.
var extentSuffixes = []string{"-flat.vmdk", "-delta.vmdk", "-sesparse.vmdk"}

func isExtent(name string) bool {
	for _, s := range extentSuffixes {
		if strings.HasSuffix(name, s) {
			return true
		}
	}
	return false
}

func fileType(name string) types.VirtualMachineFileLayoutExFileType {
	switch {
	case isExtent(name):
		return types.VirtualMachineFileLayoutExFileTypeDiskExtent
	case strings.HasSuffix(name, ".vmdk"):
		return types.VirtualMachineFileLayoutExFileTypeDiskDescriptor
	case strings.HasSuffix(name, ".vmx"):
		return types.VirtualMachineFileLayoutExFileTypeConfig
	case strings.HasSuffix(name, ".nvram"):
		return types.VirtualMachineFileLayoutExFileTypeNvram
	case strings.HasSuffix(name, ".vmsn"):
		return types.VirtualMachineFileLayoutExFileTypeSnapshotData
	case strings.HasSuffix(name, ".log"):
		return types.VirtualMachineFileLayoutExFileTypeLog
	}
	return types.VirtualMachineFileLayoutExFileTypeUwswap
}

// diskLayout is the chain of d up to layer i, the base first.
func (m *machine) diskLayout(d *disk, i int) types.VirtualMachineFileLayoutExDiskLayout {
	out := types.VirtualMachineFileLayoutExDiskLayout{Key: d.key}
	for _, l := range d.layers[:i+1] {
		out.Chain = append(out.Chain, types.VirtualMachineFileLayoutExDiskUnit{FileKey: []int32{
			m.fileKey(d.datastorePath(l.descriptor)), m.fileKey(d.datastorePath(l.extentName)),
		}})
	}
	return out
}

func (d *disk) chainNames() []string {
	var names []string
	for _, l := range d.layers {
		names = append(names, d.datastorePath(l.descriptor))
	}
	return names
}

// snapshotLayouts carries the snapshots' parts over, their chains brought up to date.
func (m *machine) snapshotLayouts(plain *types.VirtualMachineFileLayout, ex *types.VirtualMachineFileLayoutEx) {
	if m.Layout == nil || m.LayoutEx == nil {
		return
	}
	plain.Snapshot = m.Layout.Snapshot
	for _, s := range m.LayoutEx.Snapshot {
		s.Disk = nil
		if name, known := m.dataFiles[s.Key]; known {
			s.DataKey = m.fileKey(name)
		}
		for _, d := range m.disks {
			if at := d.momentIndex(s.Key.Value); at >= 0 {
				s.Disk = append(s.Disk, m.diskLayout(d, at))
			}
		}
		ex.Snapshot = append(ex.Snapshot, s)
	}
}

// updateStorage sums the files up by datastore.
func (m *machine) updateStorage(ctx *simulator.Context) {
	usage := map[string]*types.VirtualMachineUsageOnDatastore{}
	storage := &types.VirtualMachineStorageInfo{Timestamp: time.Now()}
	total := &types.VirtualMachineStorageSummary{Timestamp: time.Now()}
	for _, f := range m.LayoutEx.File {
		var p object.DatastorePath
		p.FromString(f.Name)
		u := usage[p.Datastore]
		if u == nil {
			u = &types.VirtualMachineUsageOnDatastore{Datastore: m.dc.datastores[p.Datastore].ref}
			usage[p.Datastore] = u
		}
		u.Committed += f.Size
		total.Committed += f.Size
		if isExtent(f.Name) {
			u.Unshared += f.Size
			total.Unshared += f.Size
		}
	}
	for _, u := range usage {
		storage.PerDatastoreUsage = append(storage.PerDatastoreUsage, *u)
	}
	ctx.Update(m.VirtualMachine, []types.PropertyChange{
		{Name: "storage", Val: storage}, {Name: "summary.storage", Val: total},
	})
}
