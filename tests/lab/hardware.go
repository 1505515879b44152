// What a VM has beside its disks: network cards on networks of any kind, and devices that a copy cannot take along.
package main

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

const defaultNetwork = "VM Network" // the simulator's own; a card is made on it, then put on its network

// nicSpec is a network card.
type nicSpec struct {
	Model        string `json:"model"`
	Network      string `json:"network"` // a distributed portgroup's name, or any other: a standard network's
	MAC          string `json:"mac"`
	Disconnected bool   `json:"disconnected"` // when the VM starts
}

// UnmarshalJSON takes a bare model too.
func (n *nicSpec) UnmarshalJSON(b []byte) error {
	if b[0] == '"' {
		return json.Unmarshal(b, &n.Model)
	}
	type plain nicSpec
	return strictUnmarshal(b, (*plain)(n))
}

// buildPortgroups makes one distributed switch of all hosts, with the datacenter's portgroups.
func (l *lab) buildPortgroups(dc *datacenter) error {
	if len(dc.spec.Portgroups) == 0 {
		return nil
	}
	ctx := context.Background()
	spec := types.DVSCreateSpec{ConfigSpec: &types.VMwareDVSConfigSpec{DVSConfigSpec: types.DVSConfigSpec{Name: "dvs"}}}
	task, err := dc.folders.NetworkFolder.CreateDVS(ctx, spec)
	if err != nil {
		return err
	}
	info, err := task.WaitForResult(ctx, nil)
	if err != nil {
		return err
	}
	ref := info.Result.(types.ManagedObjectReference)
	dvs := object.NewDistributedVirtualSwitch(l.client, ref)
	for _, name := range dc.spec.Portgroups {
		task, err = dvs.AddPortgroup(ctx, []types.DVPortgroupConfigSpec{{Name: decodeName(name), NumPorts: 8}})
		if err == nil {
			err = task.Wait(ctx)
		}
		if err != nil {
			return err
		}
		all := l.ctx.Map.Get(ref).(*simulator.DistributedVirtualSwitch).Portgroup
		dc.portgroups[name] = all[len(all)-1]
		l.setName(dc.portgroups[name], name)
	}
	members := &types.DVSConfigSpec{}
	for _, host := range dc.hosts {
		members.Host = append(members.Host, types.DistributedVirtualSwitchHostMemberConfigSpec{
			Operation: string(types.ConfigSpecOperationAdd), Host: host.ref,
		})
	}
	if task, err = dvs.Reconfigure(ctx, members); err != nil {
		return err
	}
	return task.Wait(ctx)
}

// networkBacking is that of a card on a distributed portgroup, or on the network that every card is made on.
func (m *machine) networkBacking(name string) (types.BaseVirtualDeviceBackingInfo, error) {
	ref, distributed := m.dc.portgroups[name]
	if !distributed {
		backing := &types.VirtualEthernetCardNetworkBackingInfo{}
		backing.DeviceName = defaultNetwork
		return backing, nil
	}
	return object.NewDistributedVirtualPortgroup(m.lab.client, ref).EthernetCardBackingInfo(context.Background())
}

func (m *machine) newNIC(spec nicSpec, key int32, i int) (types.BaseVirtualDevice, error) {
	card := types.VirtualEthernetCard{AddressType: string(types.VirtualEthernetCardMacTypeAssigned), MacAddress: spec.MAC}
	setDefault(&card.MacAddress, newMAC())
	card.Key, card.ControllerKey, card.UnitNumber = key, 100, types.NewInt32(int32(7+i))
	label := fmt.Sprintf("Network adapter %d", i+1)
	card.DeviceInfo = &types.Description{Label: label, Summary: defaultNetwork}
	var err error
	if card.Backing, err = m.networkBacking(spec.Network); err != nil {
		return nil, err
	}
	card.Connectable = &types.VirtualDeviceConnectInfo{
		StartConnected: !spec.Disconnected, AllowGuestControl: true, Connected: !spec.Disconnected,
	}
	switch spec.Model {
	case "e1000":
		return &types.VirtualE1000{VirtualEthernetCard: card}, nil
	case "e1000e":
		return &types.VirtualE1000e{VirtualEthernetCard: card}, nil
	case "pcnet":
		return &types.VirtualPCNet32{VirtualEthernetCard: card}, nil
	case "sriov":
		return &types.VirtualSriovEthernetCard{VirtualEthernetCard: card}, nil
	case "vmxnet2":
		return &types.VirtualVmxnet2{VirtualVmxnet: types.VirtualVmxnet{VirtualEthernetCard: card}}, nil
	}
	return &types.VirtualVmxnet3{VirtualVmxnet: types.VirtualVmxnet{VirtualEthernetCard: card}}, nil
}

