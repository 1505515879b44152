// Service tickets (AcquireGenericServiceTicket), and the ESXi hosts' own HTTPS port where they are spent.
//
// A ticket is good for the one request it was asked for, once, while the session that asked for it lives. The port has
// a certificate of its own, which the vCenter's CA did not sign: who goes there has the ticket's thumbprint to go by.
// One port plays all hosts. It knows no vCenter session, and datastores without their datacenter.
package main

import (
	"context"
	"crypto/tls"
	"encoding/xml"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
)

const ticketCookie = "vmware_cgi_ticket"

// ticket is what an unspent ticket is good for.
type ticket struct {
	session string // key of the session that asked for it
	request string // path and query
	method  string // as in the API: httpGet, …; empty for any
}

// ticketSpec is the part of AcquireGenericServiceTicket that counts.
type ticketSpec struct {
	Method string `xml:"Body>AcquireGenericServiceTicket>spec>method"`
	URL    string `xml:"Body>AcquireGenericServiceTicket>spec>url"`
}

var ticketReply = regexp.MustCompile(`(<AcquireGenericServiceTicketResponse[^>]*>.*?<id>)([^<]+)(</id>)(?:<hostName>[^<]*</hostName>)?`)

// issueTicket notes the ticket that a reply holds, and puts in where it can be spent. Other replies stay as they are.
func (l *lab) issueTicket(session string, request, reply []byte) []byte {
	found := ticketReply.FindSubmatch(reply[:min(len(reply), 1024)])
	if found == nil {
		return reply
	}
	t := ticket{session: session}
	var spec ticketSpec
	if xml.Unmarshal(request, &spec) == nil {
		if u, err := url.Parse(spec.URL); err == nil {
			t.request, t.method = u.RequestURI(), spec.Method
		}
	}
	l.tickets.Store(string(found[2]), t)
	l.stats.ticket(&l.stats.ticketsIssued)
	return ticketReply.ReplaceAll(reply, []byte("${1}${2}${3}"+l.whereToSpend()))
}

// whereToSpend is the part of a ticket that names the host, and its certificate.
func (l *lab) whereToSpend() string {
	host, thumbprint := l.server.Listener.Addr().String(), l.certs.sha1
	if l.hosts != nil {
		host, thumbprint = l.hosts.address, l.hosts.certs.sha1
	}
	switch l.faults.atHosts() {
	case "down":
		host = "127.0.0.1:1"
	case "strange":
		thumbprint = l.certs.sha1
	case "unnamed":
		return "<hostName>" + host + "</hostName>"
	}
	return "<hostName>" + host + "</hostName><sslThumbprint>" + thumbprint + "</sslThumbprint>"
}

// spendTicket says whether a ticket opens this request. A request that is not the ticket's own leaves it unspent.
func (l *lab) spendTicket(id string, r *http.Request) bool {
	known, ok := l.tickets.Load(id)
	if ok {
		t := known.(ticket)
		ok = t.request == r.URL.RequestURI() && (t.method == "" || strings.EqualFold(t.method, "http"+r.Method)) &&
			l.liveSession(t.session)
	}
	if ok {
		_, ok = l.tickets.LoadAndDelete(id) // of two at once, one
	}
	if ok {
		l.stats.ticket(&l.stats.ticketsUsed)
	} else {
		l.stats.ticket(&l.stats.ticketsRefused)
	}
	return ok
}

// hostPort is the HTTPS port of the ESXi hosts below the vCenter.
type hostPort struct {
	server  *http.Server
	address string
	certs   *certificates
}

type atHostKey struct{}

// atHost tells requests that came in by the hosts' port.
func atHost(r *http.Request) bool { return r.Context().Value(atHostKey{}) != nil }

// serveHosts opens the hosts' port on the given name or address; vCenter is the handler of its port.
func (l *lab) serveHosts(host string, vCenter http.Handler) error {
	certs, err := newCertificates(host)
	if err != nil {
		return err
	}
	listener, err := tls.Listen("tcp", net.JoinHostPort(host, "0"),
		&tls.Config{Certificates: []tls.Certificate{certs.leaf}})
	if err != nil {
		return err
	}
	onlyFiles := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, "/folder/") && !strings.HasPrefix(r.URL.Path, nfcPrefix) {
			http.NotFound(w, r)
			return
		}
		vCenter.ServeHTTP(w, r)
	})
	l.hosts = &hostPort{
		server: &http.Server{Handler: onlyFiles, BaseContext: func(net.Listener) context.Context {
			return context.WithValue(context.Background(), atHostKey{}, true)
		}},
		address: listener.Addr().String(), certs: certs,
	}
	go func() { _ = l.hosts.server.Serve(listener) }()
	return nil
}
