// The scenario: what inventory to play. A JSON file (`-scenario`) or, without one, what the flags say.
//
//	{
//	  "datacenters": [{
//	    "name": "DC", "folder": "a/b",                      folder: datacenter folders, "/" between them
//	    "clusters": [{"name": "c", "folder": "", "hosts": ["esx1"]}],
//	    "standalone_hosts": ["esx9", {"name": "esx8", "folder": "racks/r1"}],
//	    "datastores": ["datastore1", {"name": "v", "type": "vsan"}],   default: datastore1; each a folder of -state
//	    "vms": [{
//	      "name": "web", "folder": "prod/eu",               VM folders below the datacenter's
//	      "host": "esx1",                                   default: the first host
//	      "datastore": "datastore1", "dir": "web",          where .vmx and disks lie; dir defaults to the name
//	      "power": "on",                                    "on" (default) or "off"
//	      "firmware": "bios", "cpus": 1, "memory_mib": 512, "guest_id": "otherLinux64Guest",
//	      "tools": true,                                    guest tools run (default)
//	      "quiesce": "ok",                                  or "fail": ApplicationQuiesceFault
//	      "vss": false,                                     a quiesced snapshot leaves two redo logs: see vss.go
//	      "snapshots": [{"name": "s", "description": "", "writes": "1MiB"}],   made by somebody else, in a chain
//	      "consolidation_needed": false,                    deltas that no snapshot explains
//	      "instance_uuid": "", "bios_uuid": "",             drawn when not given
//	      "nics": ["vmxnet3"],                              default: one; e1000, e1000e, vmxnet2, vmxnet3
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
	"slices"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/vim25/types"
)

