package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// client is somebody who talks to a running lab.
type client struct {
	t    *testing.T
	lab  *lab
	http *http.Client
	vc   *govmomi.Client
	vm   *object.VirtualMachine
}

func startLab(t *testing.T, args ...string) *client {
	t.Helper()
	o, err := parseFlags(append([]string{"-disk-size", "2MiB", "-state", t.TempDir()}, args...))
	if err != nil {
		t.Fatal(err)
	}
	l, err := newLab(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.close)
	if err = l.start(); err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(l.certs.caPEM))
	c := &client{t: t, lab: l}
	c.http = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}
	c.login()
	return c
}

func (c *client) login() {
	c.t.Helper()
	u, _ := url.Parse(c.lab.ready().URL)
	u.User = url.UserPassword(c.lab.opts.username, c.lab.opts.password)
	vc, err := govmomi.NewClient(context.Background(), u, true)
	if err != nil {
		c.t.Fatal(err)
	}
	c.vc, c.vm = vc, object.NewVirtualMachine(vc.Client, c.lab.order[0].Self)
}

func (c *client) admin(path, body string) {
	c.t.Helper()
	res, err := http.Post(c.lab.adminURL+path, "application/json", strings.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(res.Body)
		c.t.Fatalf("%s %s: %s %s", path, body, res.Status, b)
	}
}

func (c *client) stats() (s struct {
	Live     int `json:"live_sessions"`
	Attempts int `json:"login_attempts"`
	Open     int `json:"open_snapshots"`
	Served   int `json:"bytes_served"`
}) {
	c.t.Helper()
	res, err := http.Get(c.lab.adminURL + "/stats")
	if err != nil {
		c.t.Fatal(err)
	}
	defer res.Body.Close()
	if err = json.NewDecoder(res.Body).Decode(&s); err != nil {
		c.t.Fatal(err)
	}
	return s
}

// get asks /folder for a file of the VM.
func (c *client) get(file, byteRange string, cookie bool) (int, []byte) {
	c.t.Helper()
	m := c.lab.order[0]
	u := fmt.Sprintf("https://%s/folder/%s/%s?dcPath=%s&dsName=%s", c.lab.server.Listener.Addr(),
		m.dir, file, url.QueryEscape(m.dc.path), m.ds.name)
	req, _ := http.NewRequest(http.MethodGet, u, nil)
	if byteRange != "" {
		req.Header.Set("Range", byteRange)
	}
	if cookie {
		for _, k := range c.vc.Client.Client.Jar.Cookies(c.vc.URL()) {
			req.AddCookie(k)
		}
	}
	res, err := c.http.Do(req)
	if err != nil {
		c.t.Fatal(err)
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body)
	return res.StatusCode, b
}

func (c *client) wantStatus(want int, file, byteRange string, cookie bool) []byte {
	c.t.Helper()
	status, body := c.get(file, byteRange, cookie)
	if status != want {
		c.t.Errorf("%s %s: %d, want %d", file, byteRange, status, want)
	}
	return body
}

func (c *client) snapshot(quiesce bool) (types.ManagedObjectReference, error) {
	task, err := c.vm.CreateSnapshot(context.Background(), "s", "", false, quiesce)
	if err != nil {
		return types.ManagedObjectReference{}, err
	}
	info, err := task.WaitForResult(context.Background())
	if err != nil {
		return types.ManagedObjectReference{}, err
	}
	return info.Result.(types.ManagedObjectReference), nil
}

