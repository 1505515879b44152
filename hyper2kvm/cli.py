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
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cyclopts import App, Parameter
from pydantic import ValidationError
from rich.console import Console

from hyper2kvm import __version__
from hyper2kvm.settings import Settings, password_from
from hyper2kvm.terminal import Board, show_error, stderr, summary
from tasks.errors import Hyper2KvmError, InvalidInput, NotBuilt
from tasks.models import CONNECTIONS, DownloadManifest, ExportOptions, Manifest
from tasks.text import one_line

LATER_ACTIONS = ("cbt-sync", "preflight", "verify", "boot-check")
MODES = {"export-vm": "export", "download-vm": "download_only", "vddk-export": "vddk_download"}
INTERRUPTED = 130  # what a shell reports for a program ended by SIGINT

T = TypeVar("T")

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
    glob: str = "*",
    /,
    *,
    vs_action: str,
    vcenter: str,
    username: str,
    password_file: Path | None = None,
    port: int | None = None,
    ca_file: str | None = None,
    thumbprint: str | None = None,
    no_verify: Annotated[bool, Parameter(negative=())] = False,
    vs_vm_name: str | None = None,
    output_dir: Path | None = None,
    format: str = "qcow2",
    compression: str = "none",
    transport: str = "auto",
    limit_rate: str = "",
    connections: int = CONNECTIONS,
    no_host_tickets: Annotated[bool, Parameter(negative=())] = False,
    quiesce: Annotated[bool, Parameter(negative=())] = False,
    allow_crash_consistent: Annotated[bool, Parameter(negative=())] = False,
    vs_snapshot_moref: str | None = None,
    parallel_disks: int = 2,
    skip_readback: Annotated[bool, Parameter(negative=())] = False,
    include_glob: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    exclude_glob: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    max_files: int = 1000,
    concurrency: int = 3,
    fail_on_missing: Annotated[bool, Parameter(negative=())] = False,
    snapshot: Annotated[bool, Parameter(negative=())] = False,
    vddk_libdir: Path | None = None,
    vddk_disk: str = "",
    all_disks: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
    debug: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Work on the VMs of a vCenter or ESXi host.

    Parameters
    ----------
    glob
        With list-vms: only VMs whose name or inventory path matches.
    vs_action
        export-vm, download-vm, vddk-export or list-vms.
    vcenter
        Name or address; host:port is understood.
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
        qcow2 or raw, written as the bytes arrive; vmdk, vdi or vhdx, converted afterwards.
    compression
        Of qcow2, in a second pass: none, zstd or zlib.
    transport
        Road of the disks' bytes: auto, folder or vddk.
    limit_rate
        Bytes a second that the whole run takes at most, such as 60MiB.
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
    include_glob
        With download-vm: only files whose path in the VM's folder matches; may be given several times.
    exclude_glob
        With download-vm: not the files that match; may be given several times.
    max_files
        With download-vm: refuse more files than this before the first byte.
    concurrency
        With download-vm: files downloaded side by side.
    fail_on_missing
        With download-vm: fail where a disk's file that the configuration names is not there.
    snapshot
        With download-vm: freeze a running VM by a snapshot for the duration.
    vddk_libdir
        Folder of VMware's unpacked VDDK; looked for where it usually is, if not said.
    vddk_disk
        With vddk-export: key, label or number of the disk; else the only one, or the first.
    all_disks
        With vddk-export: every disk of the VM.
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
        "format": format,
        "compression": compression,
        "quiesce": quiesce,
        "allow_crash_consistent": allow_crash_consistent,
        "snapshot_moref": vs_snapshot_moref,
        "parallel_disks": parallel_disks,
        "skip_readback": skip_readback,
        "include_glob": include_glob,
        "exclude_glob": exclude_glob,
        "max_files": max_files,
        "download_only_concurrency": concurrency,
        "fail_on_missing": fail_on_missing,
        "snapshot": snapshot,
        "vddk_libdir": vddk_libdir,
        "disk": vddk_disk,
        "all_disks": all_disks,
    }

    def settings() -> Settings:
        return Settings(
            host=vcenter,
            username=username,
            password=password_from(password_file, username=username, host=vcenter),
            port=port,
            ca_file=ca_file,
            thumbprint=thumbprint,
            verify=not no_verify,
            connections=connections,
            host_tickets=not no_host_tickets,
        )

    def act() -> int:
        if vs_action in MODES:
            mode = {"export_mode": MODES[vs_action]}
            return _run_mode(_checked(options | mode, vs_action), settings(), json=json)
        if vs_action == "list-vms":
            return _list(glob, settings(), json=json)
        if vs_action in LATER_ACTIONS:
            raise NotBuilt(what=f"--vs-action {vs_action}", instead=f"{', '.join(MODES)} or list-vms")
        raise InvalidInput(
            what="--vs-action", why=f"unknown {vs_action!r}", remedy=f"Use {', '.join(MODES)} or list-vms"
        )

    _quiet_logs(debug)
    return _at_the_edge(act, json=json, debug=debug)


def _checked(options: dict[str, Any], action: str) -> ExportOptions:
    for flag, field in (("--vs-vm-name", "vm_name"), ("--output-dir", "output_dir")):
        if options[field] is None:
            raise InvalidInput(what=flag, why=f"{action} needs it", remedy="See --help")
    return ExportOptions(**options)


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
    options.job()  # what cannot be done is refused before anything is loaded
    started = time.monotonic()
    with Board(stderr()) as board:
        board.say("Loading Prefect")
        from flows.run import run_mode
        from tasks.steps import METER_LISTENER

        async def run() -> Manifest | DownloadManifest:
            METER_LISTENER.set(board.listen)
            return await run_mode(options, settings.vcenter(), say=board.say)

        manifest = _run(run(), say=board.say)
    if json:
        print(manifest.model_dump_json(indent=2))
    else:
        console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        for line in summary(manifest, options.output_dir, time.monotonic() - started):
            console.print(one_line(line))
    return 0


def _run(work: Coroutine[Any, Any, T], *, say: Callable[[str], None]) -> T:
    """Run a coroutine; the first SIGINT or SIGTERM cancels it, and it is let clean up, however often they come.

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
            say("Stopping: the transfer ends, then the snapshot is removed")
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
        told = {"error": type(error).__name__, "cause": error.cause, "remedy": error.remedy, "detail": error.detail}
        print(jsonlib.dumps(told))
    console = stderr()
    show_error(error, say=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))


def _quiet_logs(debug: bool) -> None:
    """Keep Prefect's own lines and tracebacks off the terminal; a server it reports to has them all the same."""
    level = "DEBUG" if debug else "CRITICAL"
    for setting in ("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "PREFECT_LOGGING_INTERNAL_LEVEL"):
        os.environ.setdefault(setting, level)
