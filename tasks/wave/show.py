"""A wave as people read it: its plan and its state as markdown, a table as CSV, a Gantt picture as SVG."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Iterator
from datetime import timedelta
from html import escape

from tasks.facts import Checked, Finding, Preflight
from tasks.text import cell, one_line
from tasks.wave.course import Course
from tasks.wave.plan import Plan, Planned
from tasks.wave.simulate import Simulation

GIB = 1 << 30
ROWS = 60  # of the picture
SHOWN = 500  # rows of a markdown table: more are in the CSV
ROW, LABEL, WIDTH = 16, 180, 900  # pixels
COLOURS = ("#3b82f6", "#10b981", "#f59e0b", "#8b5cf6", "#ef4444", "#14b8a6", "#ec4899", "#84cc16")
COLUMNS = ("vm", "path", "go", "mode", "road", "group", "host", "datastores", "disks", "bytes", "start_s", "end_s")


def hms(seconds: float) -> str:
    """Return a length of time: `1:02:03`."""
    return str(timedelta(seconds=round(seconds)))


def size(count: float) -> str:
    """Return bytes for people: `1.5 GiB`."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / (1 << 20):,.0f} MiB"


def plan_as_markdown(plan: Plan, csv_file: str = "") -> str:
    """Return the plan of a wave as GitHub markdown, with its picture inside."""
    refused = [vm for vm in plan.vms if not vm.checked.go]
    late = plan.late()
    lines = [
        f"# Plan of wave {cell(plan.wave.name)}",
        "",
        *(f"> **{each.severity}:** {cell(each.reason)}. {cell(each.remedy)}\n" for each in plan.findings),
        "| | |",
        "| --- | --- |",
        f"| VMs | {len(plan.go)} go, {len(refused)} do not |",
        f"| Bytes | {size(sum(vm.checked.bytes for vm in plan.go))} |",
        f"| Starts | {_moment(plan)} |",
        f"| Takes | {hms(plan.expected_s)}; no schedule beats {hms(plan.bound_s)} ({cell(plan.bottleneck or '-')}) |",
        f"| Ends | {plan.ends:%Y-%m-%d %H:%M %Z} |",
        *(
            [f"| Hard stop | {plan.hours.stop:%Y-%m-%d %H:%M %Z}: {len(late)} VMs are not started by then |"]
            if plan.hours.stop
            else []
        ),
        f"| At once | {_limits(plan)} |",
        f"| Critical path | {cell(' → '.join(plan.critical)) or 'none'} |",
        f"| Rates | {_rates(plan)} |",
        *([f"| As CSV | {cell(csv_file)} |"] if csv_file else []),
        "",
        *(_refused_table(refused) if refused else ()),
        "## VMs",
        "",
        "| VM | Go | Group | Mode, road | Host | Bytes | Expected | Notes |",
        "| --- | --- | --- | --- | --- | ---: | --- | --- |",
        *(_plan_row(vm) for vm in plan.vms[:SHOWN]),
        *([f"\nand {len(plan.vms) - SHOWN} more: see the CSV"] if len(plan.vms) > SHOWN else []),
        "",
        "## Expected course",
        "",
        f"![Gantt picture]({as_data_uri(gantt(plan))})",
    ]
    return "\n".join(lines)


def _moment(plan: Plan) -> str:
    wait = plan.hours.opens_in(plan.made)
    return f"{plan.hours.start:%Y-%m-%d %H:%M %Z}, in {hms(wait)}" if wait and plan.hours.start else "at once"


def _limits(plan: Plan) -> str:
    limits = plan.wave.limits
    return (
        f"{limits.runs} VMs; disks: {limits.host} of a host, {limits.datastore} of a datastore, "
        f"{limits.vcenter} of the vCenter"
    )


