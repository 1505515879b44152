// Tasks of the VMs: run, failed or drawn out as the faults say.
package main

import (
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

type taskBody func(t *simulator.Task) (types.AnyType, types.BaseMethodFault)

// runTask starts body as a task on the VM, unless a fault is set to fail or to draw out the next task of this method.
func (m *machine) runTask(ctx *simulator.Context, method string, body taskBody) types.ManagedObjectReference {
	f := m.lab.faults
	name := strings.ToLower(method[:1]) + strings.ReplaceAll(method[1:], "_", "") // what CreateTask makes info.name of
	fault := f.takeTaskFault(method)
	task := simulator.CreateTask(m.VirtualMachine, name,
		func(t *simulator.Task) (types.AnyType, types.BaseMethodFault) {
			if fault != nil {
				return nil, fault
			}
			return body(t)
		})
	length := f.takeDelay(&f.lengths, method)
	if length == 0 {
		return task.Run(ctx)
	}
	// A task holds its object's lock, and nobody could read the VM meanwhile: wait in a task on nothing.
	nothing := &bystander{Self: types.ManagedObjectReference{Type: "Folder", Value: newUUID()}}
	outer := simulator.CreateTask(nothing, name, func(*simulator.Task) (types.AnyType, types.BaseMethodFault) {
		m.lab.sleep(length)
		return inner(ctx, task.Run(ctx))
	})
	ref := outer.Run(m.lab.newContext())
	ctx.Map.AtomicUpdate(m.lab.newContext(), outer, []types.PropertyChange{
		{Name: "info.entity", Val: m.Self}, {Name: "info.entityName", Val: m.Name},
		{Name: "info.descriptionId", Val: task.Info.DescriptionId},
	})
	return ref
}

// bystander is an object nobody else locks.
type bystander struct{ Self types.ManagedObjectReference }

func (b *bystander) Reference() types.ManagedObjectReference { return b.Self }

// inner runs one of the simulator's own tasks to its end, under the lock the outer task holds.
func inner(ctx *simulator.Context, ref types.ManagedObjectReference) (types.AnyType, types.BaseMethodFault) {
	task := ctx.Map.Get(ref).(*simulator.Task)
	task.Wait()
	if task.Info.Error != nil {
		return nil, task.Info.Error.Fault
	}
	return task.Info.Result, nil
}
