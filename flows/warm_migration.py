"""The `warm_migration` mode: a whole copy and rounds while the VM runs, then a downtime that was forecast."""

from __future__ import annotations

import asyncio
import time
import uuid
from datetime import datetime
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from blocks import ESXiHost, NbdSource, VCenter, VddkToolkit
from flows.cbt_sync import SyncedCopy, sync_to
from flows.export import copy_whole, frozen
from tasks import approval
from tasks.approval import CutoverRequest
from tasks.boot import check_boot, proven
from tasks.define import check_definable, define
from tasks.disks import Choice
from tasks.errors import CutoverRefused, Hyper2KvmError, IntegrityMismatch, TrackingOff
from tasks.forecast import ASIDE_S, DEFINE_S, NOTHING, Known, forecast, measured, plus, shutdown_of
from tasks.images import cutover
from tasks.images.base import base_of
from tasks.images.boot import need_tools
from tasks.images.cutover import PLACE, REHEARSAL, Campaign, read_aside, read_campaign, write_aside, write_campaign
from tasks.images.dirty import distrust
from tasks.job import Job, job_at_work
from tasks.models import Aside, Forecast, Manifest, Migration, Roads, Round, WarmJob
from tasks.power import Source, as_it_was, begin_aside, check_shutdown, go_off, put_aside
from tasks.resolve import describe
from tasks.route import Means, roads_for
from tasks.source import sample_disk
from tasks.steps import in_thread, quietly, to_the_end
from tasks.succession import clean_up
from tasks.sync import enable_tracking
from tasks.until import Approved, AtTime, Fitting, Until
from tasks.warm import form_words, in_words, prepare, tell_migration, tell_round


@flow(
    name="warm-migration",
    flow_run_name="migrate {options.vm_name}",
    on_cancellation=[clean_up],
    on_crashed=[clean_up],
    on_failure=[clean_up],
)
async def warm_migration(
    vcenter: VCenter,
    options: WarmJob,
    toolkit: VddkToolkit | None = None,
    nbd_source: NbdSource | None = None,
    esxi_host: ESXiHost | None = None,
) -> Migration:
    """Copy a VM while it runs, bring the copy up to date in rounds, and have it take over with a short downtime.

    After each round the run's artifact says how long the VM would be down if the cutover began now. A cutover (asked
    for in words) shuts the source's guest down, brings the copy up to date once more, compares a sample with the source
    and makes what libvirt starts: images in `<output folder>/<VM>/cutover/`, on the copy or of it, and `domain.xml`.
    What is done to the source is in `rollback.json`, and a rollback undoes it. A run that was killed is gone on with by
    the next one to the same folder.

    Args:
        vcenter: Where the VM is now: a saved vCenter, or a new one through Add.
        options: Which VM to migrate, where to, how long it may be down, and who says when.
        toolkit: For the transports vddk and auto: where VMware's VDDK lies on the worker's machine.
        nbd_source: For the transports nbd and auto: the server, or the command, that disks are read from.
        esxi_host: For the transports ssh and auto: the host that has the disks' files.
    """
    roads = roads_for(options, Means(toolkit=toolkit, nbd_source=nbd_source, esxi_host=esxi_host))
    async with job_at_work(vcenter, options) as job:
        return await _Migrating(vcenter, job, options, roads).run()