def _rates(plan: Plan) -> str:
    roads = sorted({vm.checked.road for vm in plan.vms})
    words = ", ".join(f"{road} {plan.rates.of(road) / (1 << 20):,.0f} MiB/s a disk" for road in roads)
    of = f"measured by {plan.rates.runs} runs" if plan.rates.runs else "assumed: nothing has been measured yet"
    return f"{words}, {plan.rates.start_s:.0f} s a run ({of})"


def _refused_table(refused: Iterable[Planned]) -> Iterator[str]:
    yield from ("## Not migrated", "", "| VM | Why | What to do |", "| --- | --- | --- |")
    for vm in refused:
        for finding in vm.checked.findings:
            if finding.severity == "no-go":
                yield f"| {cell(vm.checked.name)} | {cell(finding.reason)} | {cell(finding.remedy)} |"
    yield ""


def _plan_row(vm: Planned) -> str:
    checked = vm.checked
    notes = "; ".join(f"{each.code}: {one_line(each.reason)}" for each in checked.findings)
    span = f"{hms(vm.start_s)} – {hms(vm.end_s)}" if vm.end_s else ""
    return (
        f"| {cell(checked.name)} | {'go' if checked.go else '**no-go**'} | {cell(vm.work.group)} "
        f"| {checked.mode}, {checked.road} | {cell(checked.host)} | {size(checked.bytes)} | {span} | {cell(notes)} |"
    )


def plan_as_csv(plan: Plan) -> str:
    """Return the plan as CSV: a VM a row, its findings in the last columns."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow((*COLUMNS, "findings", "remedies"))
    for vm in plan.vms:
        checked = vm.checked
        row = (checked.name, checked.path, "go" if checked.go else "no-go", checked.mode, checked.road, vm.work.group)
        more = (checked.host, " ".join(checked.datastores), checked.disks, checked.bytes)
        said = "; ".join(f"{each.code}: {each.reason}" for each in checked.findings)
        remedies = "; ".join(each.remedy for each in checked.findings)
        times = (round(vm.start_s, 1), round(vm.end_s, 1))
        writer.writerow([_harmless(each) for each in (*row, *more, *times, said, remedies)])
    return text.getvalue()


def _harmless(value: object) -> object:
    """Return a cell that no spreadsheet takes for a formula: names from vSphere are data."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def gantt(plan: Plan) -> str:
    """Return the expected course as SVG: a bar a VM, the longest of them where there are many; a colour a group."""
    timed = [vm for vm in plan.vms if vm.end_s]
    shown = sorted(sorted(timed, key=lambda vm: vm.start_s - vm.end_s)[:ROWS], key=lambda vm: (vm.start_s, vm.end_s))
    groups = sorted({vm.work.group for vm in shown})
    scale = (WIDTH - LABEL - 20) / max(1.0, plan.expected_s)
    height = ROW * len(shown) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-size="11" '
        'font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for number, vm in enumerate(shown):
        top, left = ROW * number + 8, LABEL + vm.start_s * scale
        colour = COLOURS[groups.index(vm.work.group) % len(COLOURS)]
        critical = ' stroke="#111111" stroke-width="1.5"' if vm.checked.name in plan.critical else ""
        length = max(1.0, (vm.end_s - vm.start_s) * scale)
        parts.append(f'<text x="4" y="{top + 10}" fill="#111111">{escape(_short(vm.checked.name))}</text>')
        parts.append(
            f'<rect x="{left:.1f}" y="{top}" width="{length:.1f}" height="{ROW - 4}" fill="{colour}"{critical}/>'
        )
    for tick in range(5):
        x = LABEL + tick * (WIDTH - LABEL - 20) / 4
        parts.append(f'<text x="{x:.0f}" y="{height - 10}" fill="#555555">{hms(plan.expected_s * tick / 4)}</text>')
    return "".join([*parts, "</svg>"])


def _short(name: str) -> str:
    text = one_line(name)
    return text if len(text) <= 26 else f"{text[:25]}…"


