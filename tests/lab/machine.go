// A VM of the lab: the simulator's own object, its disks, and the files that go with it.
package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path"
	"strings"
	"sync/atomic"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// machine wraps the simulator's VM to override methods (snapshots.go). It never replaces it in the registry.
type machine struct {
	*simulator.VirtualMachine
	lab   *lab
	dc    *datacenter
	ds    *datastore
	spec  vmSpec
	path  string // inventory path
	dir   string // folder on the datastore
	disks []*disk
	on    atomic.Bool
	cbt   atomic.Bool // changeTrackingEnabled

	fileKeys  map[string]int32                        // layoutEx key by datastore path
	dataFiles map[types.ManagedObjectReference]string // snapshot → datastore path of its .vmsn
}

func (l *lab) buildVM(dc *datacenter, spec vmSpec) error {
	host, ds := dc.hosts[spec.Host], dc.datastores[spec.Datastore]
	if host == nil || ds == nil {
		return fmt.Errorf("no host %q or no datastore %q here", spec.Host, spec.Datastore)
	}
	m := &machine{
		lab: l, dc: dc, ds: ds, spec: spec,
		fileKeys: map[string]int32{}, dataFiles: map[types.ManagedObjectReference]string{},
	}
	m.cbt.Store(spec.CBT)
	m.dir = m.dirOn(ds)
	m.path = "/" + joinPath(dc.path, "vm", spec.Folder, spec.Name)
	if err := os.MkdirAll(path.Join(ds.dir, m.dir), 0o755); err != nil {
		return err
	}
	if err := m.makeDisks(); err != nil {
		return err
	}
	if err := m.create(host); err != nil {
		return err
	}
	l.machines[m.Self] = m
	l.order = append(l.order, m)
	return m.finish()
}

// dirOn is a new folder for the VM on ds.
func (m *machine) dirOn(ds *datastore) string {
	return m.dc.claimDir(ds.name, homeDir(m.dc.typeOf(ds.name), m.spec.Dir))
}

func (dc *datacenter) typeOf(name string) string {
	for _, spec := range dc.spec.Datastores {
		if spec.Name == name {
			return spec.Type
		}
	}
	return ""
}

// claimDir is dir, or dir_1, dir_2… where a VM is there already.
func (dc *datacenter) claimDir(ds, dir string) string {
	name := dir
	for i := 1; dc.dirs[ds+"/"+name]; i++ {
		name = fmt.Sprintf("%s_%d", dir, i)
	}
	dc.dirs[ds+"/"+name] = true
	return name
}

// create makes the VM with CreateVM_Task, on files that exist.
func (m *machine) create(host *hostEntry) error {
	ctx := context.Background()
	folder, err := subFolder(m.dc.folders.VmFolder, m.spec.Folder)
	if err != nil {
		return err
	}
	spec, err := m.configSpec()
	if err != nil {
		return err
	}
	task, err := folder.CreateVM(ctx, spec, host.pool, m.lab.hostObject(host))
	if err != nil {
		return err
	}
	info, err := task.WaitForResult(ctx, nil)
	if err != nil {
		return err
	}
	m.VirtualMachine = m.lab.ctx.Map.Get(info.Result.(types.ManagedObjectReference)).(*simulator.VirtualMachine)
	return nil
}

func (m *machine) configSpec() (types.VirtualMachineConfigSpec, error) {
	devices, err := m.devices()
	spec := types.VirtualMachineConfigSpec{
		Name:         m.createName(),
		GuestId:      m.spec.GuestID,
		NumCPUs:      m.spec.CPUs,
		MemoryMB:     m.spec.MemoryMiB,
		Firmware:     m.spec.Firmware,
		Version:      "vmx-19",
		Uuid:         orUUID(m.spec.BIOSUUID, 0x42),
		InstanceUuid: orUUID(m.spec.InstanceUUID, 0x50),
		Files:        &types.VirtualMachineFileInfo{VmPathName: m.vmxPath()},

		ChangeTrackingEnabled: &m.spec.CBT,
	}
	for _, d := range devices {
		spec.DeviceChange = append(spec.DeviceChange, &types.VirtualDeviceConfigSpec{
			Operation: types.VirtualDeviceConfigSpecOperationAdd, Device: d,
		})
	}
	return spec, err
}

// createName is the name the VM is made with; finish sets the real one, which CreateVM would encode once more.
func (m *machine) createName() string { return strings.ReplaceAll(fileName(m.spec.Name), "%", "_") }

