// Command lab plays a vCenter for tests, demo and benchmarks: govmomi's simulator with real disks, honest snapshots
// and an HTTP port to stir it. FACTS.md says what it adds and on what grounds; scenario.go what can be played.
//
// It prints one JSON line on stdout when ready and runs until SIGTERM or SIGINT.
package main

import (
	"crypto/rand"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
)

// options are the flags.
type options struct {
	listen, username, password        string
	dc, cluster, host, standaloneHost string
	vm, folder                        string
	disks                             int
	diskSize                          string
	seed                              uint64
	state, scenario                   string
	esx                               bool
}

func parseFlags(args []string) (options, error) {
	var o options
	f := flag.NewFlagSet("lab", flag.ContinueOnError)
	f.StringVar(&o.listen, "listen", "127.0.0.1:0", "address of the vCenter's HTTPS port")
	f.StringVar(&o.username, "username", "hyper", "user name; must hold no @")
	f.StringVar(&o.password, "password", "", "password; random when empty")
	f.StringVar(&o.dc, "dc", "DC", "name of the datacenter")
	f.StringVar(&o.cluster, "cluster", "cluster", "name of the cluster")
	f.StringVar(&o.host, "host", "esx1", "name of the host in the cluster")
	f.StringVar(&o.standaloneHost, "standalone-host", "esx2", "name of the standalone host; empty for none")
	f.StringVar(&o.vm, "vm", "demo", "name of the VM")
	f.StringVar(&o.folder, "folder", "", "VM folder, such as a/b")
	f.IntVar(&o.disks, "disks", 1, "disks of the VM")
	f.StringVar(&o.diskSize, "disk-size", "64MiB", "size of each disk")
	f.Uint64Var(&o.seed, "seed", 1, "seed of the disks' content")
	f.StringVar(&o.state, "state", "", "directory for the datastores; a temporary one when empty, removed at the end")
	f.StringVar(&o.scenario, "scenario", "", "JSON file with the inventory; see scenario.go")
	f.BoolVar(&o.esx, "esx", false, "play a lone ESXi host; the scenario's first datacenter becomes ha-datacenter")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	if strings.Contains(o.username, "@") {
		return o, fmt.Errorf("-username must hold no @: the simulator's SSO would take over the login")
	}
	if o.password == "" {
		o.password = rand.Text()
	}
	return o, nil
}

// ready is the line printed when the lab answers.
type ready struct {
	URL              string    `json:"url"`
	Host             string    `json:"host"`
	Port             int       `json:"port"`
	Username         string    `json:"username"`
	Password         string    `json:"password"`
	ThumbprintSHA1   string    `json:"thumbprint_sha1"`
	ThumbprintSHA256 string    `json:"thumbprint_sha256"`
	CAPEM            string    `json:"ca_pem"`
	StateDir         string    `json:"state_dir"`
	AdminURL         string    `json:"admin_url"`
	VMs              []readyVM `json:"vms,omitempty"`
}

type readyVM struct {
	Name  string      `json:"name"`
	Path  string      `json:"path"`
	Moref string      `json:"moref"`
	Disks []readyDisk `json:"disks"`
}

type readyDisk struct {
	Key           int32  `json:"key"`
	DatastorePath string `json:"datastore_path"`
	CapacityBytes int64  `json:"capacity_bytes"`
}

const readyVMLimit = 1000 // above it the list is left out

func (l *lab) ready() ready {
	host, port, _ := net.SplitHostPort(l.server.Listener.Addr().String())
	number, _ := strconv.Atoi(port)
	r := ready{
		URL: "https://" + net.JoinHostPort(host, port) + "/sdk", Host: host, Port: number,
		Username: l.opts.username, Password: l.opts.password,
		ThumbprintSHA1: l.certs.sha1, ThumbprintSHA256: l.certs.sha256, CAPEM: l.certs.caPEM,
		StateDir: l.state.path, AdminURL: l.adminURL,
	}
	if l.vmCount() > readyVMLimit {
		return r
	}
	for _, m := range l.order {
		vm := readyVM{Name: m.Name, Path: m.path, Moref: m.Self.Value, Disks: []readyDisk{}}
		for _, d := range m.disks {
			vm.Disks = append(vm.Disks, readyDisk{d.key, d.backingName(), d.capacity})
		}
		r.VMs = append(r.VMs, vm)
	}
	return r
}

func run(args []string) error {
	o, err := parseFlags(args)
	if err != nil {
		return err
	}
	l, err := newLab(o)
	if err != nil {
		return err
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer l.close()
	if err = l.start(); err != nil {
		return err
	}
	if err = json.NewEncoder(os.Stdout).Encode(l.ready()); err != nil {
		return err
	}
	<-stop
	return nil
}

func main() {
	log.SetFlags(log.Ltime | log.Lmicroseconds)
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(1)
	}
}
