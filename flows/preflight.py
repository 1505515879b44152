"""The `preflight` mode: everything that would stop a run, found before it. Nothing is changed anywhere."""

from __future__ import annotations

from prefect import flow
from prefect.artifacts import acreate_markdown_artifact

from blocks import VCenter
from tasks.connect import connected
from tasks.errors import PreflightRefused
from tasks.facts import Preflight
from tasks.plan import inventory_of, tags_in
from tasks.preflight import Candidate, check, kind_of
from tasks.resolve import locate
from tasks.saved import needs_of
from tasks.steps import on_vcenter, quietly
from tasks.vsphere.survey import listing_of
from tasks.wave.choose import Listed, chosen, is_pattern
from tasks.wave.jobs import job_of
from tasks.wave.models import PreflightJob
from tasks.wave.show import preflight_as_markdown


@flow(name="preflight", flow_run_name="preflight at {vcenter.host}")
async def preflight(vcenter: VCenter, options: PreflightJob) -> Preflight:
    """Find everything that would stop the runs of VMs, before one of them begins; nothing is changed anywhere.

    Of each VM: disks that no road copies, snapshots, pending consolidation, tracking, devices, Tools, privileges, the
    room here and on its datastores, whether this machine reaches its ESXi host. The report is among the *Artifacts*.
    The run fails with PreflightRefused unless every VM can be run.

    Args:
        vcenter: Where the VMs are: a saved vCenter, or a new one through Add.
        options: Which VMs, and what is to be done with them.
    """
    async with connected(vcenter):
        found = await _chosen(vcenter, options.select)
        jobs = [kind_of(job_of(options.mode, vm.path, options.output_dir, options.options)) for vm in found]
        (needs,) = await needs_of([options.options])
        candidates = [
            Candidate(moref=vm.moref, mode=options.mode, job=job, needs=needs)
            for vm, job in zip(found, jobs, strict=True)
        ]
        report = await check(vcenter, candidates)
    text = preflight_as_markdown(report)
    await quietly(acreate_markdown_artifact(text, key="preflight", description=f"Preflight at {vcenter.host}"))
    if not report.go:
        raise refusal(report)
    return report


async def _chosen(vcenter: VCenter, selectors: tuple[str, ...]) -> list[Listed]:
    """Return the VMs meant; where each is named in full, without a look at all others."""
    if any(is_pattern(each) for each in selectors):
        return chosen(selectors, await inventory_of(vcenter, tags_in(selectors)))
    morefs = dict.fromkeys([await locate(vcenter, each) for each in selectors])
    known = await on_vcenter(vcenter, listing_of, list(morefs))
    return [Listed.of(each) for each in known]


def refusal(report: Preflight) -> PreflightRefused:
    """Return the error that a preflight ends in which found something: it carries the whole report (`found`)."""
    refused = [vm.name for vm in report.vms if not vm.go]
    words = ", ".join(refused[:10]) + (f" and {len(refused) - 10} more" if len(refused) > 10 else "")
    reasons = words or "; ".join(each.reason for each in report.findings if each.severity == "no-go")
    return PreflightRefused(count=len(refused), all=len(report.vms), names=reasons, found=report)
