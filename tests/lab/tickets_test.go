package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/vmware/govmomi/cli"
	_ "github.com/vmware/govmomi/cli/datastore"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

const (
	anyMethod = ""
	vmx       = "/folder/demo/demo.vmx?dsName=datastore1"
)

// ticket asks for one; the host in its URL is one that nobody reaches.
func (c *client) ticket(method, request string) *types.SessionManagerGenericServiceTicket {
	c.t.Helper()
	t, err := session.NewManager(c.vc.Client).AcquireGenericServiceTicket(context.Background(),
		&types.SessionManagerHttpServiceRequestSpec{Method: method, Url: "https://192.0.2.1" + request})
	if err != nil {
		c.t.Fatal(err)
	}
	return t
}

// spend takes a ticket to its host, along with the vCenter's session cookie, and holds the certificate to it.
func (c *client) spend(t *types.SessionManagerGenericServiceTicket, method, request string) (int, string) {
	c.t.Helper()
	req, _ := http.NewRequest(method, "https://"+t.HostName+request, nil)
	req.AddCookie(&http.Cookie{Name: ticketCookie, Value: t.Id})
	for _, k := range c.vc.Client.Client.Jar.Cookies(c.vc.URL()) {
		req.AddCookie(k)
	}
	anybody := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	defer anybody.CloseIdleConnections()
	res, err := anybody.Do(req)
	if err != nil {
		c.t.Fatal(err)
	}
	defer res.Body.Close()
	if served := soap.ThumbprintSHA1(res.TLS.PeerCertificates[0]); served != t.SslThumbprint {
		c.t.Errorf("%s shows %s, its ticket says %q", t.HostName, served, t.SslThumbprint)
	}
	b, _ := io.ReadAll(res.Body)
	return res.StatusCode, string(b)
}

func (c *client) wantSpent(want int, t *types.SessionManagerGenericServiceTicket, method, request string) {
	c.t.Helper()
	if status, _ := c.spend(t, method, request); status != want {
		c.t.Errorf("%s %s: %d, want %d", method, request, status, want)
	}
}

// wantTickets holds /stats to the counts of tickets issued, used and refused.
func (c *client) wantTickets(issued, used, refused int) {
	c.t.Helper()
	res, err := http.Get(c.lab.adminURL + "/stats")
	if err != nil {
		c.t.Fatal(err)
	}
	defer res.Body.Close()
	var s struct {
		Issued  int `json:"tickets_issued"`
		Used    int `json:"tickets_used"`
		Refused int `json:"tickets_refused"`
	}
	if err = json.NewDecoder(res.Body).Decode(&s); err != nil {
		c.t.Fatal(err)
	}
	if s.Issued != issued || s.Used != used || s.Refused != refused {
		c.t.Errorf("tickets: %+v, want %d issued, %d used, %d refused", s, issued, used, refused)
	}
}

func TestTicketUsedTwiceIsRefused(t *testing.T) {
	c := startLab(t)
	ticket := c.ticket("httpGet", vmx)
	if status, body := c.spend(ticket, http.MethodGet, vmx); status != http.StatusOK || !strings.Contains(body, "displayName") {
		t.Errorf("first use: %d %q", status, body)
	}
	c.wantSpent(http.StatusUnauthorized, ticket, http.MethodGet, vmx)
	c.wantTickets(1, 1, 1)
}

func TestTicketUsedTwiceAtOnceOpensOnce(t *testing.T) {
	c := startLab(t)
	ticket := c.ticket("httpGet", vmx)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() { c.spend(ticket, http.MethodGet, vmx) })
	}
	all.Wait()
	c.wantTickets(1, 1, 7)
}

func TestTicketOpensNoOtherRequest(t *testing.T) {
	c := startLab(t)
	ticket := c.ticket("httpGet", vmx)
	for _, other := range []string{"/folder/demo/demo.vmdk?dsName=datastore1", vmx + "&dcPath=DC", "/folder/demo/demo.vmx"} {
		c.wantSpent(http.StatusUnauthorized, ticket, http.MethodGet, other)
	}
	c.wantSpent(http.StatusUnauthorized, ticket, http.MethodHead, vmx)
	c.wantSpent(http.StatusOK, ticket, http.MethodGet, vmx)
	c.wantSpent(http.StatusOK, c.ticket(anyMethod, vmx), http.MethodHead, vmx)
	c.wantTickets(2, 2, 4)
}

