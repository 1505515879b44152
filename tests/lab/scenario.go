// The scenario: what inventory to play. A JSON file (`-scenario`) or, without one, what the flags say.
//
//	{
//	  "datacenters": [{
//	    "name": "DC", "folder": "a/b",                      folder: datacenter folders, "/" between them
//	    "clusters": [{"name": "c", "folder": "", "hosts": ["esx1"]}],
//	    "standalone_hosts": ["esx9", {"name": "esx8", "folder": "racks/r1"}],
//	    "datastores": ["datastore1", {"name": "v", "type": "vsan"}],   default: datastore1; each a folder of -state
//	    "portgroups": ["dv lan"],                           of one distributed switch that all hosts are on
//	    "vms": [{
//	      "name": "web", "folder": "prod/eu",               VM folders below the datacenter's
//	      "host": "esx1",                                   default: the first host
//	      "datastore": "datastore1", "dir": "web",          where .vmx and disks lie; dir defaults to the name
//	      "power": "on",                                    "on" (default) or "off"
//	      "firmware": "bios", "cpus": 1, "memory_mib": 512, "guest_id": "otherLinux64Guest",
//	      "tools": true,                                    guest tools run (default); false: there are none
//	      "tools_stopped": false,                           they are there, and do not run
//	      "shutdown_s": 0, "shutdown_spread_s": 0,          how long the guest takes to shut down, give or take
//	      "ignores_shutdown": false,                        it never does
//	      "quiesce": "ok",                                  or "fail": ApplicationQuiesceFault
//	      "vss": false,                                     a quiesced snapshot leaves two redo logs: see vss.go
//	      "snapshots": [{"name": "s", "description": "", "writes": "1MiB"}],   made by somebody else, in a chain
//	      "cbt": false,                                     changed blocks are tracked from the start: see cbt.go
//	      "consolidation_needed": false,                    deltas that no snapshot explains
//	      "template": false, "fault_tolerance": false,      config.template; runtime.faultToleranceState running
//	      "disabled_methods": ["RelocateVM_Task"],          refused with MethodDisabled, and named in disabledMethod
//	      "instance_uuid": "", "bios_uuid": "",             drawn when not given
//	      "cores_per_socket": 1, "secure_boot": false,
//	      "boot": [2001, 4000],                             boot order: keys of disks and cards
//	      "nics": ["vmxnet3"],                              default: one; e1000, e1000e, pcnet, sriov, vmxnet2, vmxnet3
//	               or {"model": "e1000", "network": "VM Network", "mac": "", "disconnected": false}
//	      "devices": [],                                    cdrom, floppy, passthrough, serial, sound, tpm, usb, usb-device
//	      "disks": [{
//	        "size": "64MiB",                                or a number of bytes
//	        "controller": "pvscsi", "bus": 0,               pvscsi, lsilogic, lsisas1068, buslogic, ahci, ide, nvme
//	        "unit": 0,                                      default: next free
//	        "datastore": "", "file": "web_1",               default: the VM's datastore; name[_n]
//	        "thin": true, "mode": "persistent",             any vSphere disk mode
//	        "data": "16MiB",                                stored data; default 40 % of size, at most 256 MiB
//	        "seed": 7,                                      default: from -seed, VM and disk
//	        "from": "/path/disk.raw",                       content copied from a file instead
//	        "backing": "flat",                              vsan, vvol, sesparse, rdm, rdm_physical: see kinds.go
//	        "sharing": "sharingNone",                       or sharingMultiWriter
//	        "bus_sharing": "noSharing",                     of its controller: virtualSharing, physicalSharing
//	        "encrypted": false
//	      }]
//	    }],
//	    "filler": {"count": 10000, "prefix": "vm-", "folder": "filler"}   VMs without disks or files
//	  }],
//	  "locks": "live",              which extents of a running VM /folder refuses: see locks.go
//	  "keep_frozen": false,         copy each chain as of its snapshot to DIR/frozen/<snapshot moref>/
//	  "host_ignores_range": false,  /folder answers 200 and the whole file to a Range request
//	  "free_licence": false,        calls that change something answer RestrictedVersion, as on a free ESXi
//	  "vss": false, "consolidation_needed": false   for every VM
//	  "lease": {"timeout_s": 300, "star": false, "form": "host"},   of exports: "*" as the URLs' host; "qemu": streams
//	                                as qemu-img makes them, not as a host does (streamvmdk.go)
//	  "api_version": "6.5",         that clients may speak: one of 6.5 is not told what a virtual TPM is
//	}
//
// Without "datacenters" the inventory is the one of the flags. consolidation_needed may be spelled as vSphere does,
// consolidationNeeded.
//
// Names are given as vSphere stores them: "%25", "%2f" and "%5c" stand for "%", "/" and "\". The same VM name may
// stand in several folders.
package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
)

type scenario struct {
	Datacenters      []datacenterSpec `json:"datacenters"`
	Locks            string           `json:"locks"`
	KeepFrozen       bool             `json:"keep_frozen"`
	HostIgnoresRange bool             `json:"host_ignores_range"`
	FreeLicence      bool             `json:"free_licence"`
	VSS              bool             `json:"vss"`
	APIVersion       string           `json:"api_version"`
	Lease            leaseSpec        `json:"lease"`
	consolidation
}

// consolidation is an option with two spellings.
type consolidation struct {
	Needed  bool `json:"consolidation_needed"`
	VSphere bool `json:"consolidationNeeded"`
}

func (c consolidation) needed() bool { return c.Needed || c.VSphere }

