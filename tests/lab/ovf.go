// OvfManager.CreateDescriptor: an OVF envelope of a VM, about files that a client has downloaded.
package main

import (
	"fmt"
	"path"
	"strings"

	"github.com/vmware/govmomi/ovf"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
	"github.com/vmware/govmomi/vim25/xml"
)

type ovfManager struct {
	*simulator.OvfManager
	lab *lab
}

func (o *ovfManager) CreateDescriptor(_ *simulator.Context, req *types.CreateDescriptor) soap.HasFault {
	body := new(methods.CreateDescriptorBody)
	m := o.lab.machines[req.Obj]
	if m == nil {
		body.Fault_ = simulator.Fault("", &types.InvalidArgument{InvalidProperty: "obj"})
		return body
	}
	text, err := m.envelope(req.Cdp)
	if err != nil {
		body.Fault_ = simulator.Fault(err.Error(), &types.InvalidArgument{InvalidProperty: "cdp"})
		return body
	}
	body.Res = &types.CreateDescriptorResponse{Returnval: types.OvfCreateDescriptorResult{OvfDescriptor: text}}
	return body
}

// envelope says what the VM is made of: processors, memory, disks.
func (m *machine) envelope(p types.OvfCreateDescriptorParams) (string, error) {
	e := ovf.Envelope{VirtualSystem: &ovf.VirtualSystem{Content: ovf.Content{ID: p.Name, Info: "A virtual machine"}}}
	name, version := p.Name, "vmx-19"
	e.VirtualSystem.Name = &name
	hardware := ovf.VirtualHardwareSection{
		Section: ovf.Section{Info: "Virtual hardware requirements"},
		System: &ovf.VirtualSystemSettingData{CIMVirtualSystemSettingData: ovf.CIMVirtualSystemSettingData{
			ElementName: "Virtual Hardware Family", InstanceID: "0", VirtualSystemIdentifier: &name,
			VirtualSystemType: &version,
		}},
		Item: []ovf.ResourceAllocationSettingData{
			item(3, "1", "CPUs", uint(m.spec.CPUs)), item(4, "2", "Memory", uint(m.spec.MemoryMiB)),
			item(6, "3", "SCSI controller 0", 0),
		},
	}
	disks := ovf.DiskSection{Section: ovf.Section{Info: "List of the virtual disks"}}
	for i, f := range p.OvfFiles {
		d := m.diskOfKey(f.DeviceId)
		if d == nil {
			return "", fmt.Errorf("no device %q", f.DeviceId)
		}
		file, disk := fmt.Sprintf("file%d", i+1), fmt.Sprintf("vmdisk%d", i+1)
		e.References = append(e.References, ovf.File{ID: file, Href: path.Base(f.Path), Size: uint(f.Size)})
		format, unit := "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized", "byte"
		disks.Disks = append(disks.Disks, ovf.VirtualDiskDesc{
			DiskID: disk, FileRef: &file, Capacity: fmt.Sprint(d.capacity), CapacityAllocationUnits: &unit, Format: &format,
		})
		parent := "3"
		drive := item(17, fmt.Sprint(10+i), fmt.Sprintf("Hard disk %d", i+1), 0)
		drive.Parent, drive.HostResource = &parent, []string{"ovf:/disk/" + disk}
		hardware.Item = append(hardware.Item, drive)
	}
	e.Disk, e.VirtualSystem.VirtualHardware = &disks, []ovf.VirtualHardwareSection{hardware}
	text, err := xml.MarshalIndent(e, "", "  ")
	return xml.Header + string(text), err
}

func item(kind uint16, id, name string, quantity uint) ovf.ResourceAllocationSettingData {
	r := ovf.ResourceAllocationSettingData{}
	t := ovf.CIMResourceType(kind)
	r.ResourceType, r.InstanceID, r.ElementName = &t, id, name
	if quantity > 0 {
		r.VirtualQuantity = &quantity
	}
	return r
}

// diskOfKey finds a disk by the key of its URL in a lease, or by that key's last part.
func (m *machine) diskOfKey(key string) *disk {
	for _, d := range m.disks {
		own := fmt.Sprintf("%s%d:%d", leaseControllers[d.spec.Controller], d.spec.Bus, *d.spec.Unit)
		if key == own || strings.HasSuffix(key, "/"+own) {
			return d
		}
	}
	return nil
}