func TestTicketOfAnExpiredSessionIsRefused(t *testing.T) {
	c := startLab(t)
	ticket := c.ticket("httpGet", vmx)
	c.admin("/faults", `{"expire_sessions": true}`)
	c.wantSpent(http.StatusUnauthorized, ticket, http.MethodGet, vmx)
	c.wantTickets(1, 0, 1)
}

func TestTicketDecidesAtTheVCenterAndIsNeededAtTheHost(t *testing.T) {
	c := startLab(t)
	forged := &types.SessionManagerGenericServiceTicket{Id: "forged", HostName: c.lab.server.Listener.Addr().String(),
		SslThumbprint: c.lab.certs.sha1}
	c.wantSpent(http.StatusUnauthorized, forged, http.MethodGet, vmx)
	c.wantStatus(http.StatusOK, "demo.vmx", "", true) // the session's cookie alone, as ever

	req, _ := http.NewRequest(http.MethodGet, "https://"+c.lab.hosts.address+vmx, nil)
	for _, k := range c.vc.Client.Client.Jar.Cookies(c.vc.URL()) {
		req.AddCookie(k)
	}
	res, err := c.vc.Client.Client.Client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusUnauthorized {
		t.Errorf("a host takes the vCenter's session: %d", res.StatusCode)
	}
}

func TestTicketAtTheHostNeedsNoDatacenter(t *testing.T) {
	file := filepath.Join(t.TempDir(), "scenario.json")
	if err := os.WriteFile(file, []byte(`{"datacenters": [
		{"name": "A", "standalone_hosts": ["a"], "datastores": [{"name": "both"}, {"name": "one"}],
			"vms": [{"name": "v", "datastore": "one"}]},
		{"name": "B", "standalone_hosts": ["b"], "datastores": [{"name": "both"}], "vms": [{"name": "w"}]}]}`),
		0o600); err != nil {
		t.Fatal(err)
	}
	c := startLab(t, "-scenario", file)
	for request, want := range map[string]int{
		"/folder/v/v.vmx?dsName=one":           http.StatusOK,
		"/folder/w/w.vmx?dsName=both":          http.StatusNotFound, // which one, the lab's one port cannot tell
		"/folder/w/w.vmx?dcPath=B&dsName=both": http.StatusOK,
	} {
		c.wantSpent(want, c.ticket("httpGet", request), http.MethodGet, request)
	}
}

// spendAgain repeats each request at the hosts' port before its sender has the reply, and so while the session lives;
// it notes what was asked for and the status of either.
func (c *client) spendAgain(seen *[]string) {
	next := c.lab.hosts.server.Handler
	c.lab.hosts.server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		first, second := httptest.NewRecorder(), httptest.NewRecorder()
		next.ServeHTTP(first, r)
		next.ServeHTTP(second, r)
		*seen = append(*seen, fmt.Sprint(r.URL.RequestURI(), " ", first.Code, " ", second.Code))
		w.WriteHeader(first.Code)
		_, _ = w.Write(first.Body.Bytes())
	})
}

func TestTicketOfGovcDownloadsOnce(t *testing.T) {
	c := startLab(t)
	if _, err := c.snapshot(false); err != nil { // the base can be read now
		t.Fatal(err)
	}
	var seen []string
	c.spendAgain(&seen)
	dir := t.TempDir()
	ca, file := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "disk")
	if err := os.WriteFile(ca, []byte(c.lab.certs.caPEM), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{
		"GOVC_URL": c.lab.ready().URL, "GOVC_USERNAME": c.lab.opts.username, "GOVC_PASSWORD": c.lab.opts.password,
		"GOVC_TLS_CA_CERTS": ca, "GOVC_INSECURE": "0", "GOVC_PERSIST_SESSION": "0",
		"GOVMOMI_USE_SERVICE_TICKET": "1", "GOVMOMI_USE_SERVICE_TICKET_HOSTNAME": "1",
	} {
		t.Setenv(name, value)
	}
	if status := cli.Run([]string{"datastore.download", "-ds", "datastore1", "demo/demo-flat.vmdk", file}); status != 0 {
		t.Fatalf("govc ends with %d", status)
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if want := c.wantStatus(http.StatusOK, "demo-flat.vmdk", "", true); string(got) != string(want) || len(got) != 2<<20 {
		t.Errorf("govc gets %d other bytes", len(got))
	}
	if fmt.Sprint(seen) != "[/folder/demo/demo-flat.vmdk?dsName=datastore1 200 401]" {
		t.Errorf("at the host: %v", seen)
	}
	c.wantTickets(1, 1, 1)
}