type scenario struct {
	Datacenters      []datacenterSpec `json:"datacenters"`
	Locks            string           `json:"locks"`
	KeepFrozen       bool             `json:"keep_frozen"`
	HostIgnoresRange bool             `json:"host_ignores_range"`
	FreeLicence      bool             `json:"free_licence"`
	VSS              bool             `json:"vss"`
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
	Name      string         `json:"name"`
	Folder    string         `json:"folder"`
	Host      string         `json:"host"`
	Datastore string         `json:"datastore"`
	Dir       string         `json:"dir"`
	Power     string         `json:"power"`
	Firmware  string         `json:"firmware"`
	CPUs      int32          `json:"cpus"`
	MemoryMiB int64          `json:"memory_mib"`
	GuestID   string         `json:"guest_id"`
	Tools     *bool          `json:"tools"`
	Quiesce   string         `json:"quiesce"`
	VSS       bool           `json:"vss"`
	Snapshots []snapshotSpec `json:"snapshots"`
	consolidation
	InstanceUUID string     `json:"instance_uuid"`
	BIOSUUID     string     `json:"bios_uuid"`
	NICs         []string   `json:"nics"`
	Disks        []diskSpec `json:"disks"`
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

// readScenario is what to play: the file's inventory, or where it names none, that of the flags.
func readScenario(o options) (*scenario, error) {
	s := new(scenario)
	if o.scenario != "" {
		var err error
		if s, err = loadScenario(o.scenario); err != nil {
			return nil, err
		}
	}
	if len(s.Datacenters) == 0 {
		dc, err := flagDatacenter(o)
		if err != nil {
			return nil, err
		}
		s.Datacenters = []datacenterSpec{dc}
	}
	return s, s.complete()
}

func flagDatacenter(o options) (datacenterSpec, error) {
	size, err := parseSize(o.diskSize)
	if err != nil {
		return datacenterSpec{}, err
	}
	vm := vmSpec{Name: o.vm, Folder: o.folder}
	for range o.disks {
		vm.Disks = append(vm.Disks, diskSpec{Size: size, Thin: true})
	}
	dc := datacenterSpec{Name: o.dc, VMs: []vmSpec{vm}}
	if o.esx {
		dc.StandaloneHosts = []hostSpec{{Name: o.host}}
		return dc, nil
	}
	if o.cluster != "" && o.host != "" {
		dc.Clusters = []clusterSpec{{Name: o.cluster, Hosts: []string{o.host}}}
	}
	if o.standaloneHost != "" {
		dc.StandaloneHosts = []hostSpec{{Name: o.standaloneHost}}
	}
	return dc, nil
}

// complete fills in defaults and refuses what cannot be played.
func (s *scenario) complete() error {
	if s.Locks == "" {
		s.Locks = locksLive
	}
	if s.Locks != locksLive && s.Locks != locksStrict && s.Locks != locksOff {
		return fmt.Errorf("locks: %q is not %q, %q or %q", s.Locks, locksLive, locksStrict, locksOff)
	}
	for i := range s.Datacenters {
		for j := range s.Datacenters[i].VMs {
			vm := &s.Datacenters[i].VMs[j]
			vm.VSS, vm.Needed = vm.VSS || s.VSS, vm.needed() || s.needed()
		}
		if err := s.Datacenters[i].complete(); err != nil {
			return fmt.Errorf("datacenter %q: %w", s.Datacenters[i].Name, err)
		}
	}
	return nil
}

func (dc *datacenterSpec) complete() error {
	if dc.Name == "" {
		return fmt.Errorf("has no name")
	}
	if len(dc.Datastores) == 0 {
		dc.Datastores = []datastoreSpec{{Name: "datastore1"}}
	}
	if dc.firstHost() == "" {
		return fmt.Errorf("has no host")
	}
	for i := range dc.VMs {
		if err := dc.VMs[i].complete(dc); err != nil {
			return fmt.Errorf("VM %q: %w", dc.VMs[i].Name, err)
		}
	}
	return nil
}

func (dc *datacenterSpec) firstHost() string {
	for _, c := range dc.Clusters {
		if len(c.Hosts) > 0 {
			return c.Hosts[0]
		}
	}
	for _, h := range dc.StandaloneHosts {
		return h.Name
	}
	return ""
}

func (v *vmSpec) complete(dc *datacenterSpec) error {
	if v.Name == "" {
		return fmt.Errorf("has no name")
	}
	setDefault(&v.Host, dc.firstHost())
	setDefault(&v.Datastore, dc.Datastores[0].Name)
	setDefault(&v.Dir, fileName(v.Name))
	setDefault(&v.Power, "on")
	setDefault(&v.Firmware, "bios")
	setDefault(&v.GuestID, "otherLinux64Guest")
	setDefault(&v.Quiesce, "ok")
	setDefault(&v.CPUs, 1)
	setDefault(&v.MemoryMiB, 512)
	if v.Tools == nil {
		yes := true
		v.Tools = &yes
	}
	if v.NICs == nil {
		v.NICs = []string{"vmxnet3"}
	}
	for i := range v.Disks {
		if err := v.Disks[i].complete(v, i); err != nil {
			return fmt.Errorf("disk %d: %w", i, err)
		}
	}
	return nil
}

func (d *diskSpec) complete(v *vmSpec, i int) error {
	setDefault(&d.Controller, "pvscsi")
	setDefault(&d.Datastore, v.Datastore)
	setDefault(&d.Mode, "persistent")
	setDefault(&d.Backing, backingFlat)
	setDefault(&d.Sharing, string(types.VirtualDiskSharingSharingNone))
	setDefault(&d.BusSharing, string(types.VirtualSCSISharingNoSharing))
	if !slices.Contains(backings, d.Backing) {
		return fmt.Errorf("backing: %q is none of %v", d.Backing, backings)
	}
	if d.File == "" {
		d.File = fileName(v.Name)
		if i > 0 {
			d.File += fmt.Sprintf("_%d", i)
		}
	}
	if d.From != "" {
		info, err := os.Stat(d.From)
		if err != nil {
			return err
		}
		d.Size = byteSize((info.Size() + sectorSize - 1) / sectorSize * sectorSize)
	}
	if d.Size < sectorSize*2 || d.Size%sectorSize != 0 {
		return fmt.Errorf("size %d is not a multiple of %d, at least two", d.Size, sectorSize)
	}
	if d.Data == nil {
		n := min(d.Size*2/5, defaultDataLimit)
		d.Data = &n
	}
	return nil
}

func setDefault[T comparable](p *T, value T) {
	var zero T
	if *p == zero {
		*p = value
	}
}

// fileName is name without the characters that a descriptor's quoted names and datastore paths cannot hold.
func fileName(name string) string {
	return strings.Map(func(r rune) rune {
		if strings.ContainsRune("\"[]/\\\n\r", r) {
			return '_'
		}
		return r
	}, name)
}
