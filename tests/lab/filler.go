// Large inventories: VMs without disks or files, copied from one that the simulator made (which takes it about 20 ms).
package main

import (
	"fmt"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

func (l *lab) vmCount() int { return len(l.ctx.Map.All("VirtualMachine")) }

// buildFiller makes spec.Count VMs named <prefix>00000 and so on, running, on the datacenter's first host.
func (l *lab) buildFiller(dc *datacenter, spec fillerSpec) error {
	if spec.Count <= 0 {
		return nil
	}
	setDefault(&spec.Prefix, "vm-")
	model := vmSpec{Name: spec.Prefix + "00000", Folder: spec.Folder, NICs: []nicSpec{}}
	if err := model.complete(&dc.spec); err != nil {
		return err
	}
	if err := l.buildVM(dc, model); err != nil {
		return err
	}
	first := l.order[len(l.order)-1].VirtualMachine
	folder := l.ctx.Map.Get(*first.Parent).(*simulator.Folder)
	refs := make([]types.ManagedObjectReference, 0, spec.Count)
	for i := 1; i < spec.Count; i++ {
		vm := copyVM(first, fmt.Sprintf("%s%05d", spec.Prefix, i))
		l.ctx.Map.NewEntity(vm)
		vm.Summary.Vm = &vm.Self
		l.ctx.Map.PutEntity(folder, vm)
		refs = append(refs, vm.Self)
	}
	folder.ChildEntity = append(folder.ChildEntity, refs...)
	l.attach(first, refs)
	return nil
}

// copyVM is a VM like first, with what must be its own replaced.
func copyVM(first *simulator.VirtualMachine, name string) *simulator.VirtualMachine {
	vm := &simulator.VirtualMachine{VirtualMachine: first.VirtualMachine}
	vm.DataSets = map[string]*simulator.DataSet{}
	vm.Self = types.ManagedObjectReference{Type: "VirtualMachine"}
	config := *first.Config
	config.Name, config.Uuid, config.InstanceUuid = name, newUUID(0x42), newUUID(0x50)
	config.Files.VmPathName = fmt.Sprintf("%s/%s.vmx", config.Files.LogDirectory, name)
	vm.Config, vm.Name, vm.Summary.Config.Name = &config, name, name
	vm.Summary.Config.Uuid, vm.Summary.Config.InstanceUuid = config.Uuid, config.InstanceUuid
	vm.Summary.Config.VmPathName = config.Files.VmPathName
	return vm
}

// attach lists the VMs with the host, the pool and the datastore of first.
func (l *lab) attach(first *simulator.VirtualMachine, refs []types.ManagedObjectReference) {
	host := l.ctx.Map.Get(*first.Runtime.Host).(*simulator.HostSystem)
	host.Vm = append(host.Vm, refs...)
	for _, ref := range first.Datastore {
		ds := l.ctx.Map.Get(ref).(*simulator.Datastore)
		ds.Vm = append(ds.Vm, refs...)
	}
	if pool, ok := l.ctx.Map.Get(*first.ResourcePool).(*simulator.ResourcePool); ok {
		pool.Vm = append(pool.Vm, refs...)
	}
}
