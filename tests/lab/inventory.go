// The inventory: what the scenario names, made through the simulator's own API.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/uuid"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

// datacenter is one of the lab's, with what is needed to make VMs in it.
type datacenter struct {
	spec       datacenterSpec
	path       string // inventory path without the leading slash, names as stored: dcPath
	ref        types.ManagedObjectReference
	folders    *object.DatacenterFolders
	hosts      map[string]*hostEntry
	datastores map[string]*datastore
	dirs       map[string]bool // VM folders taken, as "datastore/dir"
	portgroups map[string]types.ManagedObjectReference
}

type hostEntry struct {
	ref  types.ManagedObjectReference
	pool *object.ResourcePool
}

type datastore struct {
	dc   *datacenter
	name string
	dir  string // on this machine
	kind string // summary.type as the scenario has it
	ref  types.ManagedObjectReference
}

func (l *lab) buildInventory() error {
	for _, spec := range l.scenario.Datacenters {
		dc, err := l.buildDatacenter(spec)
		if err != nil {
			return fmt.Errorf("datacenter %q: %w", spec.Name, err)
		}
		l.datacenters = append(l.datacenters, dc)
		if err = l.populate(dc); err != nil {
			return err
		}
	}
	return nil
}

// populate makes the VMs of a datacenter; then its datastores get their types, which the simulator minds while it
// creates files.
func (l *lab) populate(dc *datacenter) error {
	for _, vm := range dc.spec.VMs {
		if err := l.buildVM(dc, vm); err != nil {
			return fmt.Errorf("VM %q: %w", vm.Name, err)
		}
	}
	if dc.spec.Filler != nil {
		if err := l.buildFiller(dc, *dc.spec.Filler); err != nil {
			return fmt.Errorf("filler: %w", err)
		}
	}
	for _, spec := range dc.spec.Datastores {
		if spec.Type != "" {
			ds := l.ctx.Map.Get(dc.datastores[spec.Name].ref)
			l.ctx.Map.AtomicUpdate(l.ctx, ds, []types.PropertyChange{{Name: "summary.type", Val: spec.Type}})
		}
	}
	return nil
}

func (l *lab) buildDatacenter(spec datacenterSpec) (*datacenter, error) {
	dc := &datacenter{
		spec: spec, path: joinPath(spec.Folder, spec.Name),
		hosts: map[string]*hostEntry{}, datastores: map[string]*datastore{}, dirs: map[string]bool{},
		portgroups: map[string]types.ManagedObjectReference{},
	}
	var err error
	if l.opts.esx {
		err = l.adoptESX(dc)
	} else if err = l.createDatacenter(dc); err == nil {
		err = l.buildHosts(dc)
	}
	if err != nil {
		return nil, err
	}
	for _, ds := range spec.Datastores {
		if err = l.buildDatastore(dc, ds.Name); err != nil {
			return nil, fmt.Errorf("datastore %q: %w", ds.Name, err)
		}
	}
	return dc, l.buildPortgroups(dc)
}

func (l *lab) createDatacenter(dc *datacenter) error {
	parent, err := subFolder(object.NewRootFolder(l.client), dc.spec.Folder)
	if err != nil {
		return err
	}
	made, err := parent.CreateDatacenter(context.Background(), decodeName(dc.spec.Name))
	if err != nil {
		return err
	}
	l.setName(made.Reference(), dc.spec.Name)
	return l.useDatacenter(dc, made)
}

func (l *lab) useDatacenter(dc *datacenter, made *object.Datacenter) (err error) {
	dc.ref = made.Reference()
	made.SetInventoryPath("/" + dc.path)
	dc.folders, err = made.Folders(context.Background())
	return err
}

func (l *lab) buildHosts(dc *datacenter) error {
	ctx := context.Background()
	for _, c := range dc.spec.Clusters {
		parent, err := subFolder(dc.folders.HostFolder, c.Folder)
		if err != nil {
			return err
		}
		cluster, err := parent.CreateCluster(ctx, c.Name, types.ClusterConfigSpecEx{})
		if err != nil {
			return fmt.Errorf("cluster %q: %w", c.Name, err)
		}
		for _, name := range c.Hosts {
			task, err := cluster.AddHost(ctx, types.HostConnectSpec{HostName: name}, true, nil, nil)
			if err = l.addHost(dc, name, task, err); err != nil {
				return fmt.Errorf("host %q: %w", name, err)
			}
		}
	}
	for _, h := range dc.spec.StandaloneHosts {
		parent, err := subFolder(dc.folders.HostFolder, h.Folder)
		if err != nil {
			return err
		}
		task, err := parent.AddStandaloneHost(ctx, types.HostConnectSpec{HostName: h.Name}, true, nil, nil)
		if err = l.addHost(dc, h.Name, task, err); err != nil {
			return fmt.Errorf("host %q: %w", h.Name, err)
		}
	}
	return nil
}

