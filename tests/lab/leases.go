// NFC leases: ExportVm of a VM that is off, ExportSnapshot of one that need not be, and what keeps a lease alive.
//
// While a lease is held, what would change its VM's disks is refused; its URLs (nfc.go) are good for as long.
package main

import (
	"fmt"
	"os"
	"path"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

const (
	leaseTimeout    = 300 // seconds, unless the scenario says otherwise
	leasePreparesIn = 20 * time.Millisecond
)

// leaseSpec is how leases of a scenario are.
type leaseSpec struct {
	TimeoutS float64 `json:"timeout_s"`
	Star     bool    `json:"star"` // URLs have "*" as their host, as a host's own have
	Form     string  `json:"form"` // "host" or "qemu": see streamvmdk.go
}

func (s leaseSpec) timeout() time.Duration {
	if s.TimeoutS <= 0 {
		return leaseTimeout * time.Second
	}
	return time.Duration(s.TimeoutS * float64(time.Second))
}

// lease wraps the API's object: one export, of the disks as of a snapshot, or of a VM that is off.
type lease struct {
	mo.HttpNfcLease
	m        *machine
	ctx      *simulator.Context
	snapshot string // moref; "" for none
	ticket   string // what its URLs hold
	disks    []*leasedDisk
	alive    *time.Timer
	ended    chan struct{}
	once     sync.Once
}

// leasedDisk is one disk of a lease, encoded when it is first asked for.
type leasedDisk struct {
	disk   *disk
	source string // file name of the descriptor that is read
	name   string // in its URL
	once   sync.Once
	file   string
	err    error
}

func (m *machine) ExportVm(ctx *simulator.Context, _ *types.ExportVm) soap.HasFault {
	body := new(methods.ExportVmBody)
	if m.on.Load() {
		body.Fault_ = simulator.Fault("", &types.InvalidPowerState{
			RequestedState: types.VirtualMachinePowerStatePoweredOff,
			ExistingState:  types.VirtualMachinePowerStatePoweredOn,
		})
		return body
	}
	body.Res = &types.ExportVmResponse{Returnval: m.newLease(ctx, "").Self}
	return body
}

func (s *snapshot) ExportSnapshot(ctx *simulator.Context, _ *types.ExportSnapshot) soap.HasFault {
	return &methods.ExportSnapshotBody{
		Res: &types.ExportSnapshotResponse{Returnval: s.m.newLease(ctx, s.Self.Value).Self},
	}
}

// newLease makes a lease that is ready in a moment.
func (m *machine) newLease(ctx *simulator.Context, snapshot string) *lease {
	own := *ctx
	l := &lease{m: m, ctx: &own, snapshot: snapshot, ticket: uuid.NewString(), ended: make(chan struct{})}
	l.State, l.Mode = types.HttpNfcLeaseStateInitializing, string(types.HttpNfcLeaseModePushOrGet)
	l.Self = types.ManagedObjectReference{
		Type: "HttpNfcLease", Value: fmt.Sprintf("session[%s]%s", ctx.Session.Key, uuid.NewString()),
	}
	l.disks = m.leasedDisks(snapshot)
	m.lab.leases.Store(l.ticket, l)
	m.lab.stats.lease(1)
	ctx.Session.Put(l)
	l.alive = time.AfterFunc(m.lab.scenario.Lease.timeout(), func() { l.fail(&types.Timedout{}) })
	time.AfterFunc(leasePreparesIn, l.ready)
	return l
}

// leasedDisks are those whose bytes a lease gives: the snapshot's, or all that hold any.
func (m *machine) leasedDisks(snapshot string) (list []*leasedDisk) {
	for _, d := range m.disks {
		if !d.hasBytes() {
			continue
		}
		at := len(d.layers) - 1
		if snapshot != "" {
			if at = d.momentIndex(snapshot); at < 0 {
				continue
			}
		}
		file := path.Base(d.frozenPath(snapshot, at))
		list = append(list, &leasedDisk{disk: d, source: file, name: fmt.Sprintf("disk-%d.vmdk", len(list))})
	}
	return list
}

func (l *lease) ready() {
	select {
	case <-l.ended:
		return
	default:
	}
	info := &types.HttpNfcLeaseInfo{
		Lease: l.Self, Entity: l.m.Self,
		LeaseTimeout: int32(max(1, l.m.lab.scenario.Lease.timeout().Seconds())),
	}
	for _, d := range l.disks {
		info.TotalDiskCapacityInKB += d.disk.capacity / 1024
		info.DeviceUrl = append(info.DeviceUrl, l.deviceURL(d))
	}
	l.update(l.newContext(), types.PropertyChange{Name: "info", Val: info},
		types.PropertyChange{Name: "initializeProgress", Val: int32(100)},
		types.PropertyChange{Name: "state", Val: types.HttpNfcLeaseStateReady})
}

// leaseControllers are the names that keys of device URLs give controllers.
var leaseControllers = map[string]string{
	"pvscsi": "ParaVirtualSCSIController", "lsilogic": "VirtualLsiLogicController",
	"lsisas1068": "VirtualLsiLogicSASController", "buslogic": "VirtualBusLogicController",
	"ahci": "VirtualAHCIController", "nvme": "VirtualNVMEController", "ide": "VirtualIDEController",
}

func (l *lease) deviceURL(d *leasedDisk) types.HttpNfcLeaseDeviceUrl {
	spec, isDisk := d.disk.spec, true
	host, thumbprint := l.m.lab.whereToDownload()
	return types.HttpNfcLeaseDeviceUrl{
		Key: fmt.Sprintf("/%s/%s%d:%d", l.m.Self.Value, leaseControllers[spec.Controller], spec.Bus, *spec.Unit),
		Url: "https://" + host + nfcPrefix + l.ticket + "/" + d.name, SslThumbprint: thumbprint,
		Disk: &isDisk, TargetId: d.name,
	}
}

// update is for whoever holds ctx: a call on the lease has its lock already.
func (l *lease) update(ctx *simulator.Context, changes ...types.PropertyChange) {
	ctx.WithLock(l, func() { ctx.Update(l, changes) })
}

// newContext is for what the lease does by itself.
func (l *lease) newContext() *simulator.Context {
	ctx := *l.ctx
	return &ctx
}

// end frees the VM; what is being downloaded is cut.
func (l *lease) end(count func(*stats)) {
	l.once.Do(func() {
		l.alive.Stop()
		close(l.ended)
		l.m.lab.leases.Delete(l.ticket)
		l.m.lab.stats.lease(-1)
		count(l.m.lab.stats)
		for _, d := range l.disks {
			d.once.Do(func() { d.err = os.ErrClosed })
			if d.file != "" {
				os.Remove(d.file)
			}
		}
	})
}

// fail puts the lease into its error state.
func (l *lease) fail(fault types.BaseMethodFault) {
	l.end(func(s *stats) { s.leaseEnded("failed") })
	l.update(l.newContext(), types.PropertyChange{Name: "error", Val: &types.LocalizedMethodFault{Fault: fault}},
		types.PropertyChange{Name: "state", Val: types.HttpNfcLeaseStateError})
}

// refused is the fault of a call on a lease that has ended.
func (l *lease) refused() *soap.Fault {
	select {
	case <-l.ended:
	default:
		return nil
	}
	if l.Error != nil {
		return simulator.Fault("", l.Error.Fault)
	}
	return simulator.Fault("", &types.InvalidState{})
}

func (l *lease) HttpNfcLeaseProgress(ctx *simulator.Context, req *types.HttpNfcLeaseProgress) soap.HasFault {
	body := &methods.HttpNfcLeaseProgressBody{Fault_: l.refused()}
	if body.Fault_ == nil {
		l.alive.Reset(l.m.lab.scenario.Lease.timeout())
		l.update(ctx, types.PropertyChange{Name: "transferProgress", Val: req.Percent})
		body.Res = new(types.HttpNfcLeaseProgressResponse)
	}
	return body
}

func (l *lease) HttpNfcLeaseComplete(ctx *simulator.Context, _ *types.HttpNfcLeaseComplete) soap.HasFault {
	body := &methods.HttpNfcLeaseCompleteBody{Fault_: l.refused()}
	if body.Fault_ == nil {
		l.end(func(s *stats) { s.leaseEnded("completed") })
		l.update(ctx, types.PropertyChange{Name: "state", Val: types.HttpNfcLeaseStateDone})
		body.Res = new(types.HttpNfcLeaseCompleteResponse)
	}
	return body
}

func (l *lease) HttpNfcLeaseAbort(ctx *simulator.Context, req *types.HttpNfcLeaseAbort) soap.HasFault {
	body := &methods.HttpNfcLeaseAbortBody{Fault_: l.refused()}
	if body.Fault_ == nil {
		l.end(func(s *stats) { s.leaseEnded("aborted") })
		fault := req.Fault
		if fault == nil {
			fault = &types.LocalizedMethodFault{Fault: &types.RequestCanceled{}}
		}
		l.update(ctx, types.PropertyChange{Name: "error", Val: fault},
			types.PropertyChange{Name: "state", Val: types.HttpNfcLeaseStateError})
		body.Res = new(types.HttpNfcLeaseAbortResponse)
	}
	return body
}

// HttpNfcLeaseGetManifest knows nothing of an export: it is about what was uploaded.
func (l *lease) HttpNfcLeaseGetManifest(*simulator.Context, *types.HttpNfcLeaseGetManifest) soap.HasFault {
	return &methods.HttpNfcLeaseGetManifestBody{Res: new(types.HttpNfcLeaseGetManifestResponse)}
}

// blockedByLease are the calls that a VM's lease stands in the way of.
var blockedByLease = map[string]bool{
	"PowerOnVM_Task": true, "Destroy_Task": true, "RelocateVM_Task": true, "MigrateVM_Task": true,
	"ExportVm": true, "ExportSnapshot": true, "RemoveSnapshot_Task": true, "RemoveAllSnapshots_Task": true,
	"RevertToSnapshot_Task": true, "RevertToCurrentSnapshot_Task": true, "ConsolidateVMDisks_Task": true,
}

// leaseInTheWay is the fault of a call on a VM, or on a snapshot of one, that is leased.
func (l *lab) leaseInTheWay(method *simulator.Method) (fault types.BaseMethodFault) {
	if !blockedByLease[method.Name] {
		return nil
	}
	vm := *l.guarded(method)
	l.leases.Range(func(_, held any) bool {
		if held.(*lease).m.Self == vm {
			fault = &types.TaskInProgress{Task: types.ManagedObjectReference{Type: "Task", Value: "task-0"}}
		}
		return fault == nil
	})
	return fault
}

// failLeases ends every lease in a fault.
func (l *lab) failLeases(fault types.BaseMethodFault) {
	l.leases.Range(func(_, held any) bool {
		held.(*lease).fail(fault)
		return true
	})
}
