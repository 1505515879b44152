// What the lab learns from the simulator's registry.
package main

import (
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// watch hears of every change in the registry: it keeps what follows from power states, and makes sessions forget what is gone.
type watch struct{ lab *lab }

func (w *watch) Reference() types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: "LabWatch", Value: "lab-watch"}
}

// PutObject names tasks as vCenter does, by their method: of "PowerOn" pyvmomi makes an unknown method, on which its
// WaitForTask raises AttributeError.
func (w *watch) PutObject(_ *simulator.Context, obj mo.Reference) {
	task, ok := obj.(*simulator.Task)
	if !ok || strings.HasSuffix(task.Info.Name, "_Task") {
		return
	}
	name := strings.ReplaceAll(task.Info.Name, "Vm", "VM")
	for _, method := range []string{name + "_Task", name + "VM_Task"} {
		if _, known := types.TypeFunc()(method); known {
			task.Info.Name = method
			return
		}
	}
}

func (w *watch) RemoveObject(ctx *simulator.Context, ref types.ManagedObjectReference) {
	w.lab.dropWrapper(ctx, ref)
}

func (w *watch) UpdateObject(_ *simulator.Context, obj mo.Reference, changes []types.PropertyChange) {
	vm, ok := obj.(*mo.VirtualMachine)
	if !ok {
		return
	}
	m := w.lab.machines[vm.Self]
	for _, c := range changes {
		if m != nil && c.Name == "runtime.powerState" {
			m.powered(vm, c.Val.(types.VirtualMachinePowerState))
		}
	}
}