type datacenterSpec struct {
	Name            string          `json:"name"`
	Folder          string          `json:"folder"`
	Clusters        []clusterSpec   `json:"clusters"`
	StandaloneHosts []hostSpec      `json:"standalone_hosts"`
	Datastores      []datastoreSpec `json:"datastores"`
	Portgroups      []string        `json:"portgroups"`
	VMs             []vmSpec        `json:"vms"`
	Filler          *fillerSpec     `json:"filler"`
}

type clusterSpec struct {
	Name   string   `json:"name"`
	Folder string   `json:"folder"`
	Hosts  []string `json:"hosts"`
}

type hostSpec struct {
	Name   string `json:"name"`
	Folder string `json:"folder"`
}

// UnmarshalJSON takes a bare name too.
func (h *hostSpec) UnmarshalJSON(b []byte) error {
	if b[0] == '"' {
		return json.Unmarshal(b, &h.Name)
	}
	type plain hostSpec
	return strictUnmarshal(b, (*plain)(h))
}

type datastoreSpec struct {
	Name string `json:"name"`
	Type string `json:"type"` // summary.type: VMFS, NFS, vsan, VVOL
}

// UnmarshalJSON takes a bare name too.
func (d *datastoreSpec) UnmarshalJSON(b []byte) error {
	if b[0] == '"' {
		return json.Unmarshal(b, &d.Name)
	}
	type plain datastoreSpec
	return strictUnmarshal(b, (*plain)(d))
}

type vmSpec struct {
	Name      string `json:"name"`
	Folder    string `json:"folder"`
	Host      string `json:"host"`
	Datastore string `json:"datastore"`
	Dir       string `json:"dir"`
	Power     string `json:"power"`
	Firmware  string `json:"firmware"`
	CPUs      int32  `json:"cpus"`
	MemoryMiB int64  `json:"memory_mib"`
	GuestID   string `json:"guest_id"`
	Tools     *bool  `json:"tools"`

	ToolsStopped    bool    `json:"tools_stopped"`
	ShutdownS       float64 `json:"shutdown_s"`
	ShutdownSpreadS float64 `json:"shutdown_spread_s"`
	IgnoresShutdown bool    `json:"ignores_shutdown"`

	Quiesce   string         `json:"quiesce"`
	VSS       bool           `json:"vss"`
	CBT       bool           `json:"cbt"`
	Snapshots []snapshotSpec `json:"snapshots"`
	consolidation
	InstanceUUID string     `json:"instance_uuid"`
	BIOSUUID     string     `json:"bios_uuid"`
	NICs         []nicSpec  `json:"nics"`
	Disks        []diskSpec `json:"disks"`

	Template        bool     `json:"template"`
	FaultTolerance  bool     `json:"fault_tolerance"`
	DisabledMethods []string `json:"disabled_methods"`

	CoresPerSocket int32    `json:"cores_per_socket"`
	SecureBoot     bool     `json:"secure_boot"`
	Boot           []int32  `json:"boot"`
	Devices        []string `json:"devices"`
}

type snapshotSpec struct {
	Name        string   `json:"name"`
	Description string   `json:"description"`
	Writes      byteSize `json:"writes"` // what the guest writes afterwards
}

type diskSpec struct {
	Size       byteSize  `json:"size"`
	Controller string    `json:"controller"`
	Bus        int32     `json:"bus"`
	Unit       *int32    `json:"unit"`
	Datastore  string    `json:"datastore"`
	File       string    `json:"file"`
	Thin       bool      `json:"thin"`
	Mode       string    `json:"mode"`
	Data       *byteSize `json:"data"`
	Seed       *uint64   `json:"seed"`
	From       string    `json:"from"`
	Backing    string    `json:"backing"`
	Sharing    string    `json:"sharing"`
	BusSharing string    `json:"bus_sharing"`
	Encrypted  bool      `json:"encrypted"`
}

type fillerSpec struct {
	Count  int    `json:"count"`
	Prefix string `json:"prefix"`
	Folder string `json:"folder"`
}

// byteSize is a number of bytes: a JSON number, or a string such as "64MiB".
type byteSize int64

var sizeUnits = []struct {
	suffix string
	factor float64
}{
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
	{"K", 1 << 10}, {"M", 1 << 20}, {"G", 1 << 30}, {"T", 1 << 40}, {"B", 1}, {"", 1},
}

func parseSize(s string) (byteSize, error) {
	for _, u := range sizeUnits {
		number, found := strings.CutSuffix(strings.TrimSpace(s), u.suffix)
		if !found {
			continue
		}
		n, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
		if err != nil || n < 0 || n*u.factor > math.MaxInt64 {
			break
		}
		return byteSize(n * u.factor), nil
	}
	return 0, fmt.Errorf("size %q: expected a number of bytes or, say, 64MiB", s)
}

func (n *byteSize) UnmarshalJSON(b []byte) (err error) {
	*n, err = parseSize(strings.Trim(string(b), `"`))
	return err
}

// inSnapshots says whether a snapshot of the VM includes the disk.
func (d diskSpec) inSnapshots() bool { return !strings.HasPrefix(d.Mode, "independent") }

// adapterType is the word for the controller in a descriptor's disk database.
func (d diskSpec) adapterType() string {
	switch d.Controller {
	case "buslogic", "ide":
		return d.Controller
	}
	return "lsilogic"
}

func strictUnmarshal(b []byte, into any) error {
	dec := json.NewDecoder(strings.NewReader(string(b)))
	dec.DisallowUnknownFields()
	return dec.Decode(into)
}

func loadScenario(file string) (*scenario, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	s := new(scenario)
	if err = strictUnmarshal(b, s); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return s, nil
}
