// `/folder`: a datastore's files over HTTPS, for those who are logged in.
//
// The simulator serves anyone, and finds the datacenter by a pattern. Here a live session is asked for (its cookie, a
// service ticket, or name and password as Basic authorisation, all of which vCenter takes), names are taken as they
// are, and locks and faults apply. Writing is left to the simulator.
package main

import (
	"encoding/xml"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/vmware/govmomi/vim25/soap"
)

func sessionCookie(r *http.Request) string {
	c, err := r.Cookie(soap.SessionCookieName)
	if err != nil {
		return ""
	}
	return strings.Trim(c.Value, `"`)
}

func (l *lab) liveSession(key string) bool {
	for _, s := range l.sessions() {
		if key != "" && s.Key == key {
			return true
		}
	}
	return false
}

// authorised says whether a request may see files; Basic authorisation makes a session and sets its cookie. Where
// there is a ticket it alone decides: a client's session cookie goes along to every port of the same address.
func (l *lab) authorised(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
	if c, err := r.Cookie(ticketCookie); err == nil {
		return l.spendTicket(c.Value, r)
	}
	if atHost(r) {
		return false
	}
	if l.liveSession(sessionCookie(r)) {
		return true
	}
	user, password, ok := r.BasicAuth()
	return ok && l.basicLogin(w, user, password, next)
}

// basicLogin logs in through the front door and hands the session's cookie on.
func (l *lab) basicLogin(w http.ResponseWriter, user, password string, next http.Handler) bool {
	var b strings.Builder
	b.WriteString(`<Envelope xmlns="http://schemas.xmlsoap.org/soap/envelope/"><Body><Login xmlns="urn:vim25">` +
		`<_this type="SessionManager">SessionManager</_this><userName>`)
	_ = xml.EscapeText(&b, []byte(user))
	b.WriteString(`</userName><password>`)
	_ = xml.EscapeText(&b, []byte(password))
	b.WriteString(`</password></Login></Body></Envelope>`)
	login, err := http.NewRequest(http.MethodPost, "/sdk", strings.NewReader(b.String()))
	if err != nil {
		return false
	}
	held := &heldReply{header: http.Header{}, status: http.StatusOK}
	next.ServeHTTP(held, login)
	if held.status != http.StatusOK {
		return false
	}
	l.stats.loggedIn()
	w.Header()["Set-Cookie"] = held.header["Set-Cookie"]
	return true
}

func (l *lab) serveFolder(w http.ResponseWriter, r *http.Request, next http.Handler) {
	meter := &meter{ResponseWriter: w, plan: bodyPlan{cutAfter: -1}, lab: l, request: r}
	defer func() { l.stats.http(r.URL.Path, meter.sent) }()
	if wait := l.faults.latency(); wait > 0 {
		meter.pause(wait)
	}
	if !l.authorised(meter, r, next) {
		w.Header().Set("WWW-Authenticate", `Basic realm="VMware HTTP server"`)
		http.Error(meter, "401 Unauthorized", http.StatusUnauthorized)
		return
	}
	file, status := l.resolve(r)
	owner, locked := l.holder(file)
	reads := r.Method == http.MethodGet || r.Method == http.MethodHead
	meter.disk = isExtent(file) && r.Method == http.MethodGet
	refused := l.faults.onFolder(r)
	if refused == 0 {
		refused = l.faults.onSeveralRanges(r)
	}
	switch {
	case refused != 0:
		http.Error(meter, http.StatusText(refused), refused)
	case status == http.StatusBadRequest:
		http.Error(meter, "400 Bad Request", status)
	case !reads:
		next.ServeHTTP(meter, r)
	case status != http.StatusOK:
		http.Error(meter, "404 Not Found", status)
	case locked:
		meter.WriteHeader(http.StatusInternalServerError) // bare, as a host answers
	default:
		l.sendFile(meter, r, file, owner)
	}
}

// resolve finds the file a request names.
func (l *lab) resolve(r *http.Request) (string, int) {
	rel := strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, "/folder"), "/")
	for _, part := range strings.Split(rel, "/") {
		if part == ".." {
			return "", http.StatusBadRequest
		}
	}
	dcPath, name := r.URL.Query().Get("dcPath"), r.URL.Query().Get("dsName")
	ds := l.findDatastore(dcPath, name)
	if ds == nil && dcPath == "" && atHost(r) {
		ds = l.lonelyNamed(name)
	}
	if ds == nil {
		return "", http.StatusNotFound
	}
	file := filepath.Join(ds.dir, rel)
	if info, err := os.Stat(file); err != nil || info.IsDir() {
		return file, http.StatusNotFound
	}
	return file, http.StatusOK
}

