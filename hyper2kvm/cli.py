"""The command line: the source document's flags, turned into flow parameters.

What needs Prefect is imported where it is used: `--help` and `list-vms` start without it.
"""

from __future__ import annotations

import asyncio
import json as jsonlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cyclopts import App, Parameter
from pydantic import ValidationError

from hyper2kvm import __version__, fleet
from hyper2kvm.settings import Settings, password_from
from hyper2kvm.terminal import (
    Board,
    boot_line,
    janitor_lines,
    show_error,
    show_verification,
    stderr,
    stdout,
    summary,
    vm_of,
)
from tasks.errors import Hyper2KvmError, IntegrityMismatch, InvalidInput, JanitorUnfinished
from tasks.images.boot import need_tools
from tasks.images.boot_domain import boots_by_uefi, read_domain
from tasks.images.files import safe_name
from tasks.images.job import nobody_at_work
from tasks.images.manifest import read_manifest
from tasks.models import (
    CONNECTIONS,
    BootCheck,
    BootJob,
    DownloadManifest,
    ExportOptions,
    JanitorJob,
    JanitorReport,
    Manifest,
    Migration,
    RollbackJob,
    StartableJob,
    Verification,
    VerifyJob,
)
from tasks.text import one_line

MODES = {
    "export-vm": "export",
    "download-vm": "download_only",
    "vddk-export": "vddk_download",
    "cbt-sync": "cbt_sync",
    "warm-migrate": "warm_migration",
}
ACTIONS = (*MODES, "rollback", "verify", "boot-check", "preflight", "wave", "janitor", "list-vms")
STOPPING = "Stopping: the transfer ends, then the snapshot is removed"
INTERRUPTED = 130  # what a shell reports for a program ended by SIGINT

T = TypeVar("T")
FlowCall = Callable[[], Awaitable[T]]

