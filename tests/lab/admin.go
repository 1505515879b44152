// The admin port: plain HTTP on loopback, JSON in and out, errors as {"error": "…"} with a 4xx status.
//
//	POST /guest-write  {"vm": "vm-42", "disk": 0, "offset": 0, "length": 4096, "seed": 7}   or "zero": true
//	POST /guest-load   {"vm": "vm-42", "disk": 0, "bytes_per_s": 1048576, "seed": 7}        or "stop": true
//	     "burst_s": 1, "block": 65536: for so long each time at a rate drawn from 0 to bytes_per_s, in such blocks
//	GET  /sha256?vm=vm-42&disk=0[&snapshot=snapshot-50]    {"sha256": "…", "size": 67108864}
//	     …&offset=0&length=4096                            of that part only (a disk of 3 TiB takes an hour whole)
//	GET  /stats                                            see stats.go
//	POST /stats/reset
//	POST /faults                                           see faults.go
//
// `disk` counts from 0 in the order of the VM's device list. `/sha256` answers for a snapshot also when it is gone.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/vmware/govmomi/vim25/types"
)

type adminCall func(r *http.Request) (any, error)

func (l *lab) serveAdmin() error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	l.adminURL = "http://" + listener.Addr().String()
	l.admin = &http.Server{Handler: l.adminHandler()}
	go l.admin.Serve(listener)
	return nil
}

func (l *lab) adminHandler() http.Handler {
	routes := map[string]adminCall{
		"POST /guest-write": l.adminGuestWrite,
		"POST /guest-load":  l.adminGuestLoad,
		"GET /sha256":       l.adminSHA256,
		"GET /stats":        func(*http.Request) (any, error) { return l.report(), nil },
		"POST /stats/reset": func(*http.Request) (any, error) { l.stats.reset(); return struct{}{}, nil },
		"POST /faults":      l.adminFaults,
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		call := routes[r.Method+" "+r.URL.Path]
		if call == nil {
			answer(w, http.StatusNotFound, map[string]string{"error": r.Method + " " + r.URL.Path + ": no such call"})
			return
		}
		result, err := call(r)
		if err != nil {
			answer(w, http.StatusBadRequest, map[string]string{"error": err.Error()})
			return
		}
		answer(w, http.StatusOK, result)
	})
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body)
}

// decode reads a JSON body, refusing fields it does not know.
func decode(r *http.Request, into any) error {
	b, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		return err
	}
	return strictUnmarshal(b, into)
}

// diskOf finds a disk by its VM's moref and its number.
func (l *lab) diskOf(vm string, n int) (*machine, *disk, error) {
	m := l.machines[types.ManagedObjectReference{Type: "VirtualMachine", Value: vm}]
	if m == nil {
		return nil, nil, fmt.Errorf("no VM %q", vm)
	}
	if n < 0 || n >= len(m.disks) {
		return nil, nil, fmt.Errorf("VM %q has no disk %d", vm, n)
	}
	return m, m.disks[n], nil
}

const guestWriteLimit = 1 << 30

func (l *lab) adminGuestWrite(r *http.Request) (any, error) {
	var q struct {
		VM     string `json:"vm"`
		Disk   int    `json:"disk"`
		Offset int64  `json:"offset"`
		Length int64  `json:"length"`
		Seed   uint64 `json:"seed"`
		Zero   bool   `json:"zero"`
	}
	if err := decode(r, &q); err != nil {
		return nil, err
	}
	m, d, err := l.diskOf(q.VM, q.Disk)
	if err != nil {
		return nil, err
	}
	if q.Length < 0 || q.Length > guestWriteLimit {
		return nil, fmt.Errorf("length %d is not between 0 and %d", q.Length, int64(guestWriteLimit))
	}
	data := make([]byte, q.Length)
	if !q.Zero {
		data = randomBytes(q.Seed, q.Length)
	}
	if err = d.guestWrite(q.Offset, data); err != nil {
		return nil, err
	}
	return map[string]any{"written": q.Length, "file": d.backingName()}, m.refresh(l.newContext())
}

