// Faults for `POST /faults`. One body may hold any of these; counts default to 1, 0 or less means "until cleared":
//
//	{"expire_sessions": true}              every live session is dead at once; a new login works
//	{"expire_forever": true}               that, and every later login answers InvalidLogin
//	{"folder_503": 3}                      the next 3 /folder replies are 503
//	{"cut_after": 65536, "count": 2}       the next 2 GET replies with more disk data than that are cut there
//	{"stall_s": 5, "count": 1}             the next GET reply with more than 4096 bytes of disk data hangs after these
//	{"folder_latency_s": 0.02}             every /folder reply begins that much later; 0 ends it
//	{"several_ranges": "first"}            until cleared, what /folder makes of a GET of several ranges: first (only that
//	                                       one), whole (200 and the file), refused (416), broken (500), joined (one part)
//	{"throttle_bytes_per_s": 1048576}      each body with disk data is served at that pace; 0 ends it
//	{"fail_method": {"method": "CreateSnapshot_Task", "fault": "InsufficientResourcesFault", "count": 1,
//	                 "in_task": true, "message": "…", "detail": {…}}}
//	                                       the call fails, or with in_task (the methods in taskMethods) its task;
//	                                       detail: fields of the fault, named as in the vSphere API
//	{"delay_method": {"method": "RemoveSnapshot_Task", "seconds": 3, "count": 1}}
//	                                       the next such calls are answered that much later
//	{"task_takes": {"method": "RemoveSnapshot_Task", "seconds": 5, "count": 1}}
//	                                       the next such task (of taskMethods) runs that long before it does its work
//	{"list_as": {"vmware.log": "gone.log"}}
//	                                       the datastore browser lists a file under another name than it has
//	{"merge_fails": 1}                     the next snapshot removal leaves its deltas: consolidationNeeded
//	{"refuse_privilege": "Datastore.Browse"}   calls that need it answer NoPermission, /folder 403; see privileges
//	{"hosts": "down"}                      until cleared, the ESXi hosts' own port: down: tickets name one where nobody
//	                                       listens; strange: it shows another certificate than tickets name; unnamed:
//	                                       tickets name none; busy: it answers 503
//	{"cbt": {"page": 5, "star": "whole", "too_large": true, "wrong": "beyond", "deaf": true}}
//	                                       until cleared, QueryChangedDiskAreas: areas in an answer; how it takes "*"
//	                                       (allocated, whole, fail); areas that did not change among the others; areas
//	                                       beyond the disk's end, or overlapping ones; snapshots that begin no tracking
//	{"reset_cbt": true}                    every tracked disk forgets, and has changeIds of a new uuid from now on
//	{"lease_lie": "order", "count": 1}     the next stream of a leased disk is not what it says: see streamvmdk.go
//	{"fail_leases": "Timedout"}            every lease that is held is in its error state at once, with that fault
//	{"clear": true}                        ends all of these first
package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

type faultRequest struct {
	Clear           bool         `json:"clear"`
	ExpireSessions  bool         `json:"expire_sessions"`
	ExpireForever   bool         `json:"expire_forever"`
	Folder503       *int         `json:"folder_503"`
	CutAfter        *int64       `json:"cut_after"`
	StallS          *float64     `json:"stall_s"`
	Count           *int         `json:"count"`
	MergeFails      *int         `json:"merge_fails"`
	Throttle        *int64       `json:"throttle_bytes_per_s"`
	Latency         *float64     `json:"folder_latency_s"`
	FailMethod      *failMethod  `json:"fail_method"`
	DelayMethod     *delayMethod `json:"delay_method"`
	TaskTakes       *delayMethod `json:"task_takes"`
	RefusePrivilege string       `json:"refuse_privilege"`
	Hosts           string       `json:"hosts"`
	SeveralRanges   string       `json:"several_ranges"`
	CBT             *cbtTrouble  `json:"cbt"`
	ResetCBT        bool         `json:"reset_cbt"`
	LeaseLie        string       `json:"lease_lie"`
	FailLeases      string       `json:"fail_leases"`

	ListAs map[string]string `json:"list_as"`
}

type delayMethod struct {
	Method  string  `json:"method"`
	Seconds float64 `json:"seconds"`
	Count   *int    `json:"count"`
}

type failMethod struct {
	Method  string          `json:"method"`
	Fault   string          `json:"fault"`
	Count   *int            `json:"count"`
	InTask  bool            `json:"in_task"`
	Message string          `json:"message"`
	Detail  json.RawMessage `json:"detail"`
}