app = App(
    name="hyper2kvm",
    help="Takes virtual machines out of VMware vSphere and lands them, verified, on KVM.",
    version=__version__,
    help_format="plaintext",
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 only where what was asked for was done and verified."""
    outcome = app(argv, result_action="return_value", exit_on_error=True)
    return outcome if isinstance(outcome, int) else 0


@app.command
def vsphere(
    what: str | None = None,
    /,
    *,
    vs_action: str,
    vcenter: str | None = None,
    username: str | None = None,
    password_file: Path | None = None,
    port: int | None = None,
    ca_file: str | None = None,
    thumbprint: str | None = None,
    no_verify: Annotated[bool, Parameter(negative=())] = False,
    vs_vm_name: str | None = None,
    output_dir: Path | None = None,
    format: str | None = None,
    compression: str = "none",
    transport: str = "auto",
    limit_rate: str = "",
    digest: str = "blake3",
    overcommit: Annotated[bool, Parameter(negative=())] = False,
    connections: int = CONNECTIONS,
    no_host_tickets: Annotated[bool, Parameter(negative=())] = False,
    quiesce: Annotated[bool, Parameter(negative=())] = False,
    allow_crash_consistent: Annotated[bool, Parameter(negative=())] = False,
    vs_snapshot_moref: str | None = None,
    parallel_disks: int = 2,
    skip_readback: Annotated[bool, Parameter(negative=())] = False,
    network_map: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    define: Annotated[bool, Parameter(negative=())] = False,
    libvirt_uri: str = "qemu:///system",
    define_while_source_runs: Annotated[bool, Parameter(negative=())] = False,
    include_glob: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    exclude_glob: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    max_files: int = 1000,
    concurrency: int = 3,
    fail_on_missing: Annotated[bool, Parameter(negative=())] = False,
    snapshot: Annotated[bool, Parameter(negative=())] = False,
    boot_check: Annotated[bool, Parameter(negative=())] = False,
    boot_timeout: int = 0,
    boot_expect: str = "",
    boot_accelerator: str = "auto",
    scratch: Path | None = None,
    against_source: Annotated[bool, Parameter(negative=())] = False,
    sample: int = 64,
    seed: int = 0,
    enable_cbt: Annotated[bool, Parameter(negative=())] = False,
    cutover: str = "none",
    cutover_at: str = "",
    downtime_budget: float = 60,
    shut_down_source: Annotated[bool, Parameter(negative=())] = False,
    power_off_source: Annotated[bool, Parameter(negative=())] = False,
    shutdown_timeout: float = 300,
    expected_shutdown: float = 0,
    rename_source: str = "",
    disconnect_source: Annotated[bool, Parameter(negative=())] = False,
    pause: float = 60,
    convert_to: str = "",
    vddk_libdir: Path | None = None,
    nbd_uri: str = "",
    nbd_command: str = "",
    nbd_ca_file: Path | None = None,
    nbd_source: str = "",
    esxi_host: str = "",
    esxi_user: str = "root",
    esxi_host_key: str = "",
    esxi_key_file: Path | None = None,
    esxi_password_file: Path | None = None,
    esxi_block: str = "",
    vddk_disk: str = "",
    all_disks: Annotated[bool, Parameter(negative=())] = False,
    remove: Annotated[bool, Parameter(negative=())] = False,
    wave: Path | None = None,
    mode: str = "export",
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    simulate: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
    debug: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Work on the VMs of a vCenter or ESXi host.

    Parameters
    ----------
    what
        With list-vms and preflight: a pattern, only VMs whose name or inventory path matches. With verify, boot-check
        and rollback: the folder of a copy. With janitor: the folder of copies.
    vs_action
        export-vm, download-vm, vddk-export, cbt-sync, warm-migrate, rollback, verify, boot-check, preflight, wave,
        janitor or list-vms.
    vcenter
        Name or address; host:port is understood. boot-check needs none, verify only with --against-source.
    username
        Account to log in with.
    password_file
        File whose first line is the password; else VCENTER_PASSWORD, else a prompt.
    port
        HTTPS port, 443 where not said.
    ca_file
        PEM file of the CAs to trust; else VCENTER_CA_FILE, else the system's.
    thumbprint
        SHA-256 or SHA-1 thumbprint to pin; else VCENTER_THUMBPRINT.
    no_verify
        Do not verify the certificate: anybody in between can read the password and change the disks.
    vs_vm_name
        Name, inventory path, moref or UUID of the VM.
    output_dir
        Folder in which one named after the VM is made.
    format
        qcow2 (default; raw with cbt-sync and warm-migrate) or raw, written as the bytes arrive; vmdk, vdi or vhdx,
        converted afterwards.
    compression
        Of qcow2, in a second pass: none, zstd or zlib.
    transport
        Road of the disks' bytes: auto, vddk, nbd, folder, ssh or nfc_lease.
    limit_rate
        Bytes a second that the whole run takes at most, such as 60MiB.
    digest
        Of what was read: blake3 or sha256.
    overcommit
        Begin where the room is less than the capacity of thick disks: what is zero takes none.
    connections
        HTTPS connections that a disk or file is read over.
    no_host_tickets
        Read everything through the vCenter, large files too.
    quiesce
        Have VMware Tools flush the guest's file systems before the snapshot.
    allow_crash_consistent
        Where quiescing fails, take a crash-consistent snapshot, and say so.
    vs_snapshot_moref
        Copy from this snapshot, which exists, and leave it alone.
    parallel_disks
        Disks copied side by side.
    skip_readback
        Do not read the images back to verify them; the report says so.
    network_map
        Network of vSphere, colon, network of libvirt; may be given several times. Not named: libvirt's default.
    define
        Put the exported domain into libvirt, not started; refused while the source VM is powered on.
    libvirt_uri
        The libvirt that --define means.
    define_while_source_runs
        Define it although the source VM is powered on.
    include_glob
        With download-vm: only files whose path in the VM's folder matches; may be given several times.
    exclude_glob
        With download-vm: not the files that match; may be given several times.
    max_files
        With download-vm: refuse more files than this before the first byte.
    concurrency
        With download-vm: files downloaded side by side.
    fail_on_missing
        With download-vm: fail where a file that a disk is made of is not there, or any file goes meanwhile.
    snapshot
        With download-vm: freeze a running VM by a snapshot for the duration.
    boot_check
        With export-vm: start the finished copy aside, and fail if it is not seen to boot; the copy is kept.
    boot_timeout
        Seconds that a boot check gives the guest; 0: 120 under KVM, 300 without.
    boot_expect
        Regular expression of what the guest says or shows once it is up; else a login prompt and the like.
    boot_accelerator
        Of a boot check: auto, kvm or tcg.
    scratch
        With boot-check: where what the guest writes lies meanwhile; else beside the images.
    against_source
        With verify: also read a random sample of each disk at the source, while it still holds what was copied.
    sample
        With --against-source, and with warm-migrate in each round: leaves of 256 KiB to read of each disk.
    seed
        With --against-source: of the sample, to read the same one again; 0 is another each time.
    enable_cbt
        With cbt-sync and warm-migrate: switch changed block tracking on where it is off.
    cutover
        With warm-migrate: none, auto (as soon as the forecast fits), at (a time) or approval (in Prefect's UI).
    cutover_at
        When the cutover begins, with its time zone: 2026-05-01T02:00:00+02:00.
    downtime_budget
        Seconds that the VM may be down.
    shut_down_source
        The cutover may shut the source's guest down; there is none without this.
    power_off_source
        It may be powered off as if its plug were pulled, where its guest does not shut down or has no VMware Tools.
    shutdown_timeout
        Seconds that the guest is given to shut down.
    expected_shutdown
        Seconds that it will take, for the forecast; 0: as long as it took before, by the vCenter's events.
    rename_source
        Suffix that the source's name gets at the cutover.
    disconnect_source
        At the cutover, have the source's network cards not connect any more.
    pause
        Seconds between rounds.
    convert_to
        What the domain starts from: a copy as qcow2, raw, vmdk or vdi; else an overlay on the copy.
    vddk_libdir
        Folder of VMware's unpacked VDDK; else VDDK_LIBDIR, else looked for where it usually is.
    nbd_uri
        For the road nbd: URI of a server, with blanks ({moref}, {number}, …) that are filled for a disk.
    nbd_command
        For the road nbd, instead: a command that serves NBD on stdin and stdout, or on {socket}; with blanks.
    nbd_ca_file
        PEM file of the CAs that an nbds:// server is believed by.
    nbd_source
        For the road nbd, instead: name of a saved NBD Source.
    esxi_host
        For the road ssh: the ESXi host that has the disks' files; host:port is understood.
    esxi_user
        Account there.
    esxi_host_key
        The host's key, pinned: SHA256:… or a public key.
    esxi_key_file
        File of a private key that the host knows.
    esxi_password_file
        File whose text is the account's password, or the private key's.
    esxi_block
        For the road ssh, instead: name of a saved ESXi Host.
    vddk_disk
        With vddk-export: key, label or number of the disk; else the only one, or the first.
    all_disks
        With vddk-export: every disk of the VM.
    remove
        With janitor: remove what may go; else it is only told.
    wave
        With wave: the YAML or CSV file that describes it.
    mode
        With preflight and wave: export, download_only, vddk_download or cbt_sync, where the wave's file says nothing.
    dry_run
        With wave: check every VM and print the plan; start nothing.
    simulate
        With wave: play the schedule of a fleet of 10,000 VMs (or of the wave's plan, with --wave) and print how long it
        takes; nothing is started.
    json
        Print the result (or the error) as JSON on stdout.
    debug
        Show the run's log, and tracebacks.
    """
    options = {
        "vm_name": vs_vm_name,
        "output_dir": output_dir,
        "transport": transport,
        "limit_rate": limit_rate,
        "overcommit": overcommit,
        "digest": digest,
        **({"format": format} if format else {}),
        "compression": compression,
        "quiesce": quiesce,
        "allow_crash_consistent": allow_crash_consistent,
        "snapshot_moref": vs_snapshot_moref,
        "parallel_disks": parallel_disks,
        "skip_readback": skip_readback,
        "network_map": network_map,
        "define": define,
        "libvirt_uri": libvirt_uri,
        "define_while_source_runs": define_while_source_runs,
        "include_glob": include_glob,
        "exclude_glob": exclude_glob,
        "max_files": max_files,
        "download_only_concurrency": concurrency,
        "fail_on_missing": fail_on_missing,
        "snapshot": snapshot,
        "boot_check": boot_check,
        "boot_timeout_s": boot_timeout,
        "boot_expect": boot_expect,
        "boot_accelerator": boot_accelerator,
        "enable_cbt": enable_cbt,
        "cutover": cutover,
        "cutover_at": cutover_at,
        "downtime_budget": downtime_budget,
        "shut_down_source": shut_down_source,
        "power_off_source": power_off_source,
        "shutdown_timeout": shutdown_timeout,
        "expected_shutdown": expected_shutdown,
        "rename_source": rename_source,
        "disconnect_source": disconnect_source,
        "pause": pause,
        "convert_to": convert_to,
        "sample": sample,
        "vddk_libdir": vddk_libdir,
        "nbd_uri": nbd_uri,
        "nbd_command": nbd_command,
        "nbd_ca_file": nbd_ca_file,
        "nbd_source": nbd_source,
        "esxi_host": esxi_host,
        "esxi_user": esxi_user,
        "esxi_host_key": esxi_host_key,
        "esxi_key_file": esxi_key_file,
        "esxi_password_file": esxi_password_file,
        "esxi_block": esxi_block,
        "disk": vddk_disk,
        "all_disks": all_disks,
    }

    def settings() -> Settings:
        host, user = _given("--vcenter", vcenter, vs_action), _given("--username", username, vs_action)
        return Settings(
            host=host,
            username=user,
            password=password_from(password_file, username=user, host=host),
            port=port,
            ca_file=ca_file,
            thumbprint=thumbprint,
            verify=not no_verify,
            connections=connections,
            host_tickets=not no_host_tickets,
        )

    def act() -> int:
        if vs_action in MODES:
            chosen = options | {"export_mode": MODES[vs_action]}
            return _run_mode(_checked(chosen, vs_action), settings(), json=json)
        if vs_action == "list-vms":
            return _list(what or "*", settings(), json=json)
        if vs_action == "verify":
            folder = Path(_given("The folder", what, vs_action)).absolute()
            job = VerifyJob(folder=folder, against_source=against_source, sample=sample, seed=seed)
            return _verify(job, settings() if against_source else None, json=json)
        if vs_action == "rollback":
            folder = Path(_given("The folder", what, vs_action)).absolute()
            return _rollback(RollbackJob(folder=folder), settings(), json=json)
        if vs_action == "boot-check":
            boot = {"timeout_s": boot_timeout, "expect": boot_expect, "accelerator": boot_accelerator}
            folder = Path(_given("The folder", what, vs_action)).absolute()
            return _boot_check(BootJob(folder=folder, scratch=str(scratch or ""), boot=boot), json=json)
        if vs_action == "janitor":
            folders = (Path(what).absolute(),) if what else ()
            return _janitor(JanitorJob(folders=folders, remove=remove), settings() if vcenter else None, json=json)
        if vs_action == "preflight":
            selected = [each for each in (vs_vm_name, what) if each]
            check = fleet.preflight_job(_given("--vs-vm-name", selected or None, vs_action), mode, options)
            return fleet.preflight(check, settings(), json=json, shown=_shown)
        if vs_action == "wave" and simulate and wave is None:
            return fleet.simulate_fleet(json=json)
        if vs_action == "wave":
            plan = fleet.wave_of(_given("--wave", wave, vs_action), mode, options, dry_run=dry_run or simulate)
            return fleet.run_wave(plan, settings(), simulate=simulate, json=json, shown=_shown)
        actions = f"{', '.join(ACTIONS[:-1])} or {ACTIONS[-1]}"
        raise InvalidInput(what="--vs-action", why=f"unknown {vs_action!r}", remedy=f"Use {actions}")

    _quiet_logs(debug)
    return _at_the_edge(act, json=json, debug=debug)


def _checked(options: dict[str, Any], action: str) -> ExportOptions:
    for flag, field in (("--vs-vm-name", "vm_name"), ("--output-dir", "output_dir")):
        _given(flag, options[field], action)
    return ExportOptions(**options)


def _given(flag: str, value: T | None, action: str) -> T:
    if value is None:
        raise InvalidInput(what=flag, why=f"{action} needs it", remedy="See --help")
    return value


def _list(glob: str, settings: Settings, *, json: bool) -> int:
    """Print the VMs that match, page by page: path, moref, power; with `json` one object a line."""
    from tasks.vsphere.lookup import list_vms
    from tasks.vsphere.session import borrow

    with borrow(settings.connection()) as session:
        for page in list_vms(session, glob):
            for vm in page:
                print(vm.model_dump_json() if json else f"{one_line(vm.path)}\t{vm.moref}\t{vm.power}")
            sys.stdout.flush()
    return 0


def _run_mode(options: ExportOptions, settings: Settings, *, json: bool) -> int:
    job = options.job()  # what cannot be done is refused before anything is loaded
    started = time.monotonic()

    def flow() -> FlowCall[Manifest | DownloadManifest | Migration]:
        from flows.run import flow_of

        return flow_of(options, settings.vcenter())

    manifest = _shown(flow)
    if json:
        print(manifest.model_dump_json(indent=2))
    else:
        console = stdout()
        for line in summary(manifest, job, time.monotonic() - started):
            console.print(one_line(line))
        if isinstance(job, StartableJob) and job.boot_check:
            from tasks.boot import last_check

            console.print(boot_line(last_check(job.output_dir / safe_name(vm_of(manifest).name))))
    return 0


def _rollback(job: RollbackJob, settings: Settings, *, json: bool) -> int:
    """Put the source of a migration back, and print what that took."""

    def flow() -> FlowCall[tuple[str, ...]]:
        from flows.rollback import rollback

        return partial(rollback, vcenter=settings.vcenter(), options=job)

    done = _shown(flow, stopping="Stopping: what is undone by then stays undone")
    if json:
        print(jsonlib.dumps({"folder": str(job.folder), "done": done}))
    else:
        stdout().print(one_line(f"The source is put back: {', '.join(done) or 'nothing was done to it'}"))
    return 0


def _verify(job: VerifyJob, settings: Settings | None, *, json: bool) -> int:
    """Run a verification and print what it found, equal or not; the failure itself is told on stderr."""

    def flow() -> FlowCall[Verification]:
        from flows.verify import verify_copy

        return partial(verify_copy, options=job, vcenter=settings.vcenter() if settings else None)

    with nobody_at_work(job.folder):
        read_manifest(job.folder)  # what is no copy is refused before Prefect is loaded
    failure: IntegrityMismatch | None = None
    try:
        found = _shown(flow, stopping="Stopping: nothing was changed")
    except IntegrityMismatch as error:
        failure, found = error, error.found
    if json:
        told = _as_json(failure) if failure else {}
        print(jsonlib.dumps(told | found.model_dump(mode="json"), indent=2))
    else:
        show_verification(found, stdout())
    if failure:
        _tell(failure, json=False)
    return failure.exit_status if failure else 0


def _boot_check(job: BootJob, *, json: bool) -> int:
    """Run a boot check and print what it rests on; one that proves nothing is told as the failure that it is."""

    def flow() -> FlowCall[BootCheck]:
        from flows.boot_check import boot_check

        return partial(boot_check, options=job)

    need_tools(uefi=boots_by_uefi(read_domain(job.folder)))  # what cannot be is refused before Prefect is loaded
    check = _shown(flow, stopping="Stopping: the guest is ended, and nothing of it stays")
    if json:
        print(check.model_dump_json(indent=2))
    else:
        stdout().print(boot_line(check))
    return 0


def _janitor(job: JanitorJob, settings: Settings | None, *, json: bool) -> int:
    """Run the janitor on one vCenter, or on all that are saved, and print what it found, done or not."""

    def flow() -> FlowCall[JanitorReport]:
        from flows.snapshot_janitor import snapshot_janitor

        return partial(snapshot_janitor, options=job, vcenter=settings.vcenter() if settings else None)

    failure: JanitorUnfinished | None = None
    try:
        report = _shown(flow, stopping="Stopping: what is being removed is waited for")
    except JanitorUnfinished as error:
        failure, report = error, error.found
    if json:
        told = _as_json(failure) if failure else {}
        print(jsonlib.dumps(told | report.model_dump(mode="json"), indent=2))
    else:
        for line in janitor_lines(report):
            stdout().print(line, markup=False, highlight=False, soft_wrap=True)
    if failure:
        _tell(failure, json=False)
    return failure.exit_status if failure else 0


def _shown(flow: Callable[[], FlowCall[T]], *, stopping: str = STOPPING) -> T:
    """Load Prefect, run the flow that `flow` then returns, with its meters and lines shown, and return its result."""
    with Board(stderr()) as board:
        board.say("Loading Prefect")
        from flows.run import run_flow
        from tasks.steps import METER_LISTENER

        async def run() -> T:
            METER_LISTENER.set(board.listen)
            return await run_flow(flow(), say=board.say)

        return _run(run(), say=board.say, stopping=stopping)


def _run(work: Coroutine[Any, Any, T], *, say: Callable[[str], None], stopping: str = STOPPING) -> T:
    """Run a coroutine; the first SIGINT or SIGTERM cancels it, and it is let clean up, however often they come.

    stopping: what is said then.

    It runs in a thread of its own: in the main one Prefect puts a handler of its own in place of ours.
    """
    ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = Future()

    async def body() -> T:
        task = asyncio.ensure_future(work)
        ready.set_result((asyncio.get_running_loop(), task))
        return await task

    def stop(*_: object) -> None:
        loop, task = ready.result()
        if not (task.done() or task.cancelling()):
            say(stopping)
            loop.call_soon_threadsafe(task.cancel)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="flow") as pool:
        running = pool.submit(asyncio.run, body())
        ready.result()
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, stop)
            return running.result()
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # what is left is to tell what happened


