// Virtual hardware: controllers and disks as config.hardware.device has them.
package main

import (
	"fmt"
	"math/rand/v2"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/types"
)

// Keys as vCenter gives them: a controller's is its kind's first plus the bus, a disk's is its kind's first plus the
// bus times the units of a controller plus the unit.
var controllerKinds = map[string]struct {
	key, diskKey, units int32
	reserved            int32 // unit the controller itself takes, -1 for none
	label               string
}{
	"pvscsi":     {1000, 2000, 16, 7, "SCSI controller"},
	"lsilogic":   {1000, 2000, 16, 7, "SCSI controller"},
	"lsisas1068": {1000, 2000, 16, 7, "SCSI controller"},
	"buslogic":   {1000, 2000, 16, 7, "SCSI controller"},
	"ahci":       {15000, 16000, 30, -1, "SATA controller"},
	"nvme":       {31000, 32000, 15, -1, "NVME controller"},
	"ide":        {200, 3000, 2, -1, "IDE"},
}

func (d *disk) controllerKey() int32 { return controllerKinds[d.spec.Controller].key + d.spec.Bus }

// makeDisks makes the disks of the scenario, content and all, and gives each a place on its controller.
func (m *machine) makeDisks() error {
	taken := map[int32]bool{}
	for i := range m.spec.Disks {
		spec := &m.spec.Disks[i]
		kind, known := controllerKinds[spec.Controller]
		if !known {
			return fmt.Errorf("disk %d: no controller %q", i, spec.Controller)
		}
		first := kind.diskKey + spec.Bus*kind.units
		if spec.Unit == nil {
			unit := int32(0)
			for unit == kind.reserved || taken[first+unit] {
				unit++
			}
			spec.Unit = &unit
		}
		key := first + *spec.Unit
		if taken[key] || *spec.Unit >= kind.units || *spec.Unit == kind.reserved {
			return fmt.Errorf("disk %d: unit %d of %s %d is not free", i, *spec.Unit, spec.Controller, spec.Bus)
		}
		taken[key] = true
		d, err := m.makeDisk(i, *spec, key)
		if err != nil {
			return fmt.Errorf("disk %d: %w", i, err)
		}
		m.disks = append(m.disks, d)
	}
	return nil
}

// devices lists the hardware: controllers, then disks, then network adapters.
func (m *machine) devices() (object.VirtualDeviceList, error) {
	var list object.VirtualDeviceList
	made := map[int32]bool{200: true, 201: true} // both IDE controllers are there by default
	for _, d := range m.disks {
		if key := d.controllerKey(); !made[key] {
			made[key] = true
			list = append(list, newController(d.spec, key))
		}
	}
	for i, d := range m.disks {
		list = append(list, d.device(i))
	}
	for i, spec := range m.spec.NICs {
		nic, err := m.newNIC(spec, int32(4000+i), i)
		if err != nil {
			return nil, err
		}
		list = append(list, nic)
	}
	return list, nil
}

func newController(spec diskSpec, key int32) types.BaseVirtualDevice {
	kind, bus := spec.Controller, spec.Bus
	base := types.VirtualController{BusNumber: bus}
	base.Key, base.ControllerKey, base.UnitNumber = key, 100, types.NewInt32(key%1000%90+3)
	label := fmt.Sprintf("%s %d", controllerKinds[kind].label, bus)
	base.DeviceInfo = &types.Description{Label: label, Summary: label}
	scsi := types.VirtualSCSIController{
		VirtualController: base, SharedBus: types.VirtualSCSISharing(spec.BusSharing), ScsiCtlrUnitNumber: 7,
		HotAddRemove: types.NewBool(true),
	}
	switch kind {
	case "lsilogic":
		return &types.VirtualLsiLogicController{VirtualSCSIController: scsi}
	case "lsisas1068":
		return &types.VirtualLsiLogicSASController{VirtualSCSIController: scsi}
	case "buslogic":
		return &types.VirtualBusLogicController{VirtualSCSIController: scsi}
	case "ahci":
		return &types.VirtualAHCIController{VirtualSATAController: types.VirtualSATAController{VirtualController: base}}
	case "nvme":
		return &types.VirtualNVMEController{VirtualController: base}
	}
	return &types.ParaVirtualSCSIController{VirtualSCSIController: scsi}
}

