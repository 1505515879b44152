// Disks that are made larger: an edit of a device with a capacity above the one it has.
package main

import (
	"slices"

	"github.com/vmware/govmomi/vim25/types"
)

// grow extends disks, and takes what it has done out of spec. Disks with deltas stay as they are, and so do smaller wishes.
func (m *machine) grow(spec *types.VirtualMachineConfigSpec) types.BaseMethodFault {
	for at := len(spec.DeviceChange) - 1; at >= 0; at-- {
		change := spec.DeviceChange[at].GetVirtualDeviceConfigSpec()
		wanted, isDisk := change.Device.(*types.VirtualDisk)
		if !isDisk || change.Operation != types.VirtualDeviceConfigSpecOperationEdit {
			continue
		}
		n := slices.IndexFunc(m.disks, func(d *disk) bool { return d.key == wanted.Key })
		if n < 0 || wanted.CapacityInBytes == m.disks[n].capacity {
			continue
		}
		if fault := m.disks[n].grow(wanted.CapacityInBytes); fault != nil {
			return fault
		}
		spec.DeviceChange = slices.Delete(spec.DeviceChange, at, at+1)
	}
	return nil
}

// grow adds zeros at the end of a flat base that nothing stands on.
func (d *disk) grow(capacity int64) types.BaseMethodFault {
	d.mu.Lock()
	defer d.mu.Unlock()
	if capacity < d.capacity || len(d.layers) != 1 {
		return &types.InvalidDeviceOperation{}
	}
	flat, isFlat := d.layers[0].store.(*flatFile)
	if !isFlat {
		return &types.NotSupported{}
	}
	if err := flat.f.Truncate(capacity); err != nil {
		return fileFault(d, err)
	}
	flat.size, d.capacity, d.digest = capacity, capacity, ""
	if err := d.writeDescriptor(0); err != nil {
		return fileFault(d, err)
	}
	return nil
}