// taskMethods can fail in their task.
var taskMethods = []string{
	"CreateSnapshot_Task", "CreateSnapshotEx_Task", "RemoveSnapshot_Task", "RemoveAllSnapshots_Task",
	"ConsolidateVMDisks_Task", "ReconfigVM_Task", "RevertToSnapshot_Task",
}

// privileges that can be refused, with the methods that need them (vSphere Web Services API, "Required Privileges").
var privileges = map[string][]string{
	"VirtualMachine.State.CreateSnapshot":    {"CreateSnapshot_Task", "CreateSnapshotEx_Task"},
	"VirtualMachine.State.RemoveSnapshot":    {"RemoveSnapshot_Task", "RemoveAllSnapshots_Task"},
	"VirtualMachine.Config.ChangeTracking":   {"ReconfigVM_Task"},
	"VirtualMachine.Interact.PowerOff":       {"PowerOffVM_Task", "ShutdownGuest"},
	"VirtualMachine.Interact.PowerOn":        {"PowerOnVM_Task"},
	"VirtualMachine.Config.Rename":           {"Rename_Task"},
	"Datastore.Browse":                       {"SearchDatastore_Task", "SearchDatastoreSubFolders_Task"},
	"Datastore.FileManagement":               {"DeleteDatastoreFile_Task", "MoveDatastoreFile_Task"},
	"VirtualMachine.Provisioning.GetVmFiles": {},
	"VApp.Export":                            {"ExportVm", "ExportSnapshot"},
}

// folderPrivileges refuse /folder too.
var folderPrivileges = []string{"Datastore.Browse", "Datastore.FileManagement"}

// countdown is a fault that is used up.
type countdown struct {
	left    int
	forever bool
}

func newCountdown(n *int) countdown {
	if n == nil {
		return countdown{left: 1}
	}
	return countdown{left: *n, forever: *n <= 0}
}

func (c *countdown) take() bool {
	if c.forever {
		return true
	}
	if c.left <= 0 {
		return false
	}
	c.left--
	return true
}

type taskFault struct {
	countdown
	method string
	fault  types.BaseMethodFault
}

type delay struct {
	countdown
	method string
	length time.Duration
}

type faults struct {
	mu         sync.Mutex
	lab        *lab
	noLogin    bool
	folder503  countdown
	cut        countdown
	cutAfter   int64
	stall      countdown
	stallS     float64
	throttle   int64
	latencyS   float64
	merge      countdown
	delays     []*delay // of calls
	lengths    []*delay // of tasks
	refused    map[string]bool
	hosts      string
	several    string
	cbt        cbtTrouble
	lie        countdown
	lieName    string
	taskFaults []*taskFault
	listAs     map[string]string
}

func newFaults(l *lab) *faults { return &faults{lab: l, refused: map[string]bool{}} }

// set takes one request, whole or not at all.
func (f *faults) set(r faultRequest) error {
	fault, err := f.check(r)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.Clear {
		f.clear()
	}
	if r.Folder503 != nil {
		f.folder503 = countdown{left: *r.Folder503}
	}
	if r.MergeFails != nil {
		f.merge = countdown{left: *r.MergeFails}
	}
	if r.CutAfter != nil {
		f.cutAfter, f.cut = *r.CutAfter, newCountdown(r.Count)
	}
	if r.StallS != nil {
		f.stallS, f.stall = *r.StallS, newCountdown(r.Count)
	}
	if r.Throttle != nil {
		f.throttle = *r.Throttle
	}
	if r.Latency != nil {
		f.latencyS = *r.Latency
	}
	if r.ListAs != nil {
		f.listAs = r.ListAs
	}
	f.delays = appendDelay(f.delays, r.DelayMethod)
	f.lengths = appendDelay(f.lengths, r.TaskTakes)
	if r.RefusePrivilege != "" {
		f.refused[r.RefusePrivilege] = true
	}
	if r.Hosts != "" {
		f.hosts = r.Hosts
	}
	if r.SeveralRanges != "" {
		f.several = r.SeveralRanges
	}
	if r.CBT != nil {
		f.cbt = *r.CBT
	}
	if r.LeaseLie != "" {
		f.lieName, f.lie = r.LeaseLie, newCountdown(r.Count)
	}
	if r.FailMethod != nil {
		f.failMethod(*r.FailMethod, fault)
	}
	f.noLogin = f.noLogin || r.ExpireForever
	if r.ExpireForever || r.ExpireSessions {
		f.lab.expireSessions()
	}
	return nil
}

