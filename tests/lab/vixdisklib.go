// `/vixdisklib/`: what the stand-in for VMware's library (vixdisklib/, in C) asks the lab for, at the vCenter's own port
// over TLS, with name and password as Basic authorisation. No such port is documented: the library's way to its servers
// is VMware's own, and how the library behaves towards its caller is what is played, not how it talks.
//
//	GET /vixdisklib/disk?vm=vm-42&snapshot=snapshot-50&path=[ds] dir/x.vmdk       "<capacity in bytes> <disk's UUID>"
//	GET /vixdisklib/allocated?…&offset=0&length=1048576&chunk=65536               a line "<offset> <length>" for each run
//	GET /vixdisklib/read?…&offset=0&length=4096                                   the bytes
//	GET /vixdisklib/access?vm=vm-42&identity=x&on=1                               PrepareForAccess, or with on=0 EndAccess
//
// Offsets and lengths are bytes. A refusal is a status of 4xx with the VIX error code as its body.
package main

import (
	"crypto/subtle"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/vim25/types"
)

// Error codes of VIX, by their names in VMware's vixDiskLib.h.
const (
	vixInvalidArgument  = 3
	vixFileNotFound     = 4
	vixFileAccessError  = 13
	vixUserPermissions  = 3014
	vixVMNotFound       = 4000
	vixSnapshotNotFound = 13003
	vixDiskOutOfRange   = 16007
)

const vixReadLimit = 64 << 20

// vixRefusal is a code to refuse a request with.
type vixRefusal int

func (v vixRefusal) Error() string { return strconv.Itoa(int(v)) }

func (l *lab) serveVixDiskLib(w http.ResponseWriter, r *http.Request) {
	meter := &meter{ResponseWriter: w, plan: bodyPlan{cutAfter: -1}, lab: l, request: r}
	defer func() { l.stats.http(r.URL.Path, meter.sent) }()
	if err := l.answerVixDiskLib(meter, r); err != nil {
		http.Error(meter, err.Error(), http.StatusBadRequest)
	}
}

func (l *lab) answerVixDiskLib(w *meter, r *http.Request) error {
	user, password, _ := r.BasicAuth()
	if subtle.ConstantTimeCompare([]byte(user+"\x00"+password), []byte(l.opts.username+"\x00"+l.opts.password)) != 1 {
		return vixRefusal(vixUserPermissions)
	}
	q := r.URL.Query()
	m := l.machines[types.ManagedObjectReference{Type: "VirtualMachine", Value: q.Get("vm")}]
	if m == nil {
		return vixRefusal(vixVMNotFound)
	}
	if r.URL.Path == "/vixdisklib/access" {
		l.stats.access(m.Self.Value+" "+q.Get("identity"), q.Get("on") == "1")
		return nil
	}
	d, err := m.vixDisk(q)
	if err != nil {
		return err
	}
	switch r.URL.Path {
	case "/vixdisklib/disk":
		_, err = fmt.Fprintf(w, "%d %s\n", d.capacity, d.uuid)
	case "/vixdisklib/allocated":
		err = d.vixAllocated(w, q)
	case "/vixdisklib/read":
		w.disk = true
		defer l.stats.transfer(m.hostName())()
		err = d.vixRead(w, q)
	default:
		err = vixRefusal(vixInvalidArgument)
	}
	return err
}

// vixDisk finds the disk by the path that its snapshot's config has, or, without a snapshot, the VM's, which is off.
func (m *machine) vixDisk(q url.Values) (*disk, error) {
	snapshot, path := q.Get("snapshot"), q.Get("path")
	if snapshot == "" && m.on.Load() {
		return nil, vixRefusal(vixFileAccessError)
	}
	standing := snapshot == ""
	for _, d := range m.disks {
		if !d.hasBytes() {
			continue
		}
		at := len(d.layers) - 1
		if snapshot != "" {
			if at = d.momentIndex(snapshot); at < 0 {
				continue
			}
			standing = standing || d.momentAt(snapshot).view == nil
		}
		if d.frozenPath(snapshot, at) == path {
			return d, nil
		}
	}
	if !standing {
		return nil, vixRefusal(vixSnapshotNotFound)
	}
	return nil, vixRefusal(vixFileNotFound)
}

// frozenPath is the datastore path of layer at, or of the redo log that a snapshot has of its own.
func (d *disk) frozenPath(snapshot string, at int) string {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if m := d.moments[snapshot]; m != nil && m.side != nil {
		return d.datastorePath(m.side.descriptor)
	}
	return d.datastorePath(d.layers[at].descriptor)
}

// vixRange is the part of the disk that a request names.
func (d *disk) vixRange(q url.Values) (off, n int64, err error) {
	off, err = strconv.ParseInt(q.Get("offset"), 10, 64)
	if err == nil {
		n, err = strconv.ParseInt(q.Get("length"), 10, 64)
	}
	if err != nil || off < 0 || n < 0 || off%sectorSize != 0 || n%sectorSize != 0 {
		return 0, 0, vixRefusal(vixInvalidArgument)
	}
	if n > d.capacity-off {
		return 0, 0, vixRefusal(vixDiskOutOfRange)
	}
	return off, n, nil
}

func (d *disk) vixRead(w *meter, q url.Values) error {
	off, n, err := d.vixRange(q)
	if err != nil || n > vixReadLimit {
		return err
	}
	buf := make([]byte, n)
	if err := d.readFrozen(q.Get("snapshot"), func(c content) error { return c.read(buf, off) }); err != nil {
		return err
	}
	w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(buf)
	return nil
}

// vixAllocated lists the runs of chunks of which any layer stores something.
func (d *disk) vixAllocated(w *meter, q url.Values) error {
	off, n, err := d.vixRange(q)
	if err != nil {
		return err
	}
	chunk, err := strconv.ParseInt(q.Get("chunk"), 10, 64)
	if err != nil || chunk <= 0 {
		return vixRefusal(vixInvalidArgument)
	}
	var list strings.Builder
	start := int64(-1) // of the run
	end := off + n
	err = d.readFrozen(q.Get("snapshot"), func(c content) error {
		for ; off <= end; off += chunk {
			stored := off < end && !c.hole(off, min(chunk, end-off))
			if stored && start < 0 {
				start = off
			} else if !stored && start >= 0 {
				fmt.Fprintf(&list, "%d %d\n", start, min(off, end)-start)
				start = -1
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if start >= 0 {
		fmt.Fprintf(&list, "%d %d\n", start, end-start)
	}
	_, err = w.Write([]byte(list.String()))
	return err
}

// readFrozen calls use with the content as of a snapshot, or as it is now.
func (d *disk) readFrozen(snapshot string, use func(content) error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	c, _, err := d.contentOf(snapshot)
	if err != nil {
		return vixRefusal(vixSnapshotNotFound)
	}
	return use(c)
}
