// Paged retrieval through a view, a page at a time, as vCenter does it.
//
// The simulator collects everything before it hands out the first page: 1.4 s at 10,000 VMs, by which a client's time
// to the first line would be measured. Only this one, usual form is done here; all else is the simulator's.
package main

import (
	"slices"
	"sync"

	"github.com/google/uuid"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// pager wraps a session's PropertyCollector.
type pager struct {
	*simulator.PropertyCollector
	mu    sync.Mutex
	pages map[string]*pageSet // by token
}

// pageSet is what is still to come of one retrieval.
type pageSet struct {
	props []types.PropertySpec
	refs  []types.ManagedObjectReference
	size  int
}

// putPager gives the session its pager.
func putPager(ctx *simulator.Context, ref types.ManagedObjectReference) {
	if own, ok := ctx.Session.Get(ref).(*simulator.PropertyCollector); ok {
		ctx.Session.Registry.Put(&pager{PropertyCollector: own, pages: map[string]*pageSet{}})
	}
}

func (p *pager) RetrievePropertiesEx(ctx *simulator.Context, req *types.RetrievePropertiesEx) soap.HasFault {
	set := viewPages(ctx, req)
	if set == nil {
		return p.PropertyCollector.RetrievePropertiesEx(ctx, req)
	}
	result, fault := p.page(ctx, set)
	if fault != nil {
		return fault
	}
	return &methods.RetrievePropertiesExBody{Res: &types.RetrievePropertiesExResponse{Returnval: result}}
}

func (p *pager) ContinueRetrievePropertiesEx(
	ctx *simulator.Context, req *types.ContinueRetrievePropertiesEx,
) soap.HasFault {
	p.mu.Lock()
	set := p.pages[req.Token]
	delete(p.pages, req.Token)
	p.mu.Unlock()
	if set == nil {
		return p.PropertyCollector.ContinueRetrievePropertiesEx(ctx, req)
	}
	result, fault := p.page(ctx, set)
	if fault != nil {
		return fault
	}
	return &methods.ContinueRetrievePropertiesExBody{
		Res: &types.ContinueRetrievePropertiesExResponse{Returnval: *result},
	}
}

// page retrieves the next objects of set, and keeps what is left under a token.
func (p *pager) page(ctx *simulator.Context, set *pageSet) (*types.RetrieveResult, soap.HasFault) {
	n := min(set.size, len(set.refs))
	spec := types.PropertyFilterSpec{PropSet: set.props, ReportMissingObjectsInResults: types.NewBool(true)}
	for _, ref := range set.refs[:n] {
		spec.ObjectSet = append(spec.ObjectSet, types.ObjectSpec{Obj: ref})
	}
	body := p.PropertyCollector.RetrievePropertiesEx(ctx, &types.RetrievePropertiesEx{
		This: p.Self, SpecSet: []types.PropertyFilterSpec{spec},
	}).(*methods.RetrievePropertiesExBody)
	if body.Fault_ != nil {
		return nil, body
	}
	result := body.Res.Returnval
	if result == nil {
		result = new(types.RetrieveResult)
	}
	if set.refs = set.refs[n:]; len(set.refs) > 0 {
		result.Token = uuid.NewString()
		p.mu.Lock()
		p.pages[result.Token] = set
		p.mu.Unlock()
	}
	return result, nil
}

// viewPages recognises a request for the members of a view, more of them than a page holds.
func viewPages(ctx *simulator.Context, req *types.RetrievePropertiesEx) *pageSet {
	size := int(req.Options.MaxObjects)
	if size <= 0 || len(req.SpecSet) != 1 || len(req.SpecSet[0].ObjectSet) != 1 {
		return nil
	}
	object := req.SpecSet[0].ObjectSet[0]
	view, ok := ctx.Session.Get(object.Obj).(*simulator.ContainerView)
	if !ok || len(object.SelectSet) != 1 || object.Skip == nil || !*object.Skip || len(view.View) <= size {
		return nil
	}
	traversal, ok := object.SelectSet[0].(*types.TraversalSpec)
	if !ok || traversal.Path != "view" || len(traversal.SelectSet) > 0 {
		return nil
	}
	return &pageSet{props: req.SpecSet[0].PropSet, refs: slices.Clone(view.View), size: size}
}