func (f *faults) clear() {
	f.noLogin, f.throttle, f.latencyS, f.hosts, f.several, f.cbt = false, 0, 0, "", "", cbtTrouble{}
	f.folder503, f.cut, f.stall, f.merge, f.lie = countdown{}, countdown{}, countdown{}, countdown{}, countdown{}
	f.refused, f.taskFaults = map[string]bool{}, nil
	f.delays, f.lengths, f.listAs = nil, nil, nil
	f.lab.model.Service.ClearFaultRules()
}

// check refuses what cannot be played, and builds the fault of fail_method.
func (f *faults) check(r faultRequest) (types.BaseMethodFault, error) {
	if _, known := privileges[r.RefusePrivilege]; !known && r.RefusePrivilege != "" {
		return nil, fmt.Errorf("refuse_privilege: no privilege %q here", r.RefusePrivilege)
	}
	if r.Hosts != "" && !slices.Contains([]string{"down", "strange", "unnamed", "busy"}, r.Hosts) {
		return nil, fmt.Errorf("hosts: no trouble %q here", r.Hosts)
	}
	if r.SeveralRanges != "" && !slices.Contains(severalRanges, r.SeveralRanges) {
		return nil, fmt.Errorf("several_ranges: no answer %q here", r.SeveralRanges)
	}
	if err := r.CBT.check(); err != nil {
		return nil, err
	}
	if err := checkLeaseLie(r.LeaseLie); err != nil {
		return nil, err
	}
	if r.TaskTakes != nil && !slices.Contains(taskMethods, r.TaskTakes.Method) {
		return nil, fmt.Errorf("task_takes: is for %v", taskMethods)
	}
	if r.FailMethod == nil {
		return nil, nil
	}
	if _, known := types.TypeFunc()(r.FailMethod.Method); !known {
		return nil, fmt.Errorf("fail_method: no method %q", r.FailMethod.Method)
	}
	if r.FailMethod.InTask && !slices.Contains(taskMethods, r.FailMethod.Method) {
		return nil, fmt.Errorf("fail_method: in_task is for %v", taskMethods)
	}
	return newFault(r.FailMethod.Fault, r.FailMethod.Detail)
}

// newFault makes the vSphere fault of that name.
func newFault(name string, detail json.RawMessage) (types.BaseMethodFault, error) {
	kind, known := types.TypeFunc()(name)
	if !known {
		return nil, fmt.Errorf("fail_method: no fault %q", name)
	}
	fault, ok := reflect.New(kind).Interface().(types.BaseMethodFault)
	if !ok {
		return nil, fmt.Errorf("fail_method: %q is not a fault", name)
	}
	if len(detail) > 0 {
		if err := json.Unmarshal(detail, fault); err != nil {
			return nil, fmt.Errorf("fail_method: detail: %w", err)
		}
	}
	fillReferences(reflect.ValueOf(fault).Elem())
	return fault, nil
}

// fillReferences gives references and states that a fault must carry a value: clients choke on empty ones.
func fillReferences(v reflect.Value) {
	for i := range v.NumField() {
		field := v.Field(i)
		if state, ok := field.Interface().(types.VirtualMachinePowerState); ok && state == "" {
			field.Set(reflect.ValueOf(types.VirtualMachinePowerStatePoweredOn))
		} else if ref, ok := field.Interface().(types.ManagedObjectReference); ok && ref.Type == "" {
			ref = types.ManagedObjectReference{Type: "VirtualMachine", Value: "vm-0"}
			if v.Type().Field(i).Name == "Task" {
				ref = types.ManagedObjectReference{Type: "Task", Value: "task-0"}
			}
			field.Set(reflect.ValueOf(ref))
		} else if field.Kind() == reflect.Struct {
			fillReferences(field)
		}
	}
}

func (f *faults) failMethod(r failMethod, fault types.BaseMethodFault) {
	count := newCountdown(r.Count)
	if r.InTask {
		f.taskFaults = append(f.taskFaults, &taskFault{countdown: count, method: r.Method, fault: fault})
		return
	}
	f.lab.model.Service.AddFaultRule(&simulator.FaultInjectionRule{
		MethodName: r.Method, ObjectType: "*", ObjectName: "*", Probability: 1, Enabled: true,
		FaultType: simulator.FaultTypeCustom, Fault: fault, Message: r.Message, MaxCount: max(count.left, 0),
	})
}

