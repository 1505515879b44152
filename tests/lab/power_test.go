package main

import (
	"context"
	"testing"
	"time"

	"github.com/vmware/govmomi/event"
	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

func (c *client) power() (types.VirtualMachinePowerState, string) {
	c.t.Helper()
	var vm mo.VirtualMachine
	properties := []string{"runtime.powerState", "guest.toolsRunningStatus"}
	if err := c.vc.RetrieveOne(context.Background(), c.vm.Reference(), properties, &vm); err != nil {
		c.t.Fatal(err)
	}
	return vm.Runtime.PowerState, vm.Guest.ToolsRunningStatus
}

func (c *client) digest() string {
	c.t.Helper()
	sum, err := c.lab.order[0].disks[0].sha256("")
	if err != nil {
		c.t.Fatal(err)
	}
	return sum
}

func TestAGuestShutsDownInItsOwnTimeAndWritesUntilThen(t *testing.T) {
	c := startLab(t, "-disks", "1")
	m := c.lab.order[0]
	m.spec.ShutdownS = 0.4
	c.admin("/guest-load", `{"vm": "`+c.vm.Reference().Value+`", "disk": 0, "bytes_per_s": 4194304, "burst_s": 0.1}`)
	if err := c.vm.ShutdownGuest(context.Background()); err != nil {
		t.Fatal(err)
	}
	if state, tools := c.power(); state != "poweredOn" || tools != "guestToolsRunning" {
		t.Fatalf("%s, %s at once", state, tools)
	}
	before := c.digest()
	c.eventually(func() bool {
		state, tools := c.power()
		return state == "poweredOff" && tools == "guestToolsNotRunning"
	})
	after := c.digest()
	if before == after {
		t.Fatal("it did not write while it shut down")
	}
	time.Sleep(2 * loadTick)
	if c.digest() != after {
		t.Fatal("it writes while it is off")
	}
	if err := c.vm.ShutdownGuest(context.Background()); !fault.Is(err, &types.InvalidPowerState{}) {
		t.Fatalf("%v of one that is off", err)
	}
	c.wantEvents("VmGuestShutdownEvent", "VmPoweredOffEvent")
}

func (c *client) eventually(holds func() bool) {
	c.t.Helper()
	for end := time.Now().Add(10 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			c.t.Fatal("it never came to that")
		}
	}
}

func (c *client) wantEvents(kinds ...string) {
	c.t.Helper()
	filter := types.EventFilterSpec{
		Entity:      &types.EventFilterSpecByEntity{Entity: c.vm.Reference(), Recursion: "self"},
		EventTypeId: kinds,
	}
	events, err := event.NewManager(c.vc.Client).QueryEvents(context.Background(), filter)
	if err != nil || len(events) != len(kinds) {
		c.t.Fatalf("%d events, %v", len(events), err)
	}
}

func TestWithoutToolsThatRunNobodyShutsAGuestDown(t *testing.T) {
	c := startLab(t, "-disks", "1")
	c.lab.order[0].Guest.ToolsRunningStatus = "guestToolsNotRunning"
	if err := c.vm.ShutdownGuest(context.Background()); !fault.Is(err, &types.ToolsUnavailable{}) {
		t.Fatal(err)
	}
}

func TestADeafGuestStaysOn(t *testing.T) {
	c := startLab(t, "-disks", "1")
	c.lab.order[0].spec.IgnoresShutdown = true
	if err := c.vm.ShutdownGuest(context.Background()); err != nil {
		t.Fatal(err)
	}
	if state, _ := c.power(); state != "poweredOn" {
		t.Fatal(state)
	}
}
