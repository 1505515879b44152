package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmware/govmomi/nfc"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// leased asks for a lease on the VM and waits until it is ready.
func (c *client) leased() (*nfc.Lease, *nfc.LeaseInfo) {
	c.t.Helper()
	lease, err := c.vm.Export(context.Background())
	if err != nil {
		c.t.Fatal(err)
	}
	info, err := lease.Wait(context.Background(), nil)
	if err != nil {
		c.t.Fatal(err)
	}
	return lease, info
}

func (c *client) powerOff() {
	c.t.Helper()
	task, err := c.vm.PowerOff(context.Background())
	if err == nil {
		err = task.Wait(context.Background())
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

func wantFault[F any](t *testing.T, err error) {
	t.Helper()
	if err == nil || !soap.IsSoapFault(err) {
		t.Fatalf("%v, and a fault was wanted", err)
	}
	if fault, ok := soap.ToSoapFault(err).VimFault().(F); !ok {
		t.Errorf("fault %T, want %T", soap.ToSoapFault(err).VimFault(), fault)
	}
}

func TestLeaseNeedsTheVMToBeOffAndKeepsItSo(t *testing.T) {
	c := startLab(t, "-disk-size", "1MiB")
	ctx, vm := context.Background(), c.vm
	_, err := vm.Export(ctx)
	wantFault[types.InvalidPowerState](t, err)
	c.powerOff()
	lease, _ := c.leased()
	_, err = vm.PowerOn(ctx)
	wantFault[types.TaskInProgress](t, err)
	if err = lease.Complete(ctx); err != nil {
		t.Fatal(err)
	}
	wantFault[types.InvalidState](t, lease.Progress(ctx, 1))
	if _, err = vm.PowerOn(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestLeaseThatNobodyRenewsIsInError(t *testing.T) {
	c := startLab(t, "-disk-size", "1MiB")
	c.lab.scenario.Lease.TimeoutS = 0.3
	c.powerOff()
	lease, info := c.leased()
	for range 10 { // longer than its time
		time.Sleep(50 * time.Millisecond)
		if err := lease.Progress(context.Background(), 1); err != nil {
			t.Fatal(err)
		}
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		found, err := lease.Properties(context.Background(), "state", "error")
		if err != nil || time.Now().After(deadline) {
			t.Fatal(err, found.State)
		}
		if found.State == types.HttpNfcLeaseStateError {
			if _, ok := found.Error.Fault.(*types.Timedout); !ok {
				t.Errorf("%T", found.Error.Fault)
			}
			break
		}
	}
	wantFault[types.Timedout](t, lease.Progress(context.Background(), 1))
	target := filepath.Join(t.TempDir(), "x.vmdk")
	if err := lease.DownloadFile(context.Background(), target, info.Items[0], soap.Download{}); err == nil {
		t.Error("its URL is good still")
	}
}

// qemuCompares holds an image to a disk of the datastore.
func (c *client) qemuCompares(image string, d *disk) {
	c.t.Helper()
	chain := d.path(d.top().descriptor)
	if out, err := exec.Command("qemu-img", "compare", "-U", image, chain).CombinedOutput(); err != nil {
		c.t.Errorf("%v: %s", err, out)
	}
}

func TestStreamsOfBothFormsAreReadByQemu(t *testing.T) {
	c := startLab(t, "-disk-size", "70MiB", "-disks", "2")
	c.powerOff()
	for _, form := range []string{"host", "qemu"} {
		c.lab.scenario.Lease.Form = form
		lease, info := c.leased()
		updater := lease.StartUpdater(context.Background(), info)
		for i, item := range info.Items {
			target := filepath.Join(t.TempDir(), "x.vmdk")
			if err := lease.DownloadFile(context.Background(), target, item, soap.Download{}); err != nil {
				t.Fatal(err)
			}
			c.qemuCompares(target, c.lab.order[0].disks[i])
			head, err := os.ReadFile(target)
			if atEnd := err == nil && string(head[56:64]) == strings.Repeat("\xff", 8); atEnd != (form == "host") {
				t.Errorf("%s: %v, its directory at the end: %v", form, err, atEnd)
			}
		}
		updater.Done()
		if err := lease.Abort(context.Background(), nil); err != nil {
			t.Fatal(err)
		}
	}
}
