// A lone ESXi host (-esx): apiType HostAgent, one datacenter named ha-datacenter, no clusters, no folders.
package main

import (
	"fmt"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/simulator/esx"
	"github.com/vmware/govmomi/vim25/types"
)

// adoptESX takes the host and datacenter that the simulator's ESX model comes with.
func (l *lab) adoptESX(dc *datacenter) error {
	if len(l.datacenters) > 0 {
		return fmt.Errorf("a lone host has one datacenter")
	}
	for _, vm := range dc.spec.VMs {
		if vm.Folder != "" {
			return fmt.Errorf("VM %q: a lone host has no VM folders", vm.Name)
		}
	}
	dc.path = esx.Datacenter.Name
	if err := l.useDatacenter(dc, object.NewDatacenter(l.client, esx.Datacenter.Self)); err != nil {
		return err
	}
	name := dc.spec.firstHost()
	host := l.ctx.Map.Get(esx.HostSystem.Self).(*simulator.HostSystem)
	l.ctx.Map.AtomicUpdate(l.ctx, host, []types.PropertyChange{
		{Name: "name", Val: name}, {Name: "summary.config.name", Val: name},
	})
	l.setName(*host.Parent, name) // its compute resource
	return l.noteHost(dc, name, host.Self)
}
