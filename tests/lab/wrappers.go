// Our overrides of the simulator's methods, as the sessions see them.
package main

import (
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// putWrapper lets the session see our object in place of the simulator's.
func (l *lab) putWrapper(ctx *simulator.Context, ref types.ManagedObjectReference) {
	l.wrapperMu.Lock()
	defer l.wrapperMu.Unlock()
	registry := ctx.Session.Registry
	if ref == l.model.ServiceContent.PropertyCollector {
		putPager(ctx, ref)
		return
	}
	if registry.Get(ref) != nil {
		return
	}
	if w := l.wrapper(ref); w != nil {
		registry.Put(w)
		l.wrappers[ref] = append(l.wrappers[ref], registry)
	}
}

// dropWrapper makes sessions forget an object that is gone.
func (l *lab) dropWrapper(ctx *simulator.Context, ref types.ManagedObjectReference) {
	l.wrapperMu.Lock()
	defer l.wrapperMu.Unlock()
	for _, registry := range l.wrappers[ref] {
		registry.Remove(ctx, ref)
	}
	delete(l.wrappers, ref)
}

// wrapper is what the session sees in place of ref: our overrides, or nil.
func (l *lab) wrapper(ref types.ManagedObjectReference) mo.Reference {
	if l.ctx.Map.Get(ref) == nil {
		return nil
	}
	switch ref.Type {
	case "AuthorizationManager":
		if m, ok := l.ctx.Map.Get(ref).(*simulator.AuthorizationManager); ok {
			return &authorization{AuthorizationManager: m, lab: l}
		}
	case "OvfManager":
		if o, ok := l.ctx.Map.Get(ref).(*simulator.OvfManager); ok {
			return &ovfManager{o, l}
		}
	case "VirtualMachine":
		if m := l.machines[ref]; m != nil {
			return m
		}
	case "VirtualMachineSnapshot":
		if s, ok := l.ctx.Map.Get(ref).(*simulator.VirtualMachineSnapshot); ok {
			if m := l.machines[s.Vm]; m != nil {
				return &snapshot{VirtualMachineSnapshot: s, m: m}
			}
		}
	}
	return nil
}
