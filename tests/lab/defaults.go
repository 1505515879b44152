// What a scenario leaves open: the flags' inventory, names, places, sizes.
package main

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/vmware/govmomi/vim25/types"
)

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
		v.NICs = []nicSpec{{Model: "vmxnet3"}}
	}
	for i := range v.NICs {
		setDefault(&v.NICs[i].Network, defaultNetwork)
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
