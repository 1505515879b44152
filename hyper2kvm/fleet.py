"""The command line's part for many VMs: preflight, waves, and their simulation."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.box import SIMPLE
from rich.table import Table

from hyper2kvm.settings import Settings
from hyper2kvm.terminal import stdout
from tasks.errors import PreflightRefused, WaveIncomplete
from tasks.facts import Checked, Preflight
from tasks.models import ExportOptions
from tasks.text import one_line
from tasks.wave.jobs import JOBS
from tasks.wave.models import Limits, PreflightJob, Wave
from tasks.wave.outcome import VmOutcome, WaveReport
from tasks.wave.parse import load_wave
from tasks.wave.show import hms, simulation_lines, size
from tasks.wave.simulate import Model, Simulation
from tasks.wave.simulate import simulate as play

T = TypeVar("T")
STOPPING = "Stopping: what runs ends first, its snapshots are removed, and nothing more is started"


class Shown(Protocol):
    """What loads Prefect, runs a flow with its meters shown, and returns its result."""

    def __call__(self, flow: Callable[[], Callable[[], Awaitable[T]]], *, stopping: str = ...) -> T: ...


def preflight_job(select: list[str], mode: str, flags: Mapping[str, Any]) -> PreflightJob:
    """Return what a preflight is asked for. Raises pydantic.ValidationError."""
    own = _said(mode, flags)
    return PreflightJob(select=select, output_dir=flags["output_dir"] or Path.cwd(), mode=mode, options=own)


def wave_of(file: Path, mode: str, flags: Mapping[str, Any], *, dry_run: bool) -> Wave:
    """Return the wave of a file; flags say what the file leaves out. Raises InvalidInput."""
    defaults: dict[str, Any] = {"mode": mode, "options": _said(mode, flags)}
    if flags["output_dir"]:
        defaults["output_dir"] = str(Path(flags["output_dir"]).absolute())
    wave = load_wave(file, defaults=defaults)
    return wave.model_copy(update={"dry_run": dry_run or wave.dry_run})


def _said(mode: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a mode that flags say otherwise than they are anyway."""
    usual = {name: field.default for name, field in ExportOptions.model_fields.items()}
    known = JOBS[mode].model_fields if mode in JOBS else {}
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in flags.items()
        if key in known and key not in ("vm_name", "output_dir") and value is not None and value != usual.get(key)
    }


def preflight(job: PreflightJob, settings: Settings, *, json: bool, shown: Shown) -> int:
    """Run a preflight and print what it found; 0 only where every VM can be run."""

    def flow() -> Callable[[], Awaitable[Preflight]]:
        from flows.preflight import preflight as checking

        return partial(checking, vcenter=settings.vcenter(), options=job)

    try:
        found, status = shown(flow, stopping="Stopping: nothing was changed"), 0
    except PreflightRefused as error:
        found, status = error.found, error.exit_status
    if json:
        print(found.model_dump_json(indent=2))
    else:
        _show_preflight(found)
    return status


def _show_preflight(found: Preflight) -> None:
    console, table = stdout(), Table("VM", "Go", "Finding", "Why", box=SIMPLE, pad_edge=False)
    for vm in found.vms:
        for row in _rows(vm):
            table.add_row(*map(one_line, row))
    console.print(table)
    for text in dict.fromkeys(one_line(line) for line in _remedies(found)):
        console.print(text)
    console.print(f"{sum(vm.go for vm in found.vms)} of {len(found.vms)} VMs can be run")


def _rows(vm: Checked) -> Iterator[tuple[str, str, str, str]]:
    verdict = "go" if vm.go else "no-go"
    if not vm.findings:
        yield vm.name, verdict, "", ""
    for finding in vm.findings:
        yield vm.name, verdict, f"{finding.code} ({finding.severity})", finding.reason


def _remedies(found: Preflight) -> Iterator[str]:
    for finding in (*(each for vm in found.vms for each in vm.findings), *found.findings):
        yield f"{finding.code}: {finding.remedy}"


def simulate_fleet(*, json: bool) -> int:
    """Play a wave of the model fleet, and print how long it takes and what it cannot beat."""
    model, limits = Model(), Limits()
    slots = model.limits(vcenter=limits.vcenter, host=limits.host, datastore=limits.datastore)
    return _show_simulation(play(list(model.works()), limits=slots, bandwidth=model.bandwidth()), json=json)


def _show_simulation(played: Simulation, *, json: bool) -> int:
    if json:
        print(played.model_dump_json(exclude={"spans"}, indent=2))
    else:
        for line in simulation_lines(played):
            stdout().print(line)
    return 0


def run_wave(wave: Wave, settings: Settings, *, simulate: bool, json: bool, shown: Shown) -> int:
    """Plan a wave and, unless it is dry, carry it out in this process; 0 only where all that was asked for is done."""

    def flow() -> Callable[[], Awaitable[WaveReport]]:
        from flows.migration_wave import migration_wave

        return partial(migration_wave, vcenter=settings.vcenter(), wave=wave)

    failure: WaveIncomplete | None = None
    try:
        report = shown(flow, stopping=STOPPING)
    except WaveIncomplete as error:
        failure, report = error, error.found
    if json:
        told = {"error": type(failure).__name__, "cause": failure.cause} if failure else {}
        print(jsonlib.dumps(told | report.model_dump(mode="json"), indent=2))
    else:
        for line in _wave_lines(report, simulate=simulate):
            stdout().print(one_line(line))
    refused = report.dry_run and any(vm.outcome == "refused" for vm in report.vms)
    return failure.exit_status if failure else int(refused and not simulate)


def _wave_lines(report: WaveReport, *, simulate: bool) -> Iterator[str]:
    for vm in report.vms:
        yield f"{vm.outcome or 'go':10} {vm.name}  {_why(vm)}".rstrip()
    if report.dry_run:
        yield f"expected: {hms(report.expected_s)}; no schedule beats {hms(report.bound_s)}"
        if simulate:
            yield f"simulated: {len(report.vms)} VMs, {size(sum(vm.bytes for vm in report.vms))}"
    else:
        yield f"{report.count('done')} of {len(report.vms)} VMs are done" + (
            f"; {report.rest()}" if report.rest() else ""
        )
    yield f"plan: {report.plan_csv}"


def _why(vm: VmOutcome) -> str:
    refusals = [f"{each.code}: {each.reason}. {each.remedy}" for each in vm.findings if each.severity == "no-go"]
    return vm.message or "; ".join(refusals)
