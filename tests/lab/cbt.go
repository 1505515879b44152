// Changed block tracking: which blocks of a disk were written between two points, told by changeIds.
//
// Tracking begins at the next snapshot after changeTrackingEnabled was set. Each snapshot is a point, and its disks'
// backings have the changeId `<uuid>/<number>` of it; the live backing has that of the last point. A disk whose tracking
// was reset has a new uuid, and knows no changeId from before.
package main

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

const (
	cbtBlock = 64 << 10
	cbtPage  = 2000 // areas in one answer
)

// tracking is the memory of one disk.
type tracking struct {
	uuid   string
	epochs []map[int64]bool // epochs[n]: numbers of the blocks written after point n+1 and before the next
}

func newTracking() *tracking {
	return &tracking{uuid: cbtUUID(), epochs: []map[int64]bool{{}}}
}

// cbtUUID is drawn in the spelling of changeIds: 52 aa bb cc dd ee ff 00-11 22 33 44 55 66 77 88.
func cbtUUID() string {
	b := randomBytes(rand.Uint64(), 16)
	b[0] = 0x52
	return fmt.Sprintf("% x-% x", b[:8], b[8:])
}

func (t *tracking) id() string { return fmt.Sprintf("%s/%d", t.uuid, len(t.epochs)) }

func (t *tracking) mark(off, n int64) {
	for b := off / cbtBlock; b*cbtBlock < off+n; b++ {
		t.epochs[len(t.epochs)-1][b] = true
	}
}

// markSide notes what a snapshot's own delta holds (vss.go): a difference to the points before it, and to those after.
func (t *tracking) markSide(off, n int64) {
	if t == nil {
		return
	}
	t.mark(off, n)
	if last := len(t.epochs) - 1; last > 0 {
		for b := off / cbtBlock; b*cbtBlock < off+n; b++ {
			t.epochs[last-1][b] = true
		}
	}
}

// since lists, in order, the blocks written between the points of two changeIds. Another tracking's, one of the future,
// or a first one after the second is unknown.
func (t *tracking) since(from, to string) ([]int64, bool) {
	first, ok1 := t.point(from)
	last, ok2 := t.point(to)
	if !ok1 || !ok2 || first > last {
		return nil, false
	}
	found := map[int64]bool{}
	for _, epoch := range t.epochs[first-1 : last-1] {
		maps.Copy(found, epoch)
	}
	return slices.Sorted(maps.Keys(found)), true
}

func (t *tracking) point(id string) (int, bool) {
	uuid, number, _ := strings.Cut(id, "/")
	n, err := strconv.Atoi(number)
	return n, err == nil && uuid == t.uuid && 1 <= n && n <= len(t.epochs)
}

// revert goes back to a point; one that is none of its own, and it begins anew.
func (t *tracking) revert(id string) {
	n, known := t.point(id)
	if !known {
		*t = *newTracking()
		return
	}
	t.epochs = append(t.epochs[:n-1], map[int64]bool{})
}

// track begins, or goes on at a new point; off, it forgets. The caller holds d.mu.
func (d *disk) track(on bool) {
	switch {
	case !on || !d.snapshotted():
		d.tracking = nil
	case d.tracking == nil:
		d.tracking = newTracking()
	default:
		d.tracking.epochs = append(d.tracking.epochs, map[int64]bool{})
	}
}

// changeID is the one of the last point, "" where nothing is tracked.
func (d *disk) changeID() string {
	if d.tracking == nil {
		return ""
	}
	return d.tracking.id()
}

// setTracking is what changeTrackingEnabled does: on, nothing until the next stun.
func (m *machine) setTracking(enabled *bool) {
	if enabled == nil {
		return
	}
	m.cbt.Store(*enabled)
	for _, d := range m.disks {
		d.mu.Lock()
		if !*enabled {
			d.tracking = nil
		}
		d.mu.Unlock()
	}
}

// tracks says whether a snapshot taken now is a point.
func (m *machine) tracks() bool { return m.cbt.Load() && !m.lab.faults.cbtTrouble().Deaf }

// resetTracking makes every disk of every VM forget what it knew.
func (l *lab) resetTracking() error {
	for _, m := range l.machines {
		for _, d := range m.disks {
			d.mu.Lock()
			if d.tracking != nil {
				d.tracking = newTracking()
			}
			d.mu.Unlock()
		}
		if fault := m.afterChange(l.newContext()); fault != nil {
			return faultError(fault)
		}
	}
	return nil
}

// QueryChangedDiskAreas answers a page of what was written between a changeId and a snapshot; for `*`, of what is
// allocated. Without a snapshot it means the present, of a VM that is off.
func (m *machine) QueryChangedDiskAreas(
	_ *simulator.Context, req *types.QueryChangedDiskAreas,
) soap.HasFault {
	body := new(methods.QueryChangedDiskAreasBody)
	info, fault := m.changedAreas(req)
	if fault != nil {
		body.Fault_ = simulator.Fault("", fault)
	} else {
		body.Res = &types.QueryChangedDiskAreasResponse{Returnval: *info}
	}
	return body
}

