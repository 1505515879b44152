"""Step: whether a finished copy boots, with the picture among the run's artifacts and beside the images."""

from __future__ import annotations

import base64
import re
import threading
from pathlib import Path

from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks.errors import BootFailed, BootUnproven
from tasks.images.boot import boot
from tasks.images.files import write_atomically
from tasks.models import BootCheck, BootWishes
from tasks.steps import in_thread, quietly
from tasks.text import cell, fenced, one_line

PICTURE, LOG, RESULT = "boot-check.png", "boot-check.log", "boot-check.json"
VERDICTS = {"boots": "It boots", "fails": "It does not boot", "unknown": "To be looked at"}
PICTURE_BYTES = 4 * 1024 * 1024  # of a picture that is put into an artifact, which lies in Prefect's database


@task(name="boot-check", task_run_name="boot check of {folder}", cache_policy=NO_CACHE)
async def check_boot(folder: Path, wishes: BootWishes, *, scratch: Path | None = None) -> BootCheck:
    """Start the domain of `folder` aside and tell what came of it; leave that beside the images and as an artifact.

    Raises ToolMissing, InvalidInput, FileLocked, UnsupportedDisk, ToolFailed; see `proven` for the verdict.
    """
    stop = threading.Event()
    check, png, said = await in_thread(boot, stop, folder, wishes, scratch=scratch, stop=stop)
    (folder / PICTURE).write_bytes(png)
    write_atomically(folder / LOG, said)
    write_atomically(folder / RESULT, check.model_dump_json(indent=2) + "\n")
    key, description = f"boot-check-{key_of(check.domain)}", f"Boot check of {one_line(check.domain)}"
    await quietly(acreate_markdown_artifact(markdown(check, png, folder), key=key, description=description))
    get_run_logger().info("boot check domain=%s verdict=%s by=%s", check.domain, check.verdict, check.accelerator)
    return check


def proven(check: BootCheck, folder: Path) -> BootCheck:
    """Return `check` where it proves that the domain boots. Raises BootFailed, BootUnproven."""
    if check.verdict == "boots":
        return check
    failure = BootFailed if check.verdict == "fails" else BootUnproven
    raise failure(domain=check.domain, recognised=check.recognised, folder=str(folder))


def last_check(folder: Path) -> BootCheck:
    """Return what the last boot check of `folder` found."""
    return BootCheck.model_validate_json((folder / RESULT).read_bytes())


def key_of(name: str) -> str:
    """Return a domain's name as a part of an artifact's key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "vm"


def markdown(check: BootCheck, png: bytes, folder: Path) -> str:
    """Return the report of a boot check as GitHub markdown, the picture in it."""
    lines = [
        f"# Boot check of {cell(check.domain)}",
        "",
        f"**{VERDICTS[check.verdict]}:** {cell(check.recognised)}",
        "",
        "| | |",
        "| --- | --- |",
        f"| Folder | {cell(str(folder))} |",
        f"| Started by | libvirt and QEMU, {check.accelerator} |",
        f"| Watched | {check.seconds:.1f} s |",
        *(f"| Note | {cell(note)} |" for note in check.notes),
        "",
        "## Screen",
        "",
        _picture(png),
        "",
        *(("## Text on the screen", "", fenced(check.screen_text), "") if check.screen_text else ()),
        "## Serial port",
        "",
        fenced(check.serial_tail or ("(silent)",)),
    ]
    return "\n".join(lines)


def _picture(png: bytes) -> str:
    """Return a picture as a data URI: both of Prefect's UIs show that, and neither a file."""
    if not png:
        return "There was none."
    if len(png) > PICTURE_BYTES:
        return f"Too large to be shown here: see `{PICTURE}`."
    return f"![what the screen showed last](data:image/png;base64,{base64.b64encode(png).decode()})"
