// What happened to a VM before the tests came: other people's snapshots, and deltas left behind by a failed removal.
package main

import (
	"fmt"
	"math/rand/v2"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

const orphanWrites = 1 << 20 // bytes the guest writes into an orphaned delta

// playPast makes the scenario's snapshots, and the orphaned deltas of consolidation_needed.
func (m *machine) playPast() error {
	for _, s := range m.spec.Snapshots {
		if err := m.pastSnapshot(s); err != nil {
			return fmt.Errorf("snapshot %q: %w", s.Name, err)
		}
	}
	if !m.spec.needed() {
		return nil
	}
	for _, d := range m.disks {
		if !d.snapshotted() {
			continue
		}
		if err := d.orphanDelta(); err != nil {
			return err
		}
	}
	m.setConsolidationNeeded(m.lab.ctx, true)
	return faultError(m.afterChange(m.lab.ctx))
}

func (m *machine) pastSnapshot(s snapshotSpec) error {
	ctx := m.lab.ctx
	res := m.CreateSnapshotTask(ctx, &types.CreateSnapshot_Task{
		This: m.Self, Name: s.Name, Description: s.Description,
	}).(*methods.CreateSnapshot_TaskBody).Res
	if _, fault := inner(ctx, res.Returnval); fault != nil {
		return faultError(fault)
	}
	for _, d := range m.disks {
		if err := d.scribble(int64(s.Writes)); err != nil {
			return err
		}
	}
	return m.refresh(ctx)
}

// scribble is a guest writing about n bytes at random places.
func (d *disk) scribble(n int64) error {
	r := rand.New(source(d.lab.opts.seed, d.path(fmt.Sprint("scribble", d.next))))
	const block = 16 << 10
	for ; n > 0 && d.hasBytes() && d.capacity > block; n -= block {
		off := r.Int64N((d.capacity-block)/sectorSize+1) * sectorSize
		if err := d.guestWrite(off, randomBytes(r.Uint64(), min(n, block))); err != nil {
			return err
		}
	}
	return nil
}

// orphanDelta puts a delta on top that no snapshot explains.
func (d *disk) orphanDelta() error {
	d.mu.Lock()
	err := d.pushDelta()
	d.mu.Unlock()
	if err != nil {
		return err
	}
	return d.scribble(orphanWrites)
}

func (m *machine) setConsolidationNeeded(ctx *simulator.Context, needed bool) {
	ctx.WithLock(m.VirtualMachine, func() {
		ctx.Update(m.VirtualMachine, []types.PropertyChange{
			{Name: "runtime.consolidationNeeded", Val: needed},
			{Name: "summary.runtime.consolidationNeeded", Val: needed},
		})
	})
}

// ConsolidateVMDisksTask merges every delta above a layer that no snapshot holds.
func (m *machine) ConsolidateVMDisksTask(ctx *simulator.Context, _ *types.ConsolidateVMDisks_Task) soap.HasFault {
	ref := m.runTask(ctx, "ConsolidateVMDisks_Task", func(*simulator.Task) (types.AnyType, types.BaseMethodFault) {
		for _, d := range m.disks {
			if err := d.consolidateAll(); err != nil {
				return nil, fileFault(d, err)
			}
		}
		m.setConsolidationNeeded(ctx, false)
		return nil, m.afterChange(ctx)
	})
	return &methods.ConsolidateVMDisks_TaskBody{Res: &types.ConsolidateVMDisks_TaskResponse{Returnval: ref}}
}

func (d *disk) consolidateAll() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := len(d.layers) - 2; i >= 0; i-- {
		if d.frozen(d.layers[i]) {
			continue
		}
		if err := d.mergeAbove(i); err != nil {
			return err
		}
	}
	return nil
}

func faultError(fault types.BaseMethodFault) error {
	if fault == nil {
		return nil
	}
	return soap.WrapVimFault(fault)
}
