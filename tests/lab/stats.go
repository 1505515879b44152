// Counters for `/stats`.
package main

import (
	"sync"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

type stats struct {
	mu            sync.Mutex
	soapCalls     map[string]int64
	soapTotal     int64
	logins        int64
	loginAttempts int64
	requests      map[string]int64
	bytes         map[string]int64
	served        int64            // disk bytes by any road
	open          map[string]int64 // transfers now, by host
	peak          map[string]int64
	prepared      map[string]bool // VDDK: VM and identity, between PrepareForAccess and EndAccess
	preparedPeak  int
	leases        int64 // NFC leases that are held
	leasesPeak    int64
	leaseEnds     map[string]int64 // completed, aborted, failed

	ticketsIssued, ticketsUsed, ticketsRefused int64
}

func newStats() *stats {
	s := &stats{open: map[string]int64{}, prepared: map[string]bool{}}
	s.reset()
	return s
}

// reset zeroes the counters; transfers under way are the new peak.
func (s *stats) reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.soapCalls, s.requests, s.bytes = map[string]int64{}, map[string]int64{}, map[string]int64{}
	s.soapTotal, s.logins, s.loginAttempts, s.served = 0, 0, 0, 0
	s.ticketsIssued, s.ticketsUsed, s.ticketsRefused = 0, 0, 0
	s.leasesPeak, s.leaseEnds = s.leases, map[string]int64{}
	s.peak, s.preparedPeak = map[string]int64{}, len(s.prepared)
	for host, n := range s.open {
		if n > 0 {
			s.peak[host] = n
		}
	}
}

func (s *stats) soap(method string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.soapCalls[method]++
	s.soapTotal++
	switch method {
	case "Login", "LoginByToken", "LoginExtensionByCertificate":
		s.loginAttempts++
	}
}

func (s *stats) loggedIn() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.logins++
}

func (s *stats) http(path string, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests[path]++
	s.bytes[path] += n
}

// ticket adds one to a ticket counter.
func (s *stats) ticket(counter *int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	*counter++
}

// access notes that a VM is prepared for VDDK's access under an identity, or not any more.
func (s *stats) access(who string, on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if delete(s.prepared, who); on {
		s.prepared[who] = true
		s.preparedPeak = max(s.preparedPeak, len(s.prepared))
	}
}

// lease counts one more, or one less, that is held.
func (s *stats) lease(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leases += n
	s.leasesPeak = max(s.leasesPeak, s.leases)
}

func (s *stats) leaseEnded(how string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leaseEnds[how]++
}

func (s *stats) diskBytes(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.served += n
}

// transfer notes a transfer from host; the returned function ends it.
func (s *stats) transfer(host string) func() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open[host]++
	s.peak[host] = max(s.peak[host], s.open[host])
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.open[host]--
	}
}

// report is the body of `/stats`.
func (l *lab) report() map[string]any {
	sessions, snapshots := len(l.sessions()), len(l.ctx.Map.AllReference("VirtualMachineSnapshot"))
	s := l.stats
	s.mu.Lock()
	defer s.mu.Unlock()
	return map[string]any{
		"soap_calls": copyMap(s.soapCalls), "soap_total": s.soapTotal,
		"logins": s.logins, "login_attempts": s.loginAttempts,
		"http_requests": copyMap(s.requests), "http_bytes": copyMap(s.bytes),
		"live_sessions": sessions, "open_snapshots": snapshots,
		"bytes_served": s.served, "peak_transfers": copyMap(s.peak),
		"vddk_prepared": len(s.prepared), "vddk_prepared_peak": s.preparedPeak,
		"leases_open": s.leases, "leases_peak": s.leasesPeak, "lease_ends": copyMap(s.leaseEnds),
		"tickets_issued": s.ticketsIssued, "tickets_used": s.ticketsUsed, "tickets_refused": s.ticketsRefused,
	}
}

func copyMap(m map[string]int64) map[string]int64 {
	out := make(map[string]int64, len(m))
	for k, v := range m {
		out[k] = v
	}
	return out
}

// sessions lists the sessions logged in and neither logged out nor expired.
func (l *lab) sessions() []types.UserSession {
	view := l.ctx.Session.Get(l.ctx.Map.SessionManager().Self).(*simulator.SessionManager)
	return view.SessionList
}
