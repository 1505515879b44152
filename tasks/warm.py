"""Steps of a warm migration on this side: what the domain starts from, and the report that grows with each round."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks.images import cutover
from tasks.models import Estimate, Forecast, Manifest, Migration, Round, WarmJob
from tasks.steps import in_thread, metered, quietly
from tasks.text import cell, one_line

MIB = 1024 * 1024
ROUNDS_TOLD = 20


@task(name="prepare", task_run_name="prepare {place} of {manifest.vm.name}", cache_policy=NO_CACHE)
async def prepare(manifest: Manifest, folder: Path, place: str, options: WarmJob) -> Manifest:
    """Make what the domain starts from, on or of a copy that stays as it is; return the manifest of that."""
    stop, vm = threading.Event(), manifest.vm
    total = sum(image.virtual_size for image in manifest.disks)
    async with metered(f"prepare {vm.name}", total, key=f"prepare-{vm.moref}") as meter:
        return await in_thread(
            cutover.deliver,
            stop,
            folder,
            manifest,
            place,
            format=options.delivered_format,
            converted=bool(options.convert_to),
            networks=options.networks,
            progress=meter.percent,
            stop=stop,
        )


async def tell_round(
    manifest: Manifest, rounds: Sequence[Round], forecast: Forecast, options: WarmJob, *, link: str
) -> None:
    """Leave what is known after a round in the migration's artifact."""
    last, said = rounds[-1], forecast.downtime_s
    get_run_logger().info(
        "round %d vm=%s changed=%d window=%.1f transfer=%.1f downtime=%.1f..%.1f verdict=%r why=%r",
        *(last.number, manifest.vm.moref, last.changed_bytes, last.window_s, last.transfer_s),
        *(said.low, said.high, forecast.verdict, forecast.why),
    )
    await _artifact(manifest, "\n".join(_rounds_report(manifest, rounds, forecast, options, link)))


async def tell_migration(migration: Migration, rounds_report: Sequence[str] = ()) -> None:
    """Leave what came of a migration in its artifact."""
    await _artifact(migration.manifest, "\n".join([*_end_report(migration), *rounds_report]))


async def _artifact(manifest: Manifest, markdown: str) -> None:
    vm = manifest.vm
    words = f"Warm migration of {one_line(vm.name)}"
    await quietly(acreate_markdown_artifact(markdown, key=f"warm-{vm.moref}", description=words))


def in_words(forecast: Forecast) -> str:
    """Return a forecast as a person is told it."""
    guessed = f"; only guessed: {', '.join(forecast.guessed)}" if forecast.guessed else ""
    return (
        f"downtime {_interval(forecast.downtime_s)} s, {_interval(_mib(forecast.pending_bytes))} MiB pending: "
        f"{forecast.verdict} ({forecast.why}){guessed}"
    )


def form_words(manifest: Manifest, rounds: Sequence[Round], forecast: Forecast, options: WarmJob) -> str:
    """Return what the form of an approval says."""
    vm, last, allowed_s = manifest.vm, rounds[-1], options.downtime_budget.total_seconds()
    return "\n\n".join(
        [
            f"**Cut {cell(vm.name)} over?** ({cell(vm.inventory_path)}, {vm.moref})",
            f"Forecast downtime: **{_interval(forecast.downtime_s)} s**, and {allowed_s:.0f} s are allowed: "
            f"{forecast.verdict} ({forecast.why})",
            f"Pending: **{_interval(_mib(forecast.pending_bytes))} MiB** to fetch while it is off",
            f"As of round {last.number}, {last.taken}; rounds go on meanwhile",
        ]
    )


def _rounds_report(
    manifest: Manifest, rounds: Sequence[Round], forecast: Forecast, options: WarmJob, link: str
) -> Iterator[str]:
    yield f"# Warm migration of {cell(manifest.vm.name)}"
    yield ""
    yield f"**{forecast.verdict}**: {cell(forecast.why)}"
    yield ""
    if link:
        yield f"Approval: [{link}]({link})" if link.startswith("http") else f"Approval: {link}"
        yield ""
    yield "| | Forecast |"
    yield "| --- | ---: |"
    yield f"| Downtime, if the cutover began now | {_interval(forecast.downtime_s)} s |"
    yield f"| Allowed | {options.downtime_budget.total_seconds():.0f} s |"
    yield f"| Pending | {_interval(_mib(forecast.pending_bytes))} MiB |"
    for name, part in forecast.parts.items():
        yield f"| {name}{' (guessed)' if name in forecast.guessed else ''} | {_interval(part)} s |"
    yield ""
    yield from rounds_table(rounds)


def rounds_table(rounds: Sequence[Round]) -> Iterator[str]:
    """Yield a table of the last rounds."""
    yield "| Round | Window s | Changed MiB | MiB/s | Snapshot s | Transfer s | Rest s | Sample s | Consolidation s |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for each in rounds[-ROUNDS_TOLD:]:
        rate = each.changed_bytes / MIB / max(each.window_s, 0.001)
        yield (
            f"| {each.number} | {each.window_s:.1f} | {each.changed_bytes / MIB:,.1f} | {rate:,.1f} "
            f"| {each.snapshot_s:.1f} | {each.transfer_s:.1f} | {each.overhead_s:.1f} | {each.sample_s:.1f} "
            f"| {each.consolidation_s:.1f} |"
        )


def _end_report(migration: Migration) -> Iterator[str]:
    vm, forecast = migration.manifest.vm, migration.forecast
    yield f"# Warm migration of {cell(vm.name)}"
    yield ""
    for note in migration.notes:
        yield f"> **Note:** {cell(note)}\n"
    if migration.downtime_s is None:
        yield "No cutover was asked for: the source runs, and the copy is as of the last round."
    else:
        yield f"The source went off ({cell(migration.how)}); the copy is ready in {cell(str(migration.folder))}."
        yield ""
        yield "| | Forecast | Real |"
        yield "| --- | ---: | ---: |"
        said = f"{_interval(forecast.downtime_s)} s" if forecast else "none"
        yield f"| Downtime | {said} | {migration.downtime_s:.1f} s |"
        for name, took_s in migration.parts.items():
            part = forecast.parts.get(name) if forecast else None
            yield f"| {name} | {f'{_interval(part)} s' if part else ''} | {took_s:.1f} s |"
        if migration.removal_s is not None:
            yield f"| last snapshot's removal, beside that | | {migration.removal_s:.1f} s |"
    yield ""
    yield from rounds_table(migration.rounds)


def _mib(count: Estimate) -> Estimate:
    return Estimate(expected=count.expected / MIB, off=count.off / MIB)


def _interval(estimate: Estimate) -> str:
    return f"{estimate.low:,.1f} to {estimate.high:,.1f}"