def as_data_uri(svg: str) -> str:
    """Return a picture as a URI that has it inside."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def course_as_markdown(course: Course, *, now_s: float, notes: Iterable[str] = ()) -> str:
    """Return the state of a wave under way, or of one that is over, as GitHub markdown."""
    words = (f"{course.count('done')} done", f"{len(course.scheduler.running)} running")
    others = ("failed", "skipped", "refused", "blocked", "unstarted")
    counted = [f"{course.count(each)} {each}" for each in others if course.count(each)]  # type: ignore[arg-type]
    counts = ", ".join([*words, f"{len(course.scheduler.waiting)} waiting", *counted])
    lines = [
        f"# Wave {cell(course.plan.wave.name)}",
        "",
        f"{counts}; {hms(now_s)} of {hms(course.plan.expected_s)} expected",
        "",
        *([f"> Nothing more is started: {cell(course.stopped)}\n"] if course.stopped else []),
        *(f"> {cell(note)}\n" for note in notes),
        "| VM | Group | State | Attempt | Run | Notes |",
        "| --- | --- | --- | ---: | --- | --- |",
        *(_course_row(course, vm) for vm in course.plan.vms[:SHOWN]),
    ]
    return "\n".join(lines)


def _course_row(course: Course, vm: Planned) -> str:
    attempt = course.attempts.get(vm.key)
    running = vm.key in course.scheduler.running
    state = course.outcomes.get(vm.key) or ("running" if running else "waiting")
    message = attempt.message if attempt else _first_no_go(vm.checked)
    run, number = (attempt.run_id, attempt.number) if attempt else ("", "")
    link = f"[{run[:8]}](/runs/flow-run/{run})" if run else ""
    return f"| {cell(vm.checked.name)} | {cell(vm.work.group)} | {state} | {number} | {link} | {cell(message[:300])} |"


def _first_no_go(checked: Checked) -> str:
    return next((each.reason for each in checked.findings if each.severity == "no-go"), "")


def preflight_as_markdown(found: Preflight) -> str:
    """Return what preflight found as GitHub markdown."""
    lines = [
        f"# Preflight at {cell(found.vcenter)}",
        "",
        f"{sum(vm.go for vm in found.vms)} of {len(found.vms)} VMs can be run; {found.created}",
        "",
        *(f"> **{each.severity}:** {cell(each.reason)}. {cell(each.remedy)}\n" for each in found.findings),
        "| VM | Go | Finding | Why | What to do |",
        "| --- | --- | --- | --- | --- |",
        *(row for vm in found.vms[:SHOWN] for row in _preflight_rows(vm)),
    ]
    return "\n".join(lines)


def _preflight_rows(vm: Checked) -> Iterator[str]:
    verdict = "go" if vm.go else "**no-go**"
    for finding in vm.findings or (Finding(code="", severity="warning", reason="nothing found", remedy=""),):
        code = f"{finding.code} ({finding.severity})" if finding.code else ""
        yield f"| {cell(vm.name)} | {verdict} | {code} | {cell(finding.reason)} | {cell(finding.remedy)} |"


def simulation_lines(played: Simulation, *, hosts: int = 10) -> list[str]:
    """Return what a simulation found, in lines for a terminal."""
    busy = sorted(played.busy.items(), key=lambda each: -each[1])
    average = sum(played.busy.values()) / len(busy) if busy else 0.0
    lines = [
        f"{played.vms:,} VMs, {size(played.bytes)}: {hms(played.wave_s)}",
        f"bound: {hms(played.bound_s)} ({played.bottleneck}), {played.over:.1%} over it",
        f"hosts: {average:.0%} of their bandwidth used on average; the busiest and the idlest:",
    ]
    shown = busy if len(busy) <= 2 * hosts else busy[:hosts] + busy[-hosts:]
    lines += [f"  {one_line(name.partition(':')[2])}: {share:.1%}" for name, share in shown]
    lines.append(f"simulated in {played.seconds:.1f} s")
    return lines
