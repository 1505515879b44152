// `/nfc/<ticket>/disk-<n>.vmdk`: a leased disk as a stream-optimised VMDK, at the hosts' port, and at the vCenter's own
// for URLs with `*`. The ticket in the URL is all that is asked for.
//
// The encoding is qemu-img's, of the very chain that lies in the datastore; what a host would make of it, and what lies
// there are, is in streamvmdk.go.
package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const nfcPrefix = "/nfc/"

var errLeaseEnded = errors.New("the lease has ended")

// whereToDownload is host and thumbprint of the URLs of a lease.
func (l *lab) whereToDownload() (host, thumbprint string) {
	own := l.server.Listener.Addr().String()
	if l.hosts == nil || l.scenario.Lease.Star {
		return "*" + own[strings.LastIndex(own, ":"):], ""
	}
	host, thumbprint = l.hosts.address, l.hosts.certs.sha1
	switch l.faults.atHosts() {
	case "down":
		host = "127.0.0.1:1"
	case "strange":
		thumbprint = l.certs.sha1
	case "unnamed":
		thumbprint = ""
	}
	return host, thumbprint
}

func (l *lab) serveNFC(w http.ResponseWriter, r *http.Request) {
	meter := &meter{ResponseWriter: w, plan: bodyPlan{cutAfter: -1}, lab: l, request: r, disk: r.Method == http.MethodGet}
	defer func() { l.stats.http(r.URL.Path, meter.sent) }()
	ticket, name, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, nfcPrefix), "/")
	held, ok := l.leases.Load(ticket)
	switch {
	case l.faults.atHosts() == "busy":
		http.Error(meter, "503 Service Unavailable", http.StatusServiceUnavailable)
	case !ok || r.Method != http.MethodGet:
		http.Error(meter, "404 Not Found", http.StatusNotFound)
	default:
		held.(*lease).serve(meter, name)
	}
}

// serve sends a disk, in chunks of unknown total length, as a host that makes the encoding up as it goes.
func (l *lease) serve(w *meter, name string) {
	for _, d := range l.disks {
		if d.name != name {
			continue
		}
		if d.once.Do(func() { d.encode(l.m.lab) }); d.err != nil {
			http.Error(w, d.err.Error(), http.StatusInternalServerError)
			return
		}
		f, err := os.Open(d.file)
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		defer f.Close()
		defer l.m.lab.stats.transfer(l.m.hostName())()
		if info, err := f.Stat(); err == nil {
			w.length = info.Size()
		}
		w.Header().Set("Content-Type", "application/x-vnd.vmware-streamVmdk")
		w.WriteHeader(http.StatusOK)
		if err = l.send(w, f); err != nil {
			panic(http.ErrAbortHandler)
		}
		return
	}
	http.Error(w, "404 Not Found", http.StatusNotFound)
}

func (l *lease) send(w io.Writer, f *os.File) error {
	lie := l.m.lab.faults.takeLeaseLie()
	whileHeld := &leasedWriter{w, l.ended}
	if l.m.lab.scenario.Lease.Form == "qemu" && lie == "" {
		_, err := io.Copy(whileHeld, f)
		return err
	}
	return relay(whileHeld, f, lie)
}

// leasedWriter fails once the lease has ended.
type leasedWriter struct {
	io.Writer
	ended <-chan struct{}
}

func (w *leasedWriter) Write(p []byte) (int, error) {
	select {
	case <-w.ended:
		return 0, errLeaseEnded
	default:
		return w.Writer.Write(p)
	}
}

// encode has qemu-img read the chain that the descriptor heads.
func (d *leasedDisk) encode(l *lab) {
	file := filepath.Join(l.scratch, fmt.Sprintf("%d-%s-%p", d.disk.key, d.name, d))
	out, err := exec.Command("qemu-img", "convert", "-U", "-f", "vmdk", "-O", "vmdk", "-o", "subformat=streamOptimized",
		d.disk.path(d.source), file).CombinedOutput()
	if d.file = file; err != nil {
		d.err = fmt.Errorf("qemu-img: %w: %s", err, out)
	}
}
