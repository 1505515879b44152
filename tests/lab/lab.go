// The lab: one simulator with everything the other files hang on it.
package main

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"

	"github.com/google/uuid"
	"github.com/vmware/govmomi/simulator"
	_ "github.com/vmware/govmomi/vapi/simulator" // tags, by REST
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/types"
)

// lab is a running vCenter (or ESXi host) to test with.
type lab struct {
	opts     options
	scenario *scenario
	model    *simulator.Model
	ctx      *simulator.Context // for our own dealings with the simulator
	client   *vim25.Client      // calls in process, not counted
	internal string             // session key of that client
	certs    *certificates
	server   *simulator.Server
	hosts    *hostPort // none with -esx
	admin    *http.Server
	adminURL string

	state   *stateDir // holds the datastores
	scratch string    // files nobody but us reads

	datacenters []*datacenter
	machines    map[types.ManagedObjectReference]*machine
	order       []*machine // as in the scenario

	stats   *stats
	faults  *faults
	tickets sync.Map // id → ticket, until spent
	leases  sync.Map // ticket → lease, until it ends
	loads   sync.Map // diskID → stop function of a running guest-load
	stopped chan struct{}

	wrapperMu sync.Mutex
	wrappers  map[types.ManagedObjectReference][]*simulator.Registry
}

func newLab(o options) (*lab, error) {
	l := &lab{
		opts: o, stats: newStats(), stopped: make(chan struct{}),
		machines: map[types.ManagedObjectReference]*machine{},
		wrappers: map[types.ManagedObjectReference][]*simulator.Registry{},
	}
	l.faults = newFaults(l)
	var err error
	l.scenario, err = readScenario(o)
	return l, err
}

// start builds the inventory and opens the ports.
func (l *lab) start() error {
	var err error
	if l.scratch, err = os.MkdirTemp("", "hyper2kvm-lab-scratch-"); err != nil {
		return err
	}
	if l.state, err = openState(l.opts.state); err != nil {
		return err
	}
	if err := l.build(); err != nil {
		return err
	}
	if err := l.serve(); err != nil {
		return err
	}
	return l.serveAdmin()
}

// build makes the simulator and its inventory.
func (l *lab) build() error {
	if l.opts.esx {
		l.model = simulator.ESX()
	} else {
		l.model = simulator.VPX()
		l.model.ServiceContent.About.InstanceUuid = uuid.NewString()
	}
	if l.scenario.APIVersion != "" {
		l.model.ServiceContent.About.ApiVersion = l.scenario.APIVersion
	}
	l.model.Datacenter, l.model.Datastore, l.model.Machine = 0, 0, 0
	if err := l.model.Create(); err != nil {
		return err
	}
	l.ctx = l.model.Service.Context
	l.ctx.Map.AddHandler(&watch{lab: l})
	l.ctx.Map.Handler = l.learnInternalSession
	var err error
	if l.client, err = vim25.NewClient(context.Background(), l.model.Service); err != nil {
		return err
	}
	l.ctx.Map.Handler = l.handle
	return l.buildInventory()
}

// newContext is for one piece of work of ours: contexts share the locks they hold.
func (l *lab) newContext() *simulator.Context {
	ctx := *l.ctx
	return &ctx
}

// serve opens the vCenter's port, and the one of its hosts.
func (l *lab) serve() error {
	// NewServer panics where it cannot listen: look first.
	probe, err := net.Listen("tcp", l.opts.listen)
	if err != nil {
		return err
	}
	probe.Close()
	host, _, err := net.SplitHostPort(l.opts.listen)
	if err != nil {
		return err
	}
	if l.certs, err = newCertificates(host); err != nil {
		return err
	}
	service := l.model.Service
	service.Listen = &url.URL{Host: l.opts.listen, User: url.UserPassword(l.opts.username, l.opts.password)}
	service.TLS = &tls.Config{Certificates: []tls.Certificate{l.certs.leaf}}
	service.RegisterEndpoints = true // tags, by REST
	l.server = service.NewServer()
	l.server.Config.Handler = l.front(l.server.Config.Handler)
	if l.opts.esx {
		return nil
	}
	return l.serveHosts(host, l.server.Config.Handler)
}

// close ends everything and removes what is ours.
func (l *lab) close() {
	close(l.stopped)
	if l.server != nil {
		l.server.Listener.Close()
		l.server.CloseClientConnections()
	}
	if l.hosts != nil {
		l.hosts.server.Close()
	}
	if l.admin != nil {
		l.admin.Close()
	}
	if l.model != nil && l.model.Service != nil {
		l.model.Remove()
	}
	if l.scratch != "" {
		os.RemoveAll(l.scratch)
	}
	if l.state != nil {
		l.state.close()
	}
}