// device is the disk as a VM's hardware lists it.
func (d *disk) device(i int) *types.VirtualDisk {
	v := &types.VirtualDisk{
		CapacityInKB: d.capacity / 1024, CapacityInBytes: d.capacity,
		StorageIOAllocation: &types.StorageIOAllocationInfo{
			Limit: types.NewInt64(-1), Shares: &types.SharesInfo{Shares: 1000, Level: types.SharesLevelNormal},
		},
		DiskObjectId: fmt.Sprintf("1-%d", d.key),
	}
	v.Key, v.ControllerKey, v.UnitNumber = d.key, d.controllerKey(), d.spec.Unit
	v.DeviceInfo = &types.Description{Label: fmt.Sprintf("Hard disk %d", i+1)}
	v.Backing = d.backing(len(d.layers) - 1)
	return v
}

// backing describes layer i and, as its parents, those below; a disk without an extent file as its kind.
func (d *disk) backing(i int) types.BaseVirtualDeviceBackingInfo {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if !d.hasBytes() {
		return d.objectBacking()
	}
	return withChangeID(d.chainBacking(d.layers[:i+1]), d.changeID())
}

// chainBacking is the backing of layers, the base first.
func (d *disk) chainBacking(layers []*layer) types.BaseVirtualDeviceBackingInfo {
	if d.spec.Backing == backingSeSparse {
		return d.seSparseChain(layers)
	}
	return d.flatChain(layers)
}

// withChangeID puts a changeId on a backing, not on its parents'.
func withChangeID(b types.BaseVirtualDeviceBackingInfo, id string) types.BaseVirtualDeviceBackingInfo {
	switch b := b.(type) {
	case *types.VirtualDiskFlatVer2BackingInfo:
		b.ChangeId = id
	case *types.VirtualDiskSeSparseBackingInfo:
		b.ChangeId = id
	}
	return b
}

func (d *disk) flatChain(layers []*layer) *types.VirtualDiskFlatVer2BackingInfo {
	l, delta := layers[len(layers)-1], len(layers) > 1
	no := types.NewBool(false)
	b := &types.VirtualDiskFlatVer2BackingInfo{
		DiskMode: d.spec.Mode, ThinProvisioned: types.NewBool(d.spec.Thin || delta),
		Split: no, WriteThrough: no, EagerlyScrub: no, DigestEnabled: no,
		Uuid: d.uuid, ContentId: contentID(d, l), Sharing: d.spec.Sharing, KeyId: d.keyID(),
	}
	b.FileName, b.Datastore = d.datastorePath(l.descriptor), &d.ds.ref
	if !delta {
		return b
	}
	b.DeltaDiskFormat, b.DeltaDiskFormatVariant = "redoLogFormat", "vmfsSparseVariant"
	if _, se := l.store.(*seSparseFile); se {
		b.DeltaDiskFormat, b.DeltaDiskFormatVariant = "seSparseFormat", ""
	}
	b.Parent = d.flatChain(layers[:len(layers)-1])
	return b
}

func contentID(d *disk, l *layer) string { return fmt.Sprintf("%024x%08x", d.key, l.cid) }

// backingName is the datastore path in the live VM's backing.
func (d *disk) backingName() string {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if !d.hasBytes() {
		return d.datastorePath(d.base + ".vmdk")
	}
	return d.datastorePath(d.top().descriptor)
}

// newMAC draws an address from the range vCenter assigns (00:50:56:80:00:00 to 00:50:56:bf:ff:ff).
func newMAC() string {
	n := rand.Uint32()
	return fmt.Sprintf("00:50:56:%02x:%02x:%02x", 0x80|n>>16&0x3f, n>>8&0xff, n&0xff)
}