func (l *lab) adminSHA256(r *http.Request) (any, error) {
	q := r.URL.Query()
	n, err := strconv.Atoi(q.Get("disk"))
	if err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	_, d, err := l.diskOf(q.Get("vm"), n)
	if err != nil {
		return nil, err
	}
	var sum string
	size := d.capacity
	if q.Has("offset") || q.Has("length") {
		var off int64
		if off, err = strconv.ParseInt(q.Get("offset"), 10, 64); err == nil {
			size, err = strconv.ParseInt(q.Get("length"), 10, 64)
		}
		if err == nil {
			sum, err = d.sha256Range(q.Get("snapshot"), off, size)
		}
	} else {
		sum, err = d.sha256(q.Get("snapshot"))
	}
	if err != nil {
		return nil, err
	}
	return map[string]any{"sha256": sum, "size": size}, nil
}

func (l *lab) adminFaults(r *http.Request) (any, error) {
	var q faultRequest
	if err := decode(r, &q); err != nil {
		return nil, err
	}
	if q.FailLeases != "" {
		fault, err := newFault(q.FailLeases, nil)
		if err != nil {
			return nil, err
		}
		l.failLeases(fault)
	}
	if err := l.faults.set(q); err != nil || !q.ResetCBT {
		return struct{}{}, err
	}
	return struct{}{}, l.resetTracking()
}

// guestLoad is how a guest keeps writing: blocks at random places, at a rate, or at one drawn anew for each burst.
type guestLoad struct {
	BytesPerS int64   `json:"bytes_per_s"`
	BurstS    float64 `json:"burst_s"`
	Block     int64   `json:"block"`
	Seed      uint64  `json:"seed"`
	drawn     int64   // the rate of this burst
}

// adminGuestLoad starts or stops a guest that keeps writing, while it is powered on.
func (l *lab) adminGuestLoad(r *http.Request) (any, error) {
	var q struct {
		guestLoad
		VM   string `json:"vm"`
		Disk int    `json:"disk"`
		Stop bool   `json:"stop"`
	}
	if err := decode(r, &q); err != nil {
		return nil, err
	}
	m, d, err := l.diskOf(q.VM, q.Disk)
	if err != nil {
		return nil, err
	}
	if stop, running := l.loads.LoadAndDelete(d); running {
		stop.(func())()
	}
	if q.Stop {
		return struct{}{}, m.refresh(l.newContext())
	}
	if q.BytesPerS <= 0 || !d.hasBytes() {
		return nil, fmt.Errorf("bytes_per_s must be above 0, and the disk hold bytes")
	}
	setDefault(&q.Block, loadBlock)
	l.loads.Store(d, l.startLoad(m, d, q.guestLoad))
	return struct{}{}, nil
}

const loadBlock = 4096

const loadTick = 50 * time.Millisecond

// startLoad writes until the returned function has stopped it.
func (l *lab) startLoad(m *machine, d *disk, load guestLoad) func() {
	end, ended := make(chan struct{}), make(chan struct{})
	src := source(load.Seed, "guest-load")
	r := rand.New(src)
	tick := time.NewTicker(loadTick)
	go func() {
		defer close(ended)
		defer tick.Stop()
		block := make([]byte, min(load.Block, d.capacity))
		owed := int64(0)
		for n := 0; ; n++ {
			owed += load.perTick(n, r)
			for ; owed > 0 && m.on.Load(); owed -= int64(len(block)) {
				src.Read(block)
				off := r.Int64N((d.capacity-int64(len(block)))/sectorSize+1) * sectorSize
				if d.guestWrite(off, block) != nil {
					return
				}
			}
			owed = min(owed, 0)
			select {
			case <-tick.C:
			case <-end:
				return
			case <-l.stopped:
				return
			}
		}
	}()
	return func() { close(end); <-ended }
}

// perTick is how much is written in tick n; the rate of a burst is drawn in its first.
func (g *guestLoad) perTick(n int, r *rand.Rand) int64 {
	most := g.BytesPerS
	if g.BurstS > 0 {
		if n%max(int(g.BurstS*float64(time.Second/loadTick)), 1) == 0 {
			g.drawn = r.Int64N(g.BytesPerS + 1)
		}
		most = g.drawn
	}
	return most / int64(time.Second/loadTick)
}
