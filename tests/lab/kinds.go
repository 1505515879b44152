// Disks that are not a flat file.
//
// vsan and vvol have a descriptor that names an object, and no extent file; rdm and rdm_physical map a LUN. None of
// them holds bytes here: they are there to be refused by name. sesparse has its bytes in `x-sesparse.vmdk`.
package main

import (
	"fmt"
	"os"
	"path"
	"strings"

	"github.com/vmware/govmomi/vim25/types"
)

const (
	backingFlat        = "flat"
	backingSeSparse    = "sesparse"
	backingVSAN        = "vsan"
	backingVVol        = "vvol"
	backingRDM         = "rdm"
	backingRDMPhysical = "rdm_physical"
)

var backings = []string{backingFlat, backingSeSparse, backingVSAN, backingVVol, backingRDM, backingRDMPhysical}

// createObject writes the descriptor of a disk without an extent file.
func (d *disk) createObject() error {
	d.objectID = newUUID()
	var b strings.Builder
	extent, kind := "", "vmfs"
	switch d.spec.Backing {
	case backingVSAN:
		extent = fmt.Sprintf("VMFS \"vsan://%s\"", d.objectID)
	case backingVVol:
		extent = fmt.Sprintf("VMFS \"vvol://rfc4122.%s\"", d.objectID)
	case backingRDM:
		kind, extent = "vmfsRawDeviceMap", fmt.Sprintf("VMFSRDM \"%s-rdm.vmdk\"", d.base)
	default:
		kind, extent = "vmfsPassthroughRawDeviceMap", fmt.Sprintf("VMFSRDM \"%s-rdmp.vmdk\"", d.base)
	}
	descriptorHead(&b, 0xfffffffe, 0xffffffff, kind)
	fmt.Fprintf(&b, "\n# Extent description\nRW %d %s\n\n# The Disk Data Base\n#DDB\n\n", d.capacity/sectorSize, extent)
	fmt.Fprintf(&b, "ddb.uuid = \"%s\"\n", ddbUUID(d.uuid))
	return os.WriteFile(d.path(d.base+".vmdk"), []byte(b.String()), 0o600)
}

// objectBacking is the backing of a disk without an extent file.
func (d *disk) objectBacking() types.BaseVirtualDeviceBackingInfo {
	file := types.VirtualDeviceFileBackingInfo{FileName: d.datastorePath(d.base + ".vmdk"), Datastore: &d.ds.ref}
	switch d.spec.Backing {
	case backingRDM, backingRDMPhysical:
		mode := types.VirtualDiskCompatibilityModeVirtualMode
		if d.spec.Backing == backingRDMPhysical {
			mode = types.VirtualDiskCompatibilityModePhysicalMode
		}
		return &types.VirtualDiskRawDiskMappingVer1BackingInfo{
			VirtualDeviceFileBackingInfo: file, DiskMode: d.spec.Mode, Uuid: d.uuid, Sharing: d.spec.Sharing,
			LunUuid: "020000000060" + strings.ReplaceAll(d.objectID, "-", ""), CompatibilityMode: string(mode),
			DeviceName: "vml.0200000000" + strings.ReplaceAll(d.objectID, "-", ""),
		}
	}
	id := d.objectID
	if d.spec.Backing == backingVVol {
		id = "rfc4122." + id
	}
	file.BackingObjectId = &id
	no := types.NewBool(false)
	return &types.VirtualDiskFlatVer2BackingInfo{
		VirtualDeviceFileBackingInfo: file, DiskMode: d.spec.Mode, ThinProvisioned: types.NewBool(true),
		Split: no, WriteThrough: no, EagerlyScrub: no, DigestEnabled: no, Uuid: d.uuid, Sharing: d.spec.Sharing,
		KeyId: d.keyID(),
	}
}

// seSparseChain is the backing of layers, the base first, as seSparse backings.
func (d *disk) seSparseChain(layers []*layer) *types.VirtualDiskSeSparseBackingInfo {
	l := layers[len(layers)-1]
	no := types.NewBool(false)
	b := &types.VirtualDiskSeSparseBackingInfo{
		DiskMode: d.spec.Mode, WriteThrough: no, DigestEnabled: no, Uuid: d.uuid, GrainSize: seGrain / 1024,
		ContentId: contentID(d, l), KeyId: d.keyID(),
	}
	b.FileName, b.Datastore = d.datastorePath(l.descriptor), &d.ds.ref
	if len(layers) > 1 {
		b.DeltaDiskFormat, b.Parent = "seSparseFormat", d.seSparseChain(layers[:len(layers)-1])
	}
	return b
}

// keyID names the key of an encrypted disk.
func (d *disk) keyID() *types.CryptoKeyId {
	if !d.spec.Encrypted {
		return nil
	}
	return &types.CryptoKeyId{KeyId: d.uuid, ProviderId: &types.KeyProviderId{Id: "lab-key-provider"}}
}

// homeDir is the folder a VM or disk gets on a datastore of this type: vSAN and vVol name it by an object.
func homeDir(kind, dir string) string {
	switch strings.ToLower(kind) {
	case backingVSAN:
		return newUUID()
	case backingVVol:
		return "rfc4122." + newUUID()
	}
	return path.Clean(dir)
}