func (c *client) remove(ref types.ManagedObjectReference) {
	c.t.Helper()
	yes := true
	task, err := c.vm.RemoveSnapshot(context.Background(), ref.Value, false, &yes)
	if err == nil {
		err = task.Wait(context.Background())
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

func TestFolderAsksForASessionAndKeepsLocks(t *testing.T) {
	c := startLab(t)
	c.wantStatus(http.StatusUnauthorized, "demo.vmx", "", false)
	c.wantStatus(http.StatusOK, "demo.vmx", "", true)
	if body := c.wantStatus(http.StatusInternalServerError, "demo-flat.vmdk", "", true); len(body) > 0 {
		t.Errorf("the refusal is not bare: %q", body)
	}
	ref, err := c.snapshot(false)
	if err != nil {
		t.Fatal(err)
	}
	c.wantStatus(http.StatusInternalServerError, "demo-000001-delta.vmdk", "", true)
	whole := c.wantStatus(http.StatusOK, "demo-flat.vmdk", "", true)
	part := c.wantStatus(http.StatusPartialContent, "demo-flat.vmdk", "bytes=512-1535", true)
	if !bytes.Equal(part, whole[512:1536]) {
		t.Error("a range holds other bytes than the whole")
	}
	c.wantStatus(http.StatusRequestedRangeNotSatisfiable, "demo-flat.vmdk", "bytes=99999999-", true)
	if s := c.stats(); s.Open != 1 || s.Served != len(whole)+len(part) {
		t.Errorf("stats: %+v", s)
	}
	c.remove(ref)
	c.admin("/faults", `{"expire_sessions": true}`)
	c.wantStatus(http.StatusUnauthorized, "demo.vmx", "", true)
	if s := c.stats(); s.Open != 0 || s.Live != 0 {
		t.Errorf("stats: %+v", s)
	}
}

func TestBackingsFollowTheSnapshot(t *testing.T) {
	c := startLab(t, "-disks", "2")
	ref, err := c.snapshot(true)
	if err != nil {
		t.Fatal(err)
	}
	var snap mo.VirtualMachineSnapshot
	if err = c.vc.RetrieveOne(context.Background(), ref, []string{"config.hardware.device"}, &snap); err != nil {
		t.Fatal(err)
	}
	live, err := c.vm.Device(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for i, d := range live.SelectByType((*types.VirtualDisk)(nil)) {
		now := d.(*types.VirtualDisk).Backing.(*types.VirtualDiskFlatVer2BackingInfo)
		frozen := object.VirtualDeviceList(snap.Config.Hardware.Device).FindByKey(d.GetVirtualDevice().Key).
			GetVirtualDevice().Backing.(*types.VirtualDiskFlatVer2BackingInfo)
		base := c.lab.order[0].disks[i].base
		if frozen.FileName != "[datastore1] demo/"+base+".vmdk" || frozen.Parent != nil {
			t.Errorf("the snapshot's backing is %s", frozen.FileName)
		}
		if now.FileName != "[datastore1] demo/"+base+"-000001.vmdk" || now.Parent.FileName != frozen.FileName {
			t.Errorf("the live backing is %s", now.FileName)
		}
		if now.Uuid != frozen.Uuid {
			t.Error("the disk's UUID changed")
		}
	}
	c.remove(ref)
	err = c.vc.RetrieveOne(context.Background(), ref, nil, &snap)
	if !fault.Is(err, &types.ManagedObjectNotFound{}) {
		t.Errorf("the snapshot can still be read: %v", err)
	}
}

func TestFaultsReachTheCaller(t *testing.T) {
	c := startLab(t)
	for _, test := range []struct {
		body string
		want types.BaseMethodFault
	}{
		{`{"fail_method": {"method": "CreateSnapshot_Task", "fault": "InsufficientResourcesFault"}}`,
			&types.InsufficientResourcesFault{}},
		{`{"fail_method": {"method": "CreateSnapshot_Task", "fault": "TaskInProgress", "in_task": true}}`,
			&types.TaskInProgress{}},
		{`{"refuse_privilege": "VirtualMachine.State.CreateSnapshot"}`, &types.NoPermission{}},
	} {
		c.admin("/faults", test.body)
		_, err := c.snapshot(false)
		if !fault.Is(err, test.want) {
			t.Errorf("%s: %v", test.body, err)
		}
		c.admin("/faults", `{"clear": true}`)
	}
	ref, err := c.snapshot(false)
	if err != nil {
		t.Fatalf("faults cleared: %v", err)
	}
	c.admin("/faults", `{"folder_503": 1, "cut_after": 1000}`)
	c.wantStatus(http.StatusServiceUnavailable, "demo-flat.vmdk", "", true)
	c.wantStatus(http.StatusPartialContent, "demo-flat.vmdk", "bytes=0-511", true) // too short to be cut
	if _, body := c.get("demo-flat.vmdk", "", true); len(body) != 1000 {
		t.Errorf("cut after %d bytes", len(body))
	}
	if _, body := c.get("demo-flat.vmdk", "", true); len(body) != 2<<20 {
		t.Errorf("then %d bytes", len(body))
	}
	c.remove(ref)
	c.admin("/faults", `{"expire_forever": true}`)
	u := c.vc.URL()
	u.User = url.UserPassword(c.lab.opts.username, c.lab.opts.password)
	if _, err = govmomi.NewClient(context.Background(), u, true); !fault.Is(err, &types.InvalidLogin{}) {
		t.Errorf("login after expire_forever: %v", err)
	}
}

func TestTwoRemovalsOfOneSnapshotAtOnce(t *testing.T) {
	c := startLab(t)
	ref, err := c.snapshot(false)
	if err != nil {
		t.Fatal(err)
	}
	c.admin("/faults", `{"task_takes": {"method": "RemoveSnapshot_Task", "seconds": 0.2, "count": 2}}`)
	var errs []error
	var tasks []*object.Task
	for range 2 {
		task, err := c.vm.RemoveSnapshot(context.Background(), ref.Value, false, nil)
		if err != nil {
			t.Fatal(err)
		}
		tasks = append(tasks, task)
	}
	for _, task := range tasks {
		if err := task.Wait(context.Background()); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) != 1 || !fault.Is(errs[0], &types.ManagedObjectNotFound{}) {
		t.Errorf("the second removal ends in %v", errs)
	}
}

func TestMergeThatFailsLeavesConsolidationNeeded(t *testing.T) {
	c := startLab(t)
	ref, err := c.snapshot(false)
	if err != nil {
		t.Fatal(err)
	}
	vm := c.vm.Reference().Value
	c.admin("/guest-write", fmt.Sprintf(`{"vm": %q, "disk": 0, "offset": 700, "length": 9000, "seed": 1}`, vm))
	d := c.lab.order[0].disks[0]
	before, _ := d.sha256("")
	c.admin("/faults", `{"merge_fails": 1}`)
	c.remove(ref)
	needed := func() bool {
		var o mo.VirtualMachine
		if err := c.vm.Properties(context.Background(), c.vm.Reference(), []string{"runtime"}, &o); err != nil {
			t.Fatal(err)
		}
		return o.Runtime.ConsolidationNeeded
	}
	if !needed() || len(d.layers) != 2 {
		t.Fatal("nothing to consolidate")
	}
	res, err := methods.ConsolidateVMDisks_Task(context.Background(), c.vc.Client,
		&types.ConsolidateVMDisks_Task{This: c.vm.Reference()})
	if err != nil {
		t.Fatal(err)
	}
	if err = object.NewTask(c.vc.Client, res.Returnval).Wait(context.Background()); err != nil {
		t.Fatal(err)
	}
	if after, _ := d.sha256(""); needed() || len(d.layers) != 1 || after != before {
		t.Error("not consolidated, or changed by it")
	}
}

func TestScenarioOptionsChangeWhatIsAnswered(t *testing.T) {
	file := filepath.Join(t.TempDir(), "scenario.json")
	write := func(text string) []string {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return []string{"-scenario", file}
	}
	c := startLab(t, write(`{"locks": "strict"}`)...)
	if _, err := c.snapshot(false); err != nil {
		t.Fatal(err)
	}
	c.wantStatus(http.StatusInternalServerError, "demo-flat.vmdk", "", true)

	c = startLab(t, write(`{"locks": "off", "host_ignores_range": true, "free_licence": true}`)...)
	if body := c.wantStatus(http.StatusOK, "demo-flat.vmdk", "bytes=0-511", true); len(body) != 2<<20 {
		t.Errorf("%d bytes", len(body))
	}
	if _, err := c.snapshot(false); !fault.Is(err, &types.RestrictedVersion{}) {
		t.Errorf("a free licence lets a snapshot be made: %v", err)
	}

	c = startLab(t, write(`{"datacenters": [{"name": "DC", "standalone_hosts": ["h"],
		"vms": [{"name": "a%2fb", "folder": "x%25", "quiesce": "fail"}], "filler": {"count": 1500}}]}`)...)
	if _, err := c.snapshot(true); !fault.Is(err, &types.ApplicationQuiesceFault{}) {
		t.Errorf("quiescing did not fail: %v", err)
	}
	ref, err := object.NewSearchIndex(c.vc.Client).FindByInventoryPath(context.Background(), "/DC/vm/x%25/a%2fb")
	if err != nil || ref == nil || ref.Reference() != c.vm.Reference() {
		t.Errorf("not found by its stored name: %v %v", ref, err)
	}
	if r := c.lab.ready(); r.VMs != nil || c.lab.vmCount() != 1501 {
		t.Errorf("%d VMs listed of %d", len(r.VMs), c.lab.vmCount())
	}
}

func TestLoneHost(t *testing.T) {
	c := startLab(t, "-esx")
	if c.vc.ServiceContent.About.ApiType != "HostAgent" {
		t.Errorf("apiType %s", c.vc.ServiceContent.About.ApiType)
	}
	if _, err := c.snapshot(false); err != nil {
		t.Error(err)
	}
	c.wantStatus(http.StatusOK, "demo-flat.vmdk", "", true)
}

func TestArrayMembersAreTyped(t *testing.T) {
	in := `<val xsi:type="ArrayOfManagedObjectReference">` +
		`<ManagedObjectReference type="Folder">a</ManagedObjectReference>` +
		`</val><val xsi:type="ArrayOfString"><string>x</string></val>` +
		`<val xsi:type="ArrayOfOptionValue"><OptionValue xsi:type="OptionValue"><key>k</key></OptionValue></val>` +
		`<propSet><name>gone</name></propSet>`
	want := `<val xsi:type="ArrayOfManagedObjectReference">` +
		`<ManagedObjectReference xsi:type="ManagedObjectReference" type="Folder">a</ManagedObjectReference>` +
		`</val><val xsi:type="ArrayOfString"><string xsi:type="xsd:string">x</string></val>` +
		`<val xsi:type="ArrayOfOptionValue"><OptionValue xsi:type="OptionValue"><key>k</key></OptionValue></val>`
	if got := string(typeArrayMembers([]byte(in))); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestSizesAndNames(t *testing.T) {
	for text, want := range map[string]byteSize{"64MiB": 64 << 20, "512": 512, "1.5G": 3 << 29, "3TiB": 3 << 40} {
		if got, err := parseSize(text); err != nil || got != want {
			t.Errorf("%s: %d, %v", text, got, err)
		}
	}
	if _, err := parseSize("many"); err == nil {
		t.Error("a size of nonsense is taken")
	}
	if got := decodeName("a%2fb%5c%25"); got != `a/b\%` {
		t.Error(got)
	}
	if got := fileName("a\"b[1]/c"); got != "a_b_1__c" {
		t.Error(got)
	}
	if _, err := parseFlags([]string{"-username", "a@b"}); err == nil {
		t.Error("a user name with @ is taken")
	}
}