def _at_the_edge(act: Callable[[], int], *, json: bool, debug: bool) -> int:
    """Return the exit status of `act`; what goes wrong is one line of cause, then the remedy, and no traceback."""
    try:
        return act()
    except (asyncio.CancelledError, KeyboardInterrupt):
        error: Hyper2KvmError = InvalidInput(
            what="Interrupted", why="the run was stopped", remedy="Nothing was given a final name; run it again"
        )
        status = INTERRUPTED
    except Hyper2KvmError as failure:
        error, status = failure, failure.exit_status
    except ValidationError as failure:
        first = failure.errors()[0]
        error = InvalidInput(
            what=".".join(map(str, first["loc"])) or "options", why=first["msg"], remedy="See --help for what it takes"
        )
        status = error.exit_status
    except Exception as failure:
        if debug:
            raise
        error = InvalidInput(
            what=f"Internal error ({type(failure).__name__})",
            why=str(failure),
            remedy="Run with --debug, and report it",
        )
        status = 70  # sysexits.h EX_SOFTWARE
    _tell(error, json=json)
    return status


def _tell(error: Hyper2KvmError, *, json: bool) -> None:
    if json:
        print(jsonlib.dumps(_as_json(error)))
    console = stderr()
    show_error(error, say=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))


def _as_json(error: Hyper2KvmError) -> dict[str, Any]:
    return {"error": type(error).__name__, "cause": error.cause, "remedy": error.remedy, "detail": error.detail}


def _quiet_logs(debug: bool) -> None:
    """Keep Prefect's own lines and tracebacks off the terminal; a server it reports to has them all the same."""
    level = "DEBUG" if debug else "CRITICAL"
    for setting in ("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "PREFECT_LOGGING_INTERNAL_LEVEL"):
        os.environ.setdefault(setting, level)