func (m *machine) changedAreas(req *types.QueryChangedDiskAreas) (*types.DiskChangeInfo, types.BaseMethodFault) {
	at := slices.IndexFunc(m.disks, func(d *disk) bool { return d.key == req.DeviceKey })
	if at < 0 {
		return nil, &types.InvalidArgument{InvalidProperty: "deviceKey"}
	}
	d := m.disks[at]
	if req.StartOffset < 0 || req.StartOffset >= d.capacity {
		return nil, &types.InvalidArgument{InvalidProperty: "startOffset"}
	}
	if req.Snapshot == nil && m.on.Load() {
		return nil, &types.InvalidArgument{InvalidProperty: "snapshot"}
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	layer, to := len(d.layers)-1, d.changeID()
	if req.Snapshot != nil {
		moment := d.moments[req.Snapshot.Value]
		if moment == nil || moment.view != nil {
			return nil, &types.NotFound{}
		}
		layer, to = d.index(moment.layer), moment.changeID
	}
	trouble := m.lab.faults.cbtTrouble()
	areas, fault := d.areas(req.ChangeId, to, layer, trouble)
	if fault != nil {
		return nil, fault
	}
	return d.page(spoiled(areas, d.capacity, trouble), req.StartOffset, trouble), nil
}

// areas lists what is to be told, whole.
func (d *disk) areas(from, to string, layer int, trouble cbtTrouble) ([]types.DiskChangeExtent, types.BaseMethodFault) {
	fault := &types.FileFault{File: d.datastorePath(d.base + ".vmdk")}
	if to == "" {
		return nil, fault
	}
	if from == "*" {
		switch d.star(trouble) {
		case "fail":
			return nil, fault
		case "whole":
			return []types.DiskChangeExtent{{Start: 0, Length: d.capacity}}, nil
		}
		return d.extents(d.allocated(layer)), nil
	}
	if _, number, ok := strings.Cut(from, "/"); !ok || strings.TrimLeft(number, "0123456789") != "" || number == "" {
		return nil, &types.InvalidArgument{InvalidProperty: "changeId"}
	}
	blocks, known := d.tracking.since(from, to)
	if !known {
		return nil, fault
	}
	return d.extents(blocks), nil
}

// star is how the datastore answers `*`: VMFS with what is allocated, NFS not at all, vSAN with the whole disk.
func (d *disk) star(trouble cbtTrouble) string {
	if trouble.Star != "" {
		return trouble.Star
	}
	switch strings.ToLower(d.ds.kind) {
	case "nfs":
		return "fail"
	case "vsan":
		return "whole"
	}
	return "allocated"
}

// allocated lists the blocks that layer and those below it hold anything of.
func (d *disk) allocated(layer int) []int64 {
	found := map[int64]bool{}
	for _, l := range d.layers[:layer+1] {
		for off := int64(0); ; {
			start, n, ok := l.store.next(off)
			if !ok {
				break
			}
			for b := start / cbtBlock; b*cbtBlock < start+n; b++ {
				found[b] = true
			}
			off = start + n
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// extents joins blocks that touch; the last one ends with the disk.
func (d *disk) extents(blocks []int64) []types.DiskChangeExtent {
	var out []types.DiskChangeExtent
	for _, b := range blocks {
		start, end := b*cbtBlock, min((b+1)*cbtBlock, d.capacity)
		if n := len(out); n > 0 && out[n-1].Start+out[n-1].Length == start {
			out[n-1].Length = end - out[n-1].Start
		} else {
			out = append(out, types.DiskChangeExtent{Start: start, Length: end - start})
		}
	}
	return out
}

// page is the part of areas from start on that fits into an answer, and how far it speaks for.
func (d *disk) page(areas []types.DiskChangeExtent, start int64, trouble cbtTrouble) *types.DiskChangeInfo {
	most := cbtPage
	if trouble.Page > 0 {
		most = trouble.Page
	}
	info := &types.DiskChangeInfo{StartOffset: start, Length: d.capacity - start}
	for _, area := range areas {
		if area.Start+area.Length <= start {
			continue
		}
		if len(info.ChangedArea) == most {
			info.Length = area.Start - start
			break
		}
		if area.Start < start {
			area.Length, area.Start = area.Start+area.Length-start, start
		}
		info.ChangedArea = append(info.ChangedArea, area)
	}
	return info
}

// cbtTrouble is how answers are spoiled; see faults.go.
type cbtTrouble struct {
	Page     int    `json:"page"`
	Star     string `json:"star"`
	TooLarge bool   `json:"too_large"`
	Wrong    string `json:"wrong"`
	Deaf     bool   `json:"deaf"`
}

// check refuses words that nothing is played for.
func (c *cbtTrouble) check() error {
	if c != nil && !slices.Contains([]string{"", "allocated", "whole", "fail"}, c.Star) {
		return fmt.Errorf("cbt: star: no answer %q here", c.Star)
	}
	if c != nil && !slices.Contains([]string{"", "beyond", "overlapping", "silent"}, c.Wrong) {
		return fmt.Errorf("cbt: wrong: no answer %q here", c.Wrong)
	}
	return nil
}

const cbtExtra = 1 << 20 // bytes too many on either side

// spoiled plays the answers of a host that is wrong.
func spoiled(areas []types.DiskChangeExtent, capacity int64, trouble cbtTrouble) []types.DiskChangeExtent {
	if trouble.TooLarge {
		areas = widened(areas, capacity)
	}
	switch trouble.Wrong {
	case "silent":
		return nil
	case "beyond":
		return append(areas, types.DiskChangeExtent{Start: capacity - min(capacity, cbtBlock), Length: 2 * cbtBlock})
	case "overlapping":
		if len(areas) > 0 {
			return slices.Insert(slices.Clone(areas), 1, areas[0])
		}
	}
	return areas
}

// widened adds what did not change around each area, and joins what then touches.
func widened(areas []types.DiskChangeExtent, capacity int64) []types.DiskChangeExtent {
	var out []types.DiskChangeExtent
	for _, area := range areas {
		start, end := max(area.Start-cbtExtra, 0), min(area.Start+area.Length+cbtExtra, capacity)
		if n := len(out); n > 0 && out[n-1].Start+out[n-1].Length >= start {
			out[n-1].Length = end - out[n-1].Start
		} else {
			out = append(out, types.DiskChangeExtent{Start: start, Length: end - start})
		}
	}
	return out
}
