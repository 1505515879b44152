// Snapshots that freeze what they should: the simulator keeps the tree, the lab moves the disks.
package main

import (
	"cmp"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// snapshot wraps the simulator's snapshot to override its removal.
type snapshot struct {
	*simulator.VirtualMachineSnapshot
	m *machine
}

func (m *machine) CreateSnapshotTask(ctx *simulator.Context, req *types.CreateSnapshot_Task) soap.HasFault {
	ref := m.runTask(ctx, "CreateSnapshot_Task", func(*simulator.Task) (types.AnyType, types.BaseMethodFault) {
		return m.createSnapshot(ctx, req.Quiesce, func() types.ManagedObjectReference {
			return m.VirtualMachine.CreateSnapshotTask(ctx, req).(*methods.CreateSnapshot_TaskBody).Res.Returnval
		})
	})
	return &methods.CreateSnapshot_TaskBody{Res: &types.CreateSnapshot_TaskResponse{Returnval: ref}}
}

func (m *machine) CreateSnapshotExTask(ctx *simulator.Context, req *types.CreateSnapshotEx_Task) soap.HasFault {
	ref := m.runTask(ctx, "CreateSnapshotEx_Task", func(*simulator.Task) (types.AnyType, types.BaseMethodFault) {
		return m.createSnapshot(ctx, req.QuiesceSpec != nil, func() types.ManagedObjectReference {
			return m.VirtualMachine.CreateSnapshotExTask(ctx, req).(*methods.CreateSnapshotEx_TaskBody).Res.Returnval
		})
	})
	return &methods.CreateSnapshotEx_TaskBody{Res: &types.CreateSnapshotEx_TaskResponse{Returnval: ref}}
}

// createSnapshot lets the simulator take the snapshot, then freezes the disks.
func (m *machine) createSnapshot(
	ctx *simulator.Context, quiesce bool, take func() types.ManagedObjectReference,
) (types.AnyType, types.BaseMethodFault) {
	if quiesce && m.on.Load() && m.spec.Quiesce == "fail" {
		return nil, &types.ApplicationQuiesceFault{}
	}
	result, fault := inner(ctx, take())
	if fault != nil {
		return nil, fault
	}
	ref := result.(types.ManagedObjectReference)
	m.noteDataFile(ref)
	for _, d := range m.disks {
		if !d.snapshotted() {
			continue
		}
		if err := d.freeze(ref.Value, m.spec.VSS && quiesce && m.on.Load(), m.tracks()); err != nil {
			return nil, fileFault(d, err)
		}
	}
	return ref, m.afterChange(ctx)
}

// noteDataFile remembers the name of a snapshot's .vmsn: the simulator numbers files anew, the lab does not.
func (m *machine) noteDataFile(ref types.ManagedObjectReference) {
	for _, s := range m.LayoutEx.Snapshot {
		for _, f := range m.LayoutEx.File {
			if s.Key == ref && f.Key == s.DataKey {
				m.dataFiles[ref] = f.Name
			}
		}
	}
}

func (s *snapshot) RemoveSnapshotTask(ctx *simulator.Context, req *types.RemoveSnapshot_Task) soap.HasFault {
	m := s.m
	ref := m.runTask(ctx, "RemoveSnapshot_Task", func(*simulator.Task) (types.AnyType, types.BaseMethodFault) {
		if ctx.Map.Get(s.Self) == nil { // somebody was quicker
			return nil, &types.ManagedObjectNotFound{Obj: s.Self}
		}
		gone := []types.ManagedObjectReference{s.Self}
		if req.RemoveChildren {
			gone = append(gone, m.descendants(s.Self)...)
		}
		res := s.VirtualMachineSnapshot.RemoveSnapshotTask(ctx, req).(*methods.RemoveSnapshot_TaskBody).Res
		return m.removeSnapshots(ctx, gone, res.Returnval, req.Consolidate == nil || *req.Consolidate)
	})
	return &methods.RemoveSnapshot_TaskBody{Res: &types.RemoveSnapshot_TaskResponse{Returnval: ref}}
}

// RenameSnapshot sets name and description, or the one that is given.
func (s *snapshot) RenameSnapshot(ctx *simulator.Context, req *types.RenameSnapshot) soap.HasFault {
	ctx.WithLock(s.m.VirtualMachine, func() {
		if node := nodeOf(s.m.Snapshot.RootSnapshotList, s.Self); node != nil {
			node.Name = cmp.Or(req.Name, node.Name)
			node.Description = cmp.Or(req.Description, node.Description)
		}
	})
	return &methods.RenameSnapshotBody{Res: &types.RenameSnapshotResponse{}}
}

// nodeOf is where a snapshot is in a tree, nil for nowhere.
func nodeOf(tree []types.VirtualMachineSnapshotTree, ref types.ManagedObjectReference) *types.VirtualMachineSnapshotTree {
	for i := range tree {
		if tree[i].Snapshot == ref {
			return &tree[i]
		}
		if found := nodeOf(tree[i].ChildSnapshotList, ref); found != nil {
			return found
		}
	}
	return nil
}

func (m *machine) RemoveAllSnapshotsTask(ctx *simulator.Context, req *types.RemoveAllSnapshots_Task) soap.HasFault {
	ref := m.runTask(ctx, "RemoveAllSnapshots_Task", func(*simulator.Task) (types.AnyType, types.BaseMethodFault) {
		var gone []types.ManagedObjectReference
		if m.Snapshot != nil {
			gone = treeRefs(m.Snapshot.RootSnapshotList)
		}
		res := m.VirtualMachine.RemoveAllSnapshotsTask(ctx, req).(*methods.RemoveAllSnapshots_TaskBody).Res
		return m.removeSnapshots(ctx, gone, res.Returnval, req.Consolidate == nil || *req.Consolidate)
	})
	return &methods.RemoveAllSnapshots_TaskBody{Res: &types.RemoveAllSnapshots_TaskResponse{Returnval: ref}}
}

// removeSnapshots waits for the simulator's removal, then merges the disks, the youngest snapshot first. Without merge
// the deltas stay, and the VM needs consolidation.
func (m *machine) removeSnapshots(
	ctx *simulator.Context, gone []types.ManagedObjectReference, task types.ManagedObjectReference, merge bool,
) (types.AnyType, types.BaseMethodFault) {
	if _, fault := inner(ctx, task); fault != nil {
		return nil, fault
	}
	if merge = merge && !m.lab.faults.mergeFails(); !merge {
		m.setConsolidationNeeded(ctx, true)
	}
	for i := len(gone) - 1; i >= 0; i-- {
		for _, d := range m.disks {
			if err := d.release(gone[i].Value, merge); err != nil {
				return nil, fileFault(d, err)
			}
		}
		ctx.Map.Remove(ctx, gone[i])
	}
	return nil, m.afterChange(ctx)
}

// afterChange brings backings, files and figures in line with the disks.
func (m *machine) afterChange(ctx *simulator.Context) types.BaseMethodFault {
	ctx.WithLock(m.VirtualMachine, func() {
		ctx.Update(m.VirtualMachine, []types.PropertyChange{
			{Name: "config.hardware.device", Val: m.withBackings(m.Config.Hardware.Device, "")},
		})
	})
	for _, ref := range m.snapshotRefs() {
		s := ctx.Map.Get(ref).(*simulator.VirtualMachineSnapshot)
		s.Config.Hardware.Device = m.withBackings(s.Config.Hardware.Device, ref.Value)
	}
	if err := m.refresh(ctx); err != nil {
		return &types.SystemError{RuntimeFault: types.RuntimeFault{}, Reason: err.Error()}
	}
	return nil
}

// withBackings copies devices with the disks' backings as they now are, or as of a snapshot.
func (m *machine) withBackings(devices []types.BaseVirtualDevice, ref string) []types.BaseVirtualDevice {
	out := append([]types.BaseVirtualDevice(nil), devices...)
	for i := range out {
		old, ok := out[i].(*types.VirtualDisk)
		if !ok {
			continue
		}
		for _, d := range m.disks {
			if d.key != old.Key || !d.hasBytes() {
				continue
			}
			at := len(d.layers) - 1
			if ref != "" {
				if at = d.momentIndex(ref); at < 0 {
					continue // not part of the snapshot
				}
			}
			copied := *old
			copied.Backing = d.backing(at)
			if ref == "" {
				copied.CapacityInBytes, copied.CapacityInKB = d.capacity, d.capacity/1024
			}
			if ref != "" {
				copied.Backing = d.momentBacking(ref, at)
			}
			out[i] = &copied
		}
	}
	return out
}

// momentIndex is the layer a standing snapshot froze, -1 where there is none.
func (d *disk) momentIndex(ref string) int {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if m := d.moments[ref]; m != nil {
		return d.index(m.layer)
	}
	return -1
}

func (m *machine) snapshotRefs() []types.ManagedObjectReference {
	if m.Snapshot == nil {
		return nil
	}
	return treeRefs(m.Snapshot.RootSnapshotList)
}

// treeRefs lists a snapshot tree, parents before children.
func treeRefs(tree []types.VirtualMachineSnapshotTree) []types.ManagedObjectReference {
	var refs []types.ManagedObjectReference
	for _, t := range tree {
		refs = append(append(refs, t.Snapshot), treeRefs(t.ChildSnapshotList)...)
	}
	return refs
}

// descendants lists the snapshots below ref.
func (m *machine) descendants(ref types.ManagedObjectReference) []types.ManagedObjectReference {
	var find func(tree []types.VirtualMachineSnapshotTree) []types.ManagedObjectReference
	find = func(tree []types.VirtualMachineSnapshotTree) []types.ManagedObjectReference {
		for _, t := range tree {
			if t.Snapshot == ref {
				return treeRefs(t.ChildSnapshotList)
			}
			if found := find(t.ChildSnapshotList); found != nil {
				return found
			}
		}
		return nil
	}
	if m.Snapshot == nil {
		return nil
	}
	return find(m.Snapshot.RootSnapshotList)
}

// RevertToSnapshotTask throws away what the guest wrote since. The lab keeps no tree of deltas: only the youngest snapshot
// can be gone back to.
func (s *snapshot) RevertToSnapshotTask(ctx *simulator.Context, req *types.RevertToSnapshot_Task) soap.HasFault {
	m := s.m
	ref := m.runTask(ctx, "RevertToSnapshot_Task", func(*simulator.Task) (types.AnyType, types.BaseMethodFault) {
		for _, d := range m.disks {
			if d.snapshotted() && !d.isYoungest(s.Self.Value) {
				return nil, &types.NotSupported{}
			}
		}
		res := s.VirtualMachineSnapshot.RevertToSnapshotTask(ctx, req).(*methods.RevertToSnapshot_TaskBody).Res
		if _, fault := inner(ctx, res.Returnval); fault != nil {
			return nil, fault
		}
		for _, d := range m.disks {
			if err := d.revert(s.Self.Value); err != nil {
				return nil, fileFault(d, err)
			}
		}
		return nil, m.afterChange(ctx)
	})
	return &methods.RevertToSnapshot_TaskBody{Res: &types.RevertToSnapshot_TaskResponse{Returnval: ref}}
}

// RevertToCurrentSnapshotTask goes back to the snapshot that the VM runs on.
func (m *machine) RevertToCurrentSnapshotTask(
	ctx *simulator.Context, req *types.RevertToCurrentSnapshot_Task,
) soap.HasFault {
	body := new(methods.RevertToCurrentSnapshot_TaskBody)
	if m.Snapshot == nil || m.Snapshot.CurrentSnapshot == nil {
		body.Fault_ = simulator.Fault("no snapshot", &types.NotFound{})
		return body
	}
	at := ctx.Map.Get(*m.Snapshot.CurrentSnapshot).(*snapshot)
	res := at.RevertToSnapshotTask(ctx, &types.RevertToSnapshot_Task{This: at.Self, Host: req.Host})
	task := res.(*methods.RevertToSnapshot_TaskBody).Res.Returnval
	body.Res = &types.RevertToCurrentSnapshot_TaskResponse{Returnval: task}
	return body
}

// ReconfigVMTask lets the simulator reconfigure, then puts right what it makes of the disks' files.
func (m *machine) ReconfigVMTask(ctx *simulator.Context, req *types.ReconfigVM_Task) soap.HasFault {
	ref := m.runTask(ctx, "ReconfigVM_Task", func(*simulator.Task) (types.AnyType, types.BaseMethodFault) {
		if fault := m.grow(&req.Spec); fault != nil {
			return nil, fault
		}
		res := m.VirtualMachine.ReconfigVMTask(ctx, req).(*methods.ReconfigVM_TaskBody).Res
		if _, fault := inner(ctx, res.Returnval); fault != nil {
			return nil, fault
		}
		m.setTracking(req.Spec.ChangeTrackingEnabled)
		return nil, m.afterChange(ctx)
	})
	return &methods.ReconfigVM_TaskBody{Res: &types.ReconfigVM_TaskResponse{Returnval: ref}}
}

// RefreshStorageInfo looks at the files again.
func (m *machine) RefreshStorageInfo(ctx *simulator.Context, _ *types.RefreshStorageInfo) soap.HasFault {
	body := new(methods.RefreshStorageInfoBody)
	if err := m.refresh(ctx); err != nil {
		body.Fault_ = simulator.Fault(err.Error(), &types.SystemError{Reason: err.Error()})
		return body
	}
	body.Res = new(types.RefreshStorageInfoResponse)
	return body
}

func fileFault(d *disk, err error) types.BaseMethodFault {
	fault := &types.FileFault{File: d.backingName()}
	fault.FaultMessage = []types.LocalizableMessage{{Key: "lab", Message: err.Error()}}
	return fault
}