// setHardware says what CreateVM_Task leaves out or refuses; the VM's lock is held.
func (m *machine) setHardware() error {
	hardware := &m.Config.Hardware
	if m.spec.CoresPerSocket > 0 {
		hardware.NumCoresPerSocket = &m.spec.CoresPerSocket
	}
	secure := m.spec.SecureBoot
	options := &types.VirtualMachineBootOptions{EfiSecureBootEnabled: &secure}
	for _, key := range m.spec.Boot {
		if key >= 4000 && key < 5000 {
			options.BootOrder = append(options.BootOrder, &types.VirtualMachineBootOptionsBootableEthernetDevice{DeviceKey: key})
		} else {
			options.BootOrder = append(options.BootOrder, &types.VirtualMachineBootOptionsBootableDiskDevice{DeviceKey: key})
		}
	}
	m.Config.BootOptions = options
	for _, device := range hardware.Device {
		m.putOnItsNetwork(device)
	}
	for i, kind := range m.spec.Devices {
		device, err := newDevice(kind, int32(i))
		if err != nil {
			return err
		}
		hardware.Device = append(hardware.Device, device)
	}
	return nil
}

// putOnItsNetwork names a card's standard network, of which the simulator would have one object for each.
func (m *machine) putOnItsNetwork(device types.BaseVirtualDevice) {
	nic, ok := device.(types.BaseVirtualEthernetCard)
	if !ok {
		return
	}
	card := nic.GetVirtualEthernetCard()
	if backing, ok := card.Backing.(*types.VirtualEthernetCardNetworkBackingInfo); ok {
		backing.DeviceName = m.spec.NICs[card.Key-4000].Network
		card.DeviceInfo = &types.Description{Label: card.DeviceInfo.GetDescription().Label, Summary: backing.DeviceName}
	}
}

// newDevice is the i-th of the devices that a scenario adds to a VM.
func newDevice(kind string, i int32) (types.BaseVirtualDevice, error) {
	base := func(label string, key, controller int32) types.VirtualDevice {
		return types.VirtualDevice{
			Key: key + i, ControllerKey: controller, UnitNumber: types.NewInt32(i % 2),
			DeviceInfo: &types.Description{Label: label, Summary: label},
		}
	}
	switch kind {
	case "cdrom":
		iso := &types.VirtualCdromIsoBackingInfo{}
		iso.FileName = "[datastore1] iso/install.iso"
		d := base("CD/DVD drive 1", 3002, 201)
		d.Backing = iso
		return &types.VirtualCdrom{VirtualDevice: d}, nil
	case "floppy":
		return &types.VirtualFloppy{VirtualDevice: base("Floppy drive 1", 8000, 400)}, nil
	case "passthrough":
		backing := &types.VirtualPCIPassthroughDeviceBackingInfo{Id: "0000:3b:00.0", DeviceId: "1db6"}
		backing.DeviceName = "Tesla V100"
		d := base("PCI device 0", 13000, 100)
		d.Backing = backing
		return &types.VirtualPCIPassthrough{VirtualDevice: d}, nil
	case "serial":
		backing := &types.VirtualSerialPortURIBackingInfo{}
		backing.ServiceURI, backing.Direction = "telnet://:7001", "server"
		d := base(fmt.Sprintf("Serial port %d", i+1), 9000, 400)
		d.Backing = backing
		return &types.VirtualSerialPort{VirtualDevice: d, YieldOnPoll: true}, nil
	case "sound":
		return &types.VirtualHdAudioCard{VirtualSoundCard: types.VirtualSoundCard{VirtualDevice: base("Sound card", 5000, 100)}}, nil
	case "tpm":
		return &types.VirtualTPM{VirtualDevice: base("Virtual TPM", 11000, 100)}, nil
	case "usb":
		d := types.VirtualController{VirtualDevice: base("USB xHCI controller", 14000, 100)}
		return &types.VirtualUSBXHCIController{VirtualController: d}, nil
	case "usb-device":
		d := base("USB 1", 20000, 14000)
		d.Backing = &types.VirtualUSBUSBBackingInfo{
			VirtualDeviceDeviceBackingInfo: types.VirtualDeviceDeviceBackingInfo{DeviceName: "path:1/0/1"},
		}
		return &types.VirtualUSB{VirtualDevice: d, Connected: true}, nil
	}
	return nil, fmt.Errorf("no device %q", kind)
}
