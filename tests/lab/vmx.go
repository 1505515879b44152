// The .vmx file: the VM's configuration as the host stores it. libvirt's driver reads it for dumpxml.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/vim25/types"
)

// writeVMX writes the file as the VM now is.
func (m *machine) writeVMX() error {
	vars := map[string]string{
		"config.version": "8", "virtualHW.version": "19",
		"displayName": m.Name, "annotation": m.Config.Annotation,
		"guestOS":  strings.TrimSuffix(strings.ToLower(m.Config.GuestId), "guest"),
		"nvram":    m.createName() + ".nvram",
		"numvcpus": strconv.Itoa(int(m.Config.Hardware.NumCPU)), "memSize": strconv.Itoa(int(m.Config.Hardware.MemoryMB)),
		"uuid.bios": vmxUUID(m.Config.Uuid), "uuid.location": vmxUUID(m.Config.Uuid),
		"vc.uuid": vmxUUID(m.Config.InstanceUuid), "floppy0.present": "FALSE",
		"pciBridge0.present": "TRUE", "svga.present": "TRUE", "toolScripts.afterPowerOn": "TRUE",
	}
	if m.Config.Firmware != "bios" { // a host writes the line for efi only; libvirt refuses any other value
		vars["firmware"] = m.Config.Firmware
	}
	if cores := m.Config.Hardware.NumCoresPerSocket; cores != nil && *cores > 1 {
		vars["cpuid.coresPerSocket"] = strconv.Itoa(int(*cores))
	}
	if m.spec.SecureBoot {
		vars["uefi.secureBoot.enabled"] = "TRUE"
	}
	for _, d := range m.disks {
		m.vmxDisk(vars, d)
	}
	for _, device := range m.Config.Hardware.Device {
		vmxNIC(vars, device)
	}
	keys := make([]string, 0, len(vars))
	for k := range vars {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	var b strings.Builder
	b.WriteString(".encoding = \"UTF-8\"\n")
	for _, k := range keys {
		fmt.Fprintf(&b, "%s = \"%s\"\n", k, vmxEscape(vars[k]))
	}
	file := filepath.Join(m.ds.dir, m.dir, fileName(m.spec.Name)+".vmx")
	return os.WriteFile(file, []byte(b.String()), 0o600)
}

func (m *machine) vmxDisk(vars map[string]string, d *disk) {
	prefix, device := "scsi", "scsi-hardDisk"
	switch d.spec.Controller {
	case "ahci":
		prefix, device = "sata", "ata-hardDisk"
	case "nvme":
		prefix, device = "nvme", ""
	case "ide":
		prefix, device = "ide", "ata-hardDisk"
	}
	bus := fmt.Sprintf("%s%d", prefix, d.spec.Bus)
	vars[bus+".present"] = "TRUE"
	if prefix == "scsi" {
		vars[bus+".virtualDev"] = d.spec.Controller
	}
	slot := fmt.Sprintf("%s:%d", bus, *d.spec.Unit)
	vars[slot+".present"] = "TRUE"
	if device != "" {
		vars[slot+".deviceType"] = device
	}
	vars[slot+".fileName"] = m.vmxFileName(d)
	if d.spec.Mode != "persistent" {
		vars[slot+".mode"] = strings.ReplaceAll(d.spec.Mode, "_", "-")
	}
}

// vmxFileName is the descriptor's name: bare in the VM's own folder, else with its path on the host.
func (m *machine) vmxFileName(d *disk) string {
	_, file, _ := strings.Cut(d.backingName(), "] ")
	if d.ds == m.ds && d.dir == m.dir {
		return filepath.Base(file)
	}
	return fmt.Sprintf("/vmfs/volumes/%s/%s", d.ds.name, file)
}

func vmxNIC(vars map[string]string, device types.BaseVirtualDevice) {
	nic, ok := device.(types.BaseVirtualEthernetCard)
	if !ok {
		return
	}
	card := nic.GetVirtualEthernetCard()
	name := fmt.Sprintf("ethernet%d.", card.Key-4000)
	model := map[string]string{
		"*types.VirtualE1000": "e1000", "*types.VirtualE1000e": "e1000e", "*types.VirtualVmxnet2": "vmxnet", "*types.VirtualPCNet32": "vlance",
	}[fmt.Sprintf("%T", device)]
	setDefault(&model, "vmxnet3")
	vars[name+"present"], vars[name+"virtualDev"] = "TRUE", model
	network := defaultNetwork
	if backing, standard := card.Backing.(*types.VirtualEthernetCardNetworkBackingInfo); standard {
		network = backing.DeviceName
	}
	vars[name+"networkName"], vars[name+"connectionType"] = network, "bridged"
	vars[name+"addressType"], vars[name+"generatedAddress"] = "vpx", card.MacAddress
}

// vmxUUID spells a UUID as "56 4d aa bb cc dd ee ff-00 11 …".
func vmxUUID(uuid string) string { return ddbUUID(uuid) }

// vmxEscape writes what a quoted value cannot hold as |XX.
func vmxEscape(s string) string {
	return strings.NewReplacer("|", "|7C", `"`, "|22", "\n", "|0A", "\r", "|0D").Replace(s)
}