// findDatastore takes the datacenter's path as stored; where there is one datacenter it may be left out, as may the
// name of a lone datastore.
func (l *lab) findDatastore(dcPath, name string) *datastore {
	dcPath = strings.Trim(dcPath, "/")
	for _, dc := range l.datacenters {
		if dc.path != dcPath && (dcPath != "" || len(l.datacenters) > 1) {
			continue
		}
		for _, ds := range dc.datastores {
			if ds.name == name || name == "" && len(dc.datastores) == 1 {
				return ds
			}
		}
	}
	return nil
}

// lonelyNamed is the one datastore of that name in all datacenters, nil where there are several or none.
func (l *lab) lonelyNamed(name string) (found *datastore) {
	for _, dc := range l.datacenters {
		if ds := dc.datastores[name]; ds != nil {
			if found != nil {
				return nil
			}
			found = ds
		}
	}
	return found
}

func (l *lab) sendFile(w *meter, r *http.Request, file string, owner *machine) {
	f, err := os.Open(file)
	if err != nil {
		http.Error(w, "404 Not Found", http.StatusNotFound)
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	if w.disk {
		host := "datastore"
		if owner != nil {
			host = owner.hostName()
		}
		defer l.stats.transfer(host)()
	}
	if l.scenario.HostIgnoresRange {
		r.Header.Del("Range")
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", info.ModTime(), f)
}

// meter is a reply that counts its body and makes it suffer its plan.
type meter struct {
	http.ResponseWriter
	lab     *lab
	request *http.Request
	plan    bodyPlan
	disk    bool  // a GET of disk data
	length  int64 // of the body, where the header does not say
	sent    int64
	status  int
	stalled bool
}

const meterChunk = 256 << 10

// ReadFrom is what net/http copies with: larger pieces than its own.
func (m *meter) ReadFrom(r io.Reader) (n int64, err error) {
	buf := make([]byte, meterChunk)
	for {
		k, err := r.Read(buf)
		if k > 0 {
			if _, werr := m.Write(buf[:k]); werr != nil {
				return n, werr
			}
			n += int64(k)
		}
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

func (m *meter) WriteHeader(status int) {
	m.status = status
	if m.carriesDisk() {
		length, err := strconv.ParseInt(m.Header().Get("Content-Length"), 10, 64)
		if err != nil {
			length = m.length
		}
		m.plan = m.lab.faults.onBody(length)
	}
	m.ResponseWriter.WriteHeader(status)
}

func (m *meter) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		part := p
		if m.plan.throttle > 0 { // twenty steps a second
			part = part[:min(int64(len(part)), max(m.plan.throttle/20, 1))]
		}
		if m.plan.cutAfter >= 0 {
			part = part[:min(int64(len(part)), m.plan.cutAfter-m.sent)]
		}
		if m.plan.stallS > 0 && !m.stalled {
			part = part[:min(len(part), stallAfter)]
		}
		k, err := m.ResponseWriter.Write(part)
		m.count(int64(k))
		n, p = n+k, p[k:]
		if err != nil {
			return n, err
		}
		m.suffer(int64(k))
	}
	return n, nil
}

func (m *meter) carriesDisk() bool {
	return m.disk && (m.status == http.StatusOK || m.status == http.StatusPartialContent)
}

func (m *meter) count(n int64) {
	m.sent += n
	if m.carriesDisk() {
		m.lab.stats.diskBytes(n)
	}
}

// suffer cuts, stalls or slows after n more bytes.
func (m *meter) suffer(n int64) {
	if m.plan.cutAfter >= 0 && m.sent >= m.plan.cutAfter {
		_ = http.NewResponseController(m.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	if m.plan.stallS > 0 && !m.stalled {
		m.stalled = true
		_ = http.NewResponseController(m.ResponseWriter).Flush()
		m.pause(time.Duration(m.plan.stallS * float64(time.Second)))
	}
	if m.plan.throttle > 0 {
		_ = http.NewResponseController(m.ResponseWriter).Flush()
		m.pause(time.Duration(float64(n) / float64(m.plan.throttle) * float64(time.Second)))
	}
}

// pause waits, unless the client goes or the lab ends.
func (m *meter) pause(d time.Duration) {
	select {
	case <-time.After(d):
	case <-m.request.Context().Done():
	case <-m.lab.stopped:
	}
}