func (m *machine) vmxPath() string {
	return fmt.Sprintf("[%s] %s", m.ds.name, path.Join(m.dir, fileName(m.spec.Name)+".vmx"))
}

// orUUID is given, or a new UUID with vCenter's usual first byte (42 for BIOS, 50 for instance UUIDs).
func orUUID(given string, first byte) string {
	if given != "" {
		return given
	}
	return newUUID(first)
}

func newUUID(first ...byte) string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	copy(b[:], first)
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

// finish sets what CreateVM leaves out, powers the VM on and writes its files.
func (m *machine) finish() error {
	ctx, vm := m.lab.ctx, m.VirtualMachine
	ctx.Map.AtomicUpdate(ctx, vm, []types.PropertyChange{
		{Name: "name", Val: m.spec.Name},
		{Name: "config.name", Val: m.spec.Name},
		{Name: "summary.config.name", Val: m.spec.Name},
	})
	var err error
	if ctx.WithLock(vm, func() { m.setStates(); err = m.setHardware() }); err != nil {
		return err
	}
	if m.spec.Power == "on" {
		if err := m.powerOn(); err != nil {
			return err
		}
	}
	ctx.WithLock(vm, m.setGuest)
	if err := m.refresh(ctx); err != nil {
		return err
	}
	return m.playPast()
}

// setStates fills enums that the simulator leaves empty, on which pyvmomi raises AttributeError.
func (m *machine) setStates() {
	for _, r := range []*types.VirtualMachineRuntimeInfo{&m.Runtime, &m.Summary.Runtime} {
		r.FaultToleranceState = types.VirtualMachineFaultToleranceStateNotConfigured
		r.RecordReplayState = types.VirtualMachineRecordReplayStateInactive
		r.Host = m.Runtime.Host
	}
	m.Config.Template, m.Summary.Config.Template = m.spec.Template, m.spec.Template
	if m.spec.FaultTolerance {
		m.Runtime.FaultToleranceState = types.VirtualMachineFaultToleranceStateRunning
		m.Summary.Runtime.FaultToleranceState = m.Runtime.FaultToleranceState
	}
	m.DisabledMethod = append(m.DisabledMethod, m.spec.DisabledMethods...)
	for _, d := range m.disks {
		if d.spec.Encrypted {
			m.Config.KeyId = d.keyID()
		}
	}
	for _, device := range m.Config.Hardware.Device {
		for _, d := range m.disks {
			if device.GetVirtualDevice().Key == d.controllerKey() {
				c := device.(types.BaseVirtualController).GetVirtualController()
				c.Device = append(c.Device, d.key)
			}
		}
	}
}

func (m *machine) powerOn() error {
	ctx := context.Background()
	task, err := m.lab.vmObject(m.Self).PowerOn(ctx)
	if err != nil {
		return err
	}
	return task.Wait(ctx)
}

// setGuest says what VMware Tools would.
func (m *machine) setGuest() {
	if m.spec.Power != "on" || !*m.spec.Tools {
		return
	}
	m.Guest.ToolsVersion = "12389"
	m.powered(&m.VirtualMachine.VirtualMachine, m.Runtime.PowerState)
	m.Guest.GuestState = "running"
	m.Guest.HostName = fileName(m.spec.Name)
	m.Guest.IpAddress = fmt.Sprintf("192.0.2.%d", 10+len(m.lab.order)%200)
	m.Summary.Guest.ToolsStatus = m.Guest.ToolsStatus
	m.Summary.Guest.ToolsRunningStatus = m.Guest.ToolsRunningStatus
	m.Summary.Guest.HostName, m.Summary.Guest.IpAddress = m.Guest.HostName, m.Guest.IpAddress
	for i := range m.Guest.Net {
		m.Guest.Net[i].Connected = true
		m.Guest.Net[i].IpAddress = []string{m.Guest.IpAddress}
	}
}

// refresh writes the .vmx and brings layout and storage figures up to what the files are.
func (m *machine) refresh(ctx *simulator.Context) error {
	var err error
	ctx.WithLock(m.VirtualMachine, func() {
		if err = m.writeVMX(); err == nil {
			err = m.updateLayout(ctx)
		}
	})
	return err
}

// hostName is the name of the host the VM is on.
func (m *machine) hostName() string {
	if host, ok := m.lab.ctx.Map.Get(*m.Runtime.Host).(mo.Entity); ok {
		return host.Entity().Name
	}
	return ""
}