// takeTaskFault is the fault that the next task of method ends in, if any.
func (f *faults) takeTaskFault(method string) types.BaseMethodFault {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, t := range f.taskFaults {
		if t.method == method && t.take() {
			return t.fault
		}
	}
	return nil
}

func appendDelay(delays []*delay, r *delayMethod) []*delay {
	if r == nil {
		return delays
	}
	length := time.Duration(r.Seconds * float64(time.Second))
	return append(delays, &delay{newCountdown(r.Count), r.Method, length})
}

// takeDelay is how long the method is to be held up: its call, or its task.
func (f *faults) takeDelay(delays *[]*delay, method string) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, d := range *delays {
		if d.method == method && d.take() {
			return d.length
		}
	}
	return 0
}

// sleep waits, unless the lab ends.
func (l *lab) sleep(length time.Duration) {
	select {
	case <-time.After(length):
	case <-l.stopped:
	}
}

// takeLeaseLie is the lie that the next leased stream tells, "" for none.
func (f *faults) takeLeaseLie() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.lie.take() {
		return f.lieName
	}
	return ""
}

// mergeFails says whether this removal of a snapshot leaves its deltas.
func (f *faults) mergeFails() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.merge.take()
}

// onCall is the fault a SOAP call meets before the simulator sees it.
func (f *faults) onCall(method *simulator.Method) types.BaseMethodFault {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.noLogin && method.Name == "Login" {
		return &types.InvalidLogin{}
	}
	for p := range f.refused {
		if slices.Contains(privileges[p], method.Name) {
			return &types.NoPermission{Object: f.lab.guarded(method), PrivilegeId: p}
		}
	}
	return nil
}

// guarded is the object whose permissions count for a call: for a snapshot, its VM.
func (l *lab) guarded(method *simulator.Method) *types.ManagedObjectReference {
	if s, ok := l.ctx.Map.Get(method.This).(*simulator.VirtualMachineSnapshot); ok {
		return &s.Vm
	}
	return &method.This
}

// listed is a reply of the datastore browser with its files under the names that list_as gives them.
func (f *faults) listed(reply []byte) []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.listAs) == 0 || !bytes.Contains(reply, []byte("HostDatastoreBrowserSearchResults")) {
		return reply
	}
	for name, other := range f.listAs {
		reply = bytes.ReplaceAll(reply, pathElement(name), pathElement(other))
	}
	return reply
}

func pathElement(name string) []byte {
	var b bytes.Buffer
	b.WriteString("<path>")
	_ = xml.EscapeText(&b, []byte(name))
	b.WriteString("</path>")
	return b.Bytes()
}

// cbtTrouble is how answers about changed blocks are spoiled.
func (f *faults) cbtTrouble() cbtTrouble {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.cbt
}

// atHosts is what is wrong with the ESXi hosts' own port; empty for nothing.
func (f *faults) atHosts() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.hosts
}

// onFolder is the status with which a /folder request is refused, 0 for none.
func (f *faults) onFolder(r *http.Request) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range folderPrivileges {
		if f.refused[p] {
			return http.StatusForbidden
		}
	}
	if f.folder503.take() || f.hosts == "busy" && atHost(r) {
		return http.StatusServiceUnavailable
	}
	return 0
}

// latency is how long a /folder request waits for its reply.
func (f *faults) latency() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return time.Duration(f.latencyS * float64(time.Second))
}

// bodyPlan is what a body with disk data has to suffer.
type bodyPlan struct {
	cutAfter int64 // -1: not cut
	stallS   float64
	throttle int64
}

const stallAfter = 4096 // bytes of body before a stall; shorter bodies are not stalled

// onBody draws the plan for a body of that length. One too short to be cut or stalled uses neither up.
func (f *faults) onBody(length int64) bodyPlan {
	f.mu.Lock()
	defer f.mu.Unlock()
	plan := bodyPlan{cutAfter: -1, throttle: f.throttle}
	if f.cutAfter < length && f.cut.take() {
		plan.cutAfter = f.cutAfter
	}
	if stallAfter < length && f.stall.take() {
		plan.stallS = f.stallS
	}
	return plan
}

// expireSessions ends every session, as idle time would.
func (l *lab) expireSessions() {
	manager := l.ctx.Map.SessionManager()
	for _, s := range l.sessions() {
		manager.TerminateSession(l.ctx, &types.TerminateSession{This: manager.Self, SessionId: []string{s.Key}})
	}
}
