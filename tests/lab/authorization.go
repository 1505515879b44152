// What privileges the account is said to have: all, but the one that a fault refuses.
package main

import (
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// authorization wraps the simulator's, which grants everything.
type authorization struct {
	*simulator.AuthorizationManager
	lab *lab
}

// HasPrivilegeOnEntities says of each entity which of the privileges asked for are granted there.
func (a *authorization) HasPrivilegeOnEntities(req *types.HasPrivilegeOnEntities) soap.HasFault {
	f := a.lab.faults
	f.mu.Lock()
	defer f.mu.Unlock()
	var answers []types.EntityPrivilege
	for _, entity := range req.Entity {
		answer := types.EntityPrivilege{Entity: entity}
		for _, id := range req.PrivId {
			granted := types.PrivilegeAvailability{PrivId: id, IsGranted: !f.refused[id]}
			answer.PrivAvailability = append(answer.PrivAvailability, granted)
		}
		answers = append(answers, answer)
	}
	return &methods.HasPrivilegeOnEntitiesBody{Res: &types.HasPrivilegeOnEntitiesResponse{Returnval: answers}}
}
