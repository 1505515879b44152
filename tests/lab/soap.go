// The way in: what happens to a SOAP call before and after the simulator answers it.
package main

import (
	"bytes"
	"io"
	"net/http"
	"strings"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// learnInternalSession notes the session key of calls made in process.
func (l *lab) learnInternalSession(
	ctx *simulator.Context, _ *simulator.Method,
) (mo.Reference, types.BaseMethodFault) {
	l.internal = ctx.Session.Key
	return nil, nil
}

// handle sees every call (Map.Handler): it counts, applies faults, and puts our overrides into the session's
// registry. Returned from here they would be overwritten by what the session finds there.
func (l *lab) handle(ctx *simulator.Context, method *simulator.Method) (mo.Reference, types.BaseMethodFault) {
	if ctx.Session != nil && ctx.Session.Key == l.internal {
		return nil, nil
	}
	l.stats.soap(method.Name)
	if length := l.faults.takeDelay(&l.faults.delays, method.Name); length > 0 {
		l.sleep(length)
	}
	if fault := l.faults.onCall(method); fault != nil {
		return nil, fault
	}
	if fault := l.leaseInTheWay(method); fault != nil {
		return nil, fault
	}
	if l.scenario.FreeLicence && changesSomething(method.Name) {
		return nil, &types.RestrictedVersion{}
	}
	completeRequest(method)
	if ctx.Session != nil {
		l.putWrapper(ctx, method.This)
	}
	return nil, nil
}

// changesSomething tells the calls that a free licence forbids: the API is read-only under it.
func changesSomething(method string) bool {
	switch method {
	case "SearchDatastore_Task", "SearchDatastoreSubFolders_Task":
		return false
	case "ShutdownGuest", "RebootGuest", "ExportVm", "ExportSnapshot", "UnregisterVM":
		return true
	}
	return strings.HasSuffix(method, "_Task")
}

// completeRequest fills in what vCenter takes as given and the simulator trips over.
func completeRequest(method *simulator.Method) {
	var spec **types.HostDatastoreBrowserSearchSpec
	switch body := method.Body.(type) {
	case *types.SearchDatastore_Task:
		spec = &body.SearchSpec
	case *types.SearchDatastoreSubFolders_Task:
		spec = &body.SearchSpec
	default:
		return
	}
	if *spec == nil {
		*spec = new(types.HostDatastoreBrowserSearchSpec)
	}
	if len((*spec).MatchPattern) == 0 {
		(*spec).MatchPattern = []string{"*"}
	}
}

// front is the HTTP handler before the simulator's.
func (l *lab) front(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/sdk" || strings.HasPrefix(r.URL.Path, "/sdk/"):
			l.serveSOAP(w, r, next)
		case r.URL.Path == "/folder" || strings.HasPrefix(r.URL.Path, "/folder/"):
			l.serveFolder(w, r, next)
		case strings.HasPrefix(r.URL.Path, nfcPrefix):
			l.serveNFC(w, r)
		case strings.HasPrefix(r.URL.Path, "/vixdisklib/"):
			l.serveVixDiskLib(w, r)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// heldReply keeps a reply back until it has been looked over.
type heldReply struct {
	header http.Header
	status int
	body   []byte
}

func (h *heldReply) Header() http.Header { return h.header }

func (h *heldReply) WriteHeader(status int) { h.status = status }

func (h *heldReply) Write(p []byte) (int, error) {
	h.body = append(h.body, p...)
	return len(p), nil
}

func (l *lab) serveSOAP(w http.ResponseWriter, r *http.Request, next http.Handler) {
	request, err := io.ReadAll(r.Body)
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(request))
	held := &heldReply{header: w.Header(), status: http.StatusOK}
	next.ServeHTTP(held, r)
	body := l.faults.listed(typeArrayMembers(fetchReply(request, held.body)))
	head := string(body[:min(len(body), 1024)])
	if held.status == http.StatusOK && strings.Contains(head, "<Login") {
		l.stats.loggedIn()
	}
	body = l.issueTicket(sessionCookie(r), request, body)
	if r.Method == http.MethodPost {
		w.Header().Set("Content-Type", "text/xml; charset=utf-8")
	}
	w.WriteHeader(held.status)
	n, _ := w.Write(body)
	l.stats.http(r.URL.Path, int64(n))
}

func (l *lab) hostObject(h *hostEntry) *object.HostSystem {
	return object.NewHostSystem(l.client, h.ref)
}

func (l *lab) vmObject(ref types.ManagedObjectReference) *object.VirtualMachine {
	return object.NewVirtualMachine(l.client, ref)
}
