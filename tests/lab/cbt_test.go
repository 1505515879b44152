package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

const diskKey = 2000

// changeIDs are of the first disk: live, and as a snapshot's config has it.
func (c *client) changeID(snapshot *types.ManagedObjectReference) string {
	c.t.Helper()
	ref, property := c.vm.Reference(), "config.hardware.device"
	if snapshot != nil {
		ref = *snapshot
	}
	var devices []types.BaseVirtualDevice
	if snapshot == nil {
		var vm mo.VirtualMachine
		if err := c.vc.RetrieveOne(context.Background(), ref, []string{property}, &vm); err != nil {
			c.t.Fatal(err)
		}
		devices = vm.Config.Hardware.Device
	} else {
		var s mo.VirtualMachineSnapshot
		if err := c.vc.RetrieveOne(context.Background(), ref, []string{property}, &s); err != nil {
			c.t.Fatal(err)
		}
		devices = s.Config.Hardware.Device
	}
	for _, each := range devices {
		if d, ok := each.(*types.VirtualDisk); ok {
			return d.Backing.(*types.VirtualDiskFlatVer2BackingInfo).ChangeId
		}
	}
	return ""
}

func (c *client) track(on bool) {
	c.t.Helper()
	task, err := c.vm.Reconfigure(context.Background(), types.VirtualMachineConfigSpec{ChangeTrackingEnabled: &on})
	if err == nil {
		err = task.Wait(context.Background())
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) point(name string) types.ManagedObjectReference { return c.take(name, false) }

func (c *client) take(name string, quiesce bool) types.ManagedObjectReference {
	c.t.Helper()
	task, err := c.vm.CreateSnapshot(context.Background(), name, "", false, quiesce)
	if err != nil {
		c.t.Fatal(err)
	}
	info, err := task.WaitForResult(context.Background(), nil)
	if err != nil {
		c.t.Fatal(err)
	}
	return info.Result.(types.ManagedObjectReference)
}

func (c *client) drop(name string) {
	c.t.Helper()
	task, err := c.vm.RemoveSnapshot(context.Background(), name, false, types.NewBool(true))
	if err == nil {
		err = task.Wait(context.Background())
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// changed asks page by page; it also returns how many pages there were.
func (c *client) changed(snapshot *types.ManagedObjectReference, id string) ([]types.DiskChangeExtent, int, error) {
	var all []types.DiskChangeExtent
	capacity, pages := int64(2<<20), 0
	for at := int64(0); at < capacity; pages++ {
		res, err := methods.QueryChangedDiskAreas(context.Background(), c.vc, &types.QueryChangedDiskAreas{
			This: c.vm.Reference(), Snapshot: snapshot, DeviceKey: diskKey, StartOffset: at, ChangeId: id,
		})
		if err != nil {
			return nil, pages, err
		}
		all = append(all, res.Returnval.ChangedArea...)
		at = res.Returnval.StartOffset + res.Returnval.Length
	}
	return all, pages, nil
}

func (c *client) write(off, n int64) {
	c.t.Helper()
	c.admin("/guest-write", fmt.Sprintf(`{"vm": %q, "disk": 0, "offset": %d, "length": %d, "seed": %d}`,
		c.vm.Reference().Value, off, n, rand.Uint32()))
}

func wantAreas(t *testing.T, got []types.DiskChangeExtent, want ...int64) {
	t.Helper()
	var flat []int64
	for _, area := range got {
		flat = append(flat, area.Start, area.Length)
	}
	if !slices.Equal(flat, want) {
		t.Fatalf("areas %v, want %v", flat, want)
	}
}

func TestTrackingBeginsAtTheSnapshotAfterItIsSwitchedOn(t *testing.T) {
	c := startLab(t, "-disks", "1")
	first := c.point("before")
	if id := c.changeID(&first) + c.changeID(nil); id != "" {
		t.Fatalf("a changeId %q without tracking", id)
	}
	c.drop("before")
	c.track(true)
	if id := c.changeID(nil); id != "" {
		t.Fatalf("a changeId %q before a stun", id)
	}
	one := c.point("one")
	id := c.changeID(&one)
	if !strings.HasPrefix(id, "52 ") || !strings.HasSuffix(id, "/1") || c.changeID(nil) != id {
		t.Fatalf("changeId %q of the snapshot, %q of the VM", id, c.changeID(nil))
	}
	c.track(false)
	if id := c.changeID(nil); id != "" {
		t.Fatalf("a changeId %q after tracking was switched off", id)
	}
}

func TestARevertGoesBackToTheSnapshotsContentAndPoint(t *testing.T) {
	c := startLab(t, "-disks", "1")
	c.track(true)
	one := c.point("one")
	from := c.changeID(&one)
	c.drop("one")
	c.write(100, 10)
	kept := c.point("kept")
	content := func() string {
		sum, err := c.lab.machines[c.vm.Reference()].disks[0].sha256("")
		if err != nil {
			t.Fatal(err)
		}
		return sum
	}
	then := content()
	c.write(cbtBlock*9, 1)
	task, err := c.vm.RevertToSnapshot(context.Background(), "kept", true)
	if err == nil {
		err = task.Wait(context.Background())
	}
	if err != nil || content() != then || c.changeID(nil) != c.changeID(&kept) {
		t.Fatal(err, c.changeID(nil))
	}
	c.write(cbtBlock*3, 1)
	c.drop("kept")
	two := c.point("two")
	areas, _, err := c.changed(&two, from)
	if err != nil {
		t.Fatal(err)
	}
	wantAreas(t, areas, 0, cbtBlock, cbtBlock*3, cbtBlock)
}

func TestChangedAreasAreWhatTheGuestWroteBetweenTwoSnapshots(t *testing.T) {
	c := startLab(t, "-disks", "1")
	c.track(true)
	one := c.point("one")
	from := c.changeID(&one)
	c.write(100, 10)
	c.write(cbtBlock*3-1, 2)
	c.drop("one")
	c.write(2<<20-512, 512)
	two := c.point("two")
	c.write(cbtBlock*9, 1) // after it: not of it
	areas, pages, err := c.changed(&two, from)
	if err != nil || pages != 1 {
		t.Fatal(pages, err)
	}
	wantAreas(t, areas, 0, cbtBlock, cbtBlock*2, cbtBlock*2, 2<<20-cbtBlock, cbtBlock)
	c.admin("/faults", `{"cbt": {"page": 1}}`)
	paged, pages, err := c.changed(&two, from)
	if err != nil || pages != 3 || !slices.Equal(paged, areas) {
		t.Fatal(paged, pages, err)
	}
	if none, _, err := c.changed(&two, c.changeID(&two)); err != nil || len(none) > 0 {
		t.Fatal(none, err)
	}
	three := c.point("three")
	res, err := c.vm.QueryChangedDiskAreas(context.Background(), &two, &three, c.disk(), 0) // govmomi finds the changeId
	if err != nil {
		t.Fatal(err)
	}
	wantAreas(t, res.ChangedArea, cbtBlock*9, cbtBlock)
}

// disk is the first one, as govmomi wants it.
func (c *client) disk() *types.VirtualDisk {
	devices, err := c.vm.Device(context.Background())
	if err != nil {
		c.t.Fatal(err)
	}
	return devices.FindByKey(diskKey).(*types.VirtualDisk)
}

func TestWhatNobodyKnowsIsAFault(t *testing.T) {
	c := startLab(t, "-disks", "1")
	c.track(true)
	one := c.point("one")
	id := c.changeID(&one)
	ask := func(snapshot *types.ManagedObjectReference, id string) error {
		_, _, err := c.changed(snapshot, id)
		return err
	}
	file, argument := &types.FileFault{}, &types.InvalidArgument{}
	if err := ask(&one, strings.TrimSuffix(id, "1")+"9"); !fault.Is(err, file) {
		t.Fatal(err)
	}
	if err := ask(&one, "52 00/1"); !fault.Is(err, file) {
		t.Fatal(err)
	}
	if err := ask(&one, "nonsense"); !fault.Is(err, argument) {
		t.Fatal(err)
	}
	if err := ask(nil, id); !fault.Is(err, argument) { // the VM runs
		t.Fatal(err)
	}
	c.admin("/faults", `{"reset_cbt": true}`)
	if now := c.changeID(nil); now[:47] == id[:47] {
		t.Fatalf("%q after the reset, %q before", now, id)
	}
	two := c.point("two")
	if err := ask(&two, id); !fault.Is(err, file) {
		t.Fatal(err)
	}
}

func TestAnswersToAStarAndSpoiledOnes(t *testing.T) {
	c := startLab(t, "-disks", "1")
	c.track(true)
	one := c.point("one")
	allocated, _, err := c.changed(&one, "*")
	if err != nil || len(allocated) == 0 || (len(allocated) == 1 && allocated[0].Length == 2<<20) {
		t.Fatal(allocated, err)
	}
	c.admin("/faults", `{"cbt": {"star": "whole"}}`)
	whole, _, err := c.changed(&one, "*")
	if err != nil {
		t.Fatal(err)
	}
	wantAreas(t, whole, 0, 2<<20)
	c.admin("/faults", `{"cbt": {"star": "fail"}}`)
	if _, _, err = c.changed(&one, "*"); !fault.Is(err, &types.FileFault{}) {
		t.Fatal(err)
	}
	c.write(1<<20, 1)
	two := c.point("two")
	c.admin("/faults", `{"cbt": {"too_large": true}}`)
	wide, _, err := c.changed(&two, c.changeID(&one))
	if err != nil {
		t.Fatal(err)
	}
	wantAreas(t, wide, 0, 2<<20)
	c.admin("/faults", `{"cbt": {"wrong": "beyond"}}`)
	beyond, _, err := c.changed(&two, c.changeID(&one))
	if err != nil {
		t.Fatal(err)
	}
	wantAreas(t, beyond, 1<<20, cbtBlock, 2<<20-cbtBlock, 2*cbtBlock)
	c.admin("/faults", `{"cbt": {"wrong": "overlapping"}}`)
	twice, _, err := c.changed(&two, c.changeID(&one))
	if err != nil {
		t.Fatal(err)
	}
	wantAreas(t, twice, 1<<20, cbtBlock, 1<<20, cbtBlock)
}

func TestAQuiescedWindowsGuestsOwnWritesAreChangesBeforeAndAfter(t *testing.T) {
	file := filepath.Join(t.TempDir(), "scenario.json")
	scenario := `{"datacenters": [{"name": "DC", "standalone_hosts": ["h"],
		"vms": [{"name": "w", "vss": true, "cbt": true, "disks": [{"size": "2MiB"}]}]}]}`
	if err := os.WriteFile(file, []byte(scenario), 0o600); err != nil {
		t.Fatal(err)
	}
	c := startLab(t, "-scenario", file)
	start := c.changeID(nil)
	quiesced := c.take("q", true)
	before, _, err := c.changed(&quiesced, start)
	if err != nil || len(before) == 0 {
		t.Fatal(before, err)
	}
	id := c.changeID(&quiesced)
	c.drop("q")
	next := c.point("next")
	after, _, err := c.changed(&next, id)
	if err != nil || !slices.Equal(after, before) {
		t.Fatal(after, before, err)
	}
}
