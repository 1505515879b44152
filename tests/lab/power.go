// How a guest goes down and comes up: slowly, by VMware Tools where they run, and into vCenter's event history.
package main

import (
	"math/rand/v2"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// ShutdownGuest asks the guest, which takes its time, and writes until it is off.
func (m *machine) ShutdownGuest(ctx *simulator.Context, req *types.ShutdownGuest) soap.HasFault {
	body := new(methods.ShutdownGuestBody)
	if !m.on.Load() {
		body.Fault_ = simulator.Fault("", &types.InvalidPowerState{
			RequestedState: types.VirtualMachinePowerStatePoweredOn,
			ExistingState:  m.Runtime.PowerState,
		})
		return body
	}
	if m.Guest.ToolsRunningStatus != string(types.VirtualMachineToolsRunningStatusGuestToolsRunning) {
		body.Fault_ = simulator.Fault("", new(types.ToolsUnavailable))
		return body
	}
	ctx.Map.EventManager().PostEvent(ctx, &types.PostEvent{EventToPost: &types.VmGuestShutdownEvent{VmEvent: m.event()}})
	if !m.spec.IgnoresShutdown {
		go m.goDown()
	}
	body.Res = new(types.ShutdownGuestResponse)
	return body
}

// goDown powers the VM off after as long as its guest takes, unless somebody was quicker.
func (m *machine) goDown() {
	length := m.spec.ShutdownS + m.spec.ShutdownSpreadS*(2*rand.Float64()-1)
	m.lab.sleep(time.Duration(length * float64(time.Second)))
	if m.on.Load() {
		m.VirtualMachine.PowerOffVMTask(m.lab.newContext(), &types.PowerOffVM_Task{This: m.Self})
	}
}

func (m *machine) event() types.VmEvent {
	arg := &types.VmEventArgument{EntityEventArgument: types.EntityEventArgument{Name: m.Name}, Vm: m.Self}
	return types.VmEvent{Event: types.Event{Vm: arg}}
}

// powered keeps what follows from a power state: Tools run where the guest does.
func (m *machine) powered(vm *mo.VirtualMachine, state types.VirtualMachinePowerState) {
	m.on.Store(state == types.VirtualMachinePowerStatePoweredOn)
	if vm.Guest == nil || !*m.spec.Tools {
		return
	}
	running := types.VirtualMachineToolsRunningStatusGuestToolsNotRunning
	status := types.VirtualMachineToolsStatusToolsNotRunning
	if m.on.Load() && !m.spec.ToolsStopped {
		running = types.VirtualMachineToolsRunningStatusGuestToolsRunning
		status = types.VirtualMachineToolsStatusToolsOk
	}
	vm.Guest.ToolsRunningStatus, vm.Guest.ToolsStatus = string(running), status
}