class _Migrating:
    """One run of a migration: what it knows so far."""

    def __init__(self, vcenter: VCenter, job: Job, options: WarmJob, roads: Roads) -> None:
        self.vcenter, self.job, self.options, self.roads = vcenter, job, options, roads
        self.folder = job.folder
        self.campaign = read_campaign(job.folder)
        self.source = Source(hard=False)
        self.snapshot_at = 0.0  # of the last round; monotonic
        self.said: Forecast | None = None
        self.notes: list[str] = []

    async def run(self) -> Migration:
        base = base_of(self.folder)
        await self._refuse_what_will_fail()
        if base is None:
            base = await copy_whole(self.vcenter, self.job, self.options, self.roads, Choice())
        await self._rehearse(base)
        if self.job.vm.power_state != "poweredOff":
            base = await self._rounds(base)
        if self.options.cutover == "none":
            return await self._ended(base)
        return await self._cut_over(base)

    # ── while the source runs ────────────────────────────────────────────────────────────────────────

    async def _refuse_what_will_fail(self) -> None:
        """Raise, before the first byte, for whatever would stop the cutover."""
        vm, options = self.job.vm, self.options
        if options.boot_check:
            need_tools(uefi=vm.firmware == "efi")
        if options.cutover == "approval":
            await approval.check_askable()
        self.source = await check_shutdown(self.vcenter, vm, options)
        off = vm.model_copy(update={"power_state": "poweredOff"})  # as it will be once its copy is defined
        await check_definable(off, self.folder / PLACE, options)
        if not vm.cbt_enabled:
            if not options.enable_cbt:
                raise TrackingOff(vm=vm.name, why="changeTrackingEnabled is false")
            await enable_tracking(self.vcenter, vm, self.job.snapshot_name)

    async def _rehearse(self, base: Manifest) -> None:
        """Do what follows the last sync, once, with the copy as it is: for the forecast, and to see that it works."""
        if self.campaign.preparing_s is not None:
            return
        started = time.monotonic()
        try:
            await prepare(base, self.folder, REHEARSAL, self.options)
            await self._boots()
        finally:
            cutover.drop(self.folder, REHEARSAL)
        self._remember(preparing_s=time.monotonic() - started)

    async def _rounds(self, base: Manifest) -> Manifest:
        """Return the manifest of the last round: after it the cutover begins, at once."""
        until = self._until()
        while True:
            base, done = await self._round(base)
            self._remember(rounds=(*self.campaign.rounds, done))
            self.said = self._forecast()
            await tell_round(base, self.campaign.rounds, self.said, self.options, link=until.link)
            words = form_words(base, self.campaign.rounds, self.said, self.options)
            try:
                if await until.is_time(self.said, words):
                    self.notes += [until.note] if until.note else []
                    return base
                await until.rest(self.options.pause.total_seconds())
            except (CutoverRefused, asyncio.CancelledError):
                await to_the_end(self._ask_anew())
                raise

    async def _round(self, base: Manifest) -> tuple[Manifest, Round]:
        job, began = await self._job_now(), time.monotonic()
        async with frozen(self.vcenter, job, self.options, self.roads, Choice()) as snapshot:
            self.snapshot_at = taken = time.monotonic()
            copy = await sync_to(self.vcenter, job, snapshot, base, self.options, self.roads)
            synced = time.monotonic()
            await self._compare(copy)
            compared = time.monotonic()
        done = Round(
            number=len(self.campaign.rounds) + 1,
            taken=_taken(copy.manifest),
            window_s=_between(base, copy.manifest),
            whole=base.vm.power_state == "poweredOn",
            changed_bytes=_fetched(copy.manifest),
            snapshot_s=taken - began,
            transfer_s=copy.transfer_s,
            overhead_s=synced - taken - copy.transfer_s,
            sample_s=compared - synced,
            consolidation_s=time.monotonic() - compared,
        )
        return copy.manifest, done

    async def _job_now(self) -> Job:
        """Return the job with its VM as it is now: it may have moved to another host."""
        return self.job.model_copy(update={"vm": await describe(self.vcenter, self.job.vm.moref)})

    async def _compare(self, copy: SyncedCopy) -> None:
        """Read a random sample of each disk at the source. Raises IntegrityMismatch where the copy differs.

        Nothing of it counts then: what vSphere did not tell of once, it does not tell of later.
        """
        seed = time.time_ns()
        for image in copy.manifest.disks:
            found = await sample_disk(self.vcenter, copy.job, image, self.folder, count=self.options.sample, seed=seed)
            if found.wrong:
                where = (
                    f"of {found.leaves} leaves read at the source {len(found.wrong)} differ, the first {found.wrong[0]}"
                )
                remedy = (
                    "Check the storage below the copy, and that nothing else writes to it; then run again, which "
                    "reads all of the source"
                )
                await in_thread(distrust, None, self.folder, copy.manifest)
                raise IntegrityMismatch(path=self.folder / image.path, where=where, remedy=remedy)

    def _forecast(self) -> Forecast:
        options, source = self.options, self.source
        expected_s = options.expected_shutdown.total_seconds()
        shutdown, guessed = shutdown_of(source.shutdowns_s, expected_s=expected_s, hard=source.hard)
        aside = [ASIDE_S] * (bool(options.rename_source) + options.disconnect_source)
        known = Known(
            shutdown_s=shutdown,
            preparing_s=plus(measured([self.campaign.preparing_s or 0.0]), DEFINE_S if options.define else NOTHING),
            aside_s=plus(*aside),
            guessed=("shutdown",) if guessed else (),
        )
        return forecast(
            self.campaign.rounds,
            since_snapshot_s=time.monotonic() - self.snapshot_at,
            known=known,
            budget_s=options.downtime_budget.total_seconds(),
            pause_s=options.pause.total_seconds(),
        )

    def _until(self) -> Until:
        options, vm = self.options, self.job.vm
        if at := options.cutover_time:
            return AtTime(at)
        if options.cutover == "approval":
            request = CutoverRequest(
                vm=vm.name, moref=vm.moref, folder=str(self.folder), asked_by=self.job.flow_run_id, words=""
            )
            return Approved(request, self.campaign, self._asked)
        return Fitting(vm.name, options.downtime_budget.total_seconds())

    async def _ask_anew(self) -> None:
        """Have the next run ask for an approval of its own."""
        if asked := self.campaign.approval:
            self._remember(id=uuid.uuid4().hex, approval="")
            await quietly(approval.withdraw(asked))

    async def _asked(self, run_id: str) -> None:
        self._remember(approval=run_id)

    # ── the cutover ──────────────────────────────────────────────────────────────────────────────────

    async def _cut_over(self, base: Manifest) -> Migration:
        """Have the copy take over. What goes wrong from here on leaves the source off, and says how to put it back."""
        try:
            return await self._taken_over(base)
        except (Hyper2KvmError, asyncio.CancelledError) as error:
            if read_aside(self.folder):
                words = f"The source may be off, or put aside: --vs-action rollback {self.folder} puts it back"
                get_run_logger().error(words)
                error.add_note(words)
            raise

    async def _taken_over(self, base: Manifest) -> Migration:
        clock = _Clock()
        vm = self.job.vm
        aside = await begin_aside(self.vcenter, self.job.server, vm, self.folder)
        how = await go_off(self.vcenter, vm, self.source, self.options)
        clock.note("shutdown")
        synced: asyncio.Future[tuple[SyncedCopy, Aside]] = asyncio.get_running_loop().create_future()
        last = asyncio.create_task(self._last_sync(base, aside, clock, synced))
        try:
            either: list[asyncio.Future[Any]] = [last, synced]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not synced.done():
                await last  # raises
            copy, aside = synced.result()
            migration = await self._startable(copy.manifest, aside, clock, how)
        except BaseException:
            last.cancel()
            await asyncio.gather(last, return_exceptions=True)
            raise
        return await self._ended(copy.manifest, migration, await self._removal_s(last))

    async def _startable(self, copy: Manifest, aside: Aside, clock: _Clock, how: str) -> Migration:
        """Make what the domain starts from, and define it, where that was asked; return what came of it."""
        made = await prepare(copy, self.folder, PLACE, self.options)
        await self._boots()
        clock.note("preparing")
        migration = Migration(
            manifest=made,
            rounds=self.campaign.rounds,
            forecast=self.said,
            downtime_s=clock.total_s,
            parts=clock.parts,
            how=how,
            folder=self.folder / PLACE,
        )
        cutover.land(self.folder, migration)
        if self.options.define:
            write_aside(self.folder, aside.model_copy(update=_domain_of(made, self.options)))
            await define(self.vcenter, made, self.folder / PLACE, self.options)
            clock.note("define")
        return migration.model_copy(update={"downtime_s": clock.total_s, "parts": clock.parts})

    async def _last_sync(
        self, base: Manifest, aside: Aside, clock: _Clock, synced: asyncio.Future[tuple[SyncedCopy, Aside]]
    ) -> float:
        """Bring the copy up to the source as it is for good, and tell `synced`; return how long the snapshot's removal
        took after that, which nobody waits for."""
        job = await self._job_now()
        async with frozen(self.vcenter, job, self.options, self.roads, Choice()) as snapshot:
            clock.note("snapshot")
            was = job.model_copy(update={"vm": as_it_was(job.vm, aside)})
            copy = await sync_to(self.vcenter, was, snapshot, base, self.options, self.roads)
            clock.note("sync", "transfer", copy.transfer_s)
            await self._compare(copy)
            clock.note("sample")
            if self.options.rename_source or self.options.disconnect_source:
                aside = await put_aside(self.vcenter, job.vm, aside, self.options, self.folder)
                clock.note("aside")
            synced.set_result((copy, aside))
            released = time.monotonic()
        return time.monotonic() - released

    async def _removal_s(self, last: asyncio.Task[float]) -> float | None:
        try:
            return await last
        except Hyper2KvmError as error:
            get_run_logger().warning("the last snapshot is not seen removed vm=%s error=%s", self.job.vm.moref, error)
            return None

    async def _boots(self) -> None:
        """See that the copy boots, where that was asked: by its own domain, on overlays that are thrown away."""
        if self.options.boot_check:
            proven(await check_boot(self.folder, self.options.boot), self.folder)

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────

    async def _ended(
        self, copy: Manifest, migration: Migration | None = None, removal_s: float | None = None
    ) -> Migration:
        if migration is None:
            migration = Migration(manifest=copy, rounds=self.campaign.rounds, forecast=self.said)
            self.notes += [in_words(self.said)] if self.said else []
        else:
            cutover.forget_campaign(self.folder)
            removed = f"the last snapshot was removed in {removal_s:.1f} s, beside the cutover" if removal_s else ""
            self.notes.append(removed or "the last snapshot was not seen removed: remove it in vSphere")
        migration = migration.model_copy(update={"removal_s": removal_s, "notes": tuple(self.notes)})
        if migration.folder:
            cutover.land(self.folder, migration)
        await tell_migration(migration)
        return migration

    def _remember(self, **changes: object) -> None:
        self.campaign = Campaign.model_validate(self.campaign.model_dump() | changes)
        write_campaign(self.folder, self.campaign)


class _Clock:
    """What goes by of a downtime, part by part."""

    def __init__(self) -> None:
        self._began = self._noted = time.monotonic()
        self.parts: dict[str, float] = {}

    @property
    def total_s(self) -> float:
        return self._noted - self._began

    def note(self, part: str, inside: str = "", inside_s: float = 0.0) -> None:
        """Count the time since the last note to `part`, but `inside_s` of it to another part."""
        now = time.monotonic()
        self.parts[part] = now - self._noted - inside_s
        if inside:
            self.parts[inside] = inside_s
        self._noted = now


def _domain_of(made: Manifest, options: WarmJob) -> dict[str, str]:
    return {"domain": made.domain.name if made.domain else "", "libvirt_uri": options.libvirt_uri}


def _taken(manifest: Manifest) -> str:
    return manifest.snapshot.created if manifest.snapshot else manifest.created


def _between(before: Manifest, after: Manifest) -> float:
    """Return the seconds between two copies' points in time, by the source's clock."""
    return (datetime.fromisoformat(_taken(after)) - datetime.fromisoformat(_taken(before))).total_seconds()


def _fetched(manifest: Manifest) -> int:
    return sum(image.bytes_transferred for image in manifest.disks)