// addHost waits for the task that adds a host and notes what it made.
func (l *lab) addHost(dc *datacenter, name string, task *object.Task, err error) error {
	if err != nil {
		return err
	}
	ctx := context.Background()
	info, err := task.WaitForResult(ctx, nil)
	if err != nil {
		return err
	}
	ref := info.Result.(types.ManagedObjectReference)
	if ref.Type != "HostSystem" { // a standalone host's compute resource
		if ref, err = l.hostOf(ref); err != nil {
			return err
		}
	}
	return l.noteHost(dc, name, ref)
}

// noteHost remembers a host for the VMs to come, and gives it a hardware UUID of its own.
func (l *lab) noteHost(dc *datacenter, name string, ref types.ManagedObjectReference) error {
	host, id := l.ctx.Map.Get(ref).(*simulator.HostSystem), uuid.NewString()
	l.ctx.WithLock(host, func() {
		host.Summary.Hardware.Uuid, host.Hardware.SystemInfo.Uuid = id, id
	})
	pool, err := object.NewHostSystem(l.client, ref).ResourcePool(context.Background())
	dc.hosts[name] = &hostEntry{ref: ref, pool: pool}
	return err
}

func (l *lab) hostOf(compute types.ManagedObjectReference) (types.ManagedObjectReference, error) {
	hosts, err := object.NewComputeResource(l.client, compute).Hosts(context.Background())
	if err != nil || len(hosts) == 0 {
		return compute, fmt.Errorf("%s has no host: %w", compute, err)
	}
	return hosts[0].Reference(), nil
}

// buildDatastore makes the folder DIR/<name> a datastore of every host of the datacenter; where another datacenter
// has one of that name, DIR/<datacenter>/<name>.
func (l *lab) buildDatastore(dc *datacenter, name string) error {
	ctx := context.Background()
	dir, err := l.state.claim(name)
	if err != nil {
		return err
	}
	if dir == "" { // another datacenter's
		if _, err = l.state.claim(dc.spec.Name); err != nil {
			return err
		}
		dir = filepath.Join(l.state.path, dc.spec.Name, name)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	ds := &datastore{dc: dc, name: name, dir: dir, kind: dc.typeOf(name)}
	for _, host := range dc.hosts {
		system, err := object.NewHostSystem(l.client, host.ref).ConfigManager().DatastoreSystem(ctx)
		if err != nil {
			return err
		}
		made, err := system.CreateLocalDatastore(ctx, name, dir)
		if err != nil {
			return err
		}
		if made.Reference().Value != "" { // only the first call names it
			ds.ref = made.Reference()
		}
	}
	dc.datastores[name] = ds
	return nil
}

// subFolder is the folder at path below parent, made where it is missing.
func subFolder(parent *object.Folder, path string) (*object.Folder, error) {
	ctx := context.Background()
	for _, name := range strings.FieldsFunc(path, func(r rune) bool { return r == '/' }) {
		found, err := childFolder(ctx, parent, name)
		if err == nil && found == nil {
			found, err = parent.CreateFolder(ctx, decodeName(name))
		}
		if err != nil {
			return nil, fmt.Errorf("folder %q: %w", name, err)
		}
		parent = found
	}
	return parent, nil
}

func childFolder(ctx context.Context, parent *object.Folder, name string) (*object.Folder, error) {
	ref, err := object.NewSearchIndex(parent.Client()).FindChild(ctx, parent, name)
	if err != nil || ref == nil {
		return nil, err
	}
	folder, ok := ref.(*object.Folder)
	if !ok {
		return nil, fmt.Errorf("is a %s", ref.Reference().Type)
	}
	return folder, nil
}

// setName gives an object the name as stored, whatever the call that made it did to it.
func (l *lab) setName(ref types.ManagedObjectReference, name string) {
	l.ctx.Map.AtomicUpdate(l.ctx, l.ctx.Map.Get(ref), []types.PropertyChange{{Name: "name", Val: name}})
}

var (
	nameDecoder = strings.NewReplacer("%2f", "/", "%2F", "/", "%5c", `\`, "%5C", `\`, "%25", "%")
)

// decodeName undoes vSphere's encoding of names.
func decodeName(name string) string { return nameDecoder.Replace(name) }

func joinPath(elem ...string) string {
	var parts []string
	for _, e := range elem {
		if e = strings.Trim(e, "/"); e != "" {
			parts = append(parts, e)
		}
	}
	return strings.Join(parts, "/")
}
