"""Putting a domain into libvirt through virsh, and seeing beforehand that there is room for it under its name."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

from tasks import process
from tasks.errors import NotDefined, ToolFailed

PACKAGE = "libvirt-clients"
ANSWER_S = 300.0  # a libvirtd that was just started asks every QEMU what it can, for minutes on a busy machine
MOST_LINES = 100_000  # of a list of domains


def refuse_others(uri: str, *, name: str, uuid: str, folder: Path) -> None:
    """Raise NotDefined where libvirt has a domain of that name or UUID, unless it is ours: on images in `folder`.

    Raises ToolFailed where libvirt does not answer.
    """
    for known_uuid, known_name in _domains(uri):
        if known_name != name and known_uuid != uuid:
            continue
        if (known_name, known_uuid) != (name, uuid) or not all(each.parent == folder for each in _files(uri, uuid)):
            raise NotDefined(
                name=name,
                uri=uri,
                reason=f"there is a domain {known_name!r} with UUID {known_uuid} already, and not of this folder",
                remedy="Undefine or rename that one, or leave --define out",
            )


def define(uri: str, domain_xml: Path) -> None:
    """Define a domain, or what it is from now on where it is there already. Raises ToolFailed."""
    _virsh(uri, "define", "--validate", str(domain_xml))


def undefine_stopped(uri: str, name: str) -> str:
    """Take a domain out of libvirt, unless it runs; return its state, "shut off" where it was, "" where there is none.

    Its images stay. Raises ToolFailed.
    """
    if name not in [known for _, known in _domains(uri)]:
        return ""
    state = _virsh(uri, "domstate", name).strip()
    if state == "shut off":
        _virsh(uri, "undefine", "--keep-nvram", "--keep-tpm", name)
    return state


def _domains(uri: str) -> Iterator[tuple[str, str]]:
    """Yield UUID and name of every domain, running or not."""
    for line in _virsh(uri, "list", "--all", "--uuid", "--name").splitlines():
        uuid, _, name = line.partition(" ")
        yield uuid, name


def _files(uri: str, uuid: str) -> list[Path]:
    """Return the files of a domain's drives; `-` is an empty one's."""
    lines = _virsh(uri, "domblklist", "--inactive", uuid).splitlines()
    return [Path(file) for _, file in (line.split(maxsplit=1) for line in lines) if file != "-"]


def _virsh(uri: str, *words: str) -> str:
    argv = ["virsh", "--quiet", "--connect", uri, *words]
    try:
        return process.run(argv, timeout_s=ANSWER_S, package=PACKAGE, keep_lines=MOST_LINES)
    except TimeoutError as error:
        remedy = f"See that libvirt answers: virsh --connect {uri} list"
        lines = (f"{words[0]} had no answer within {ANSWER_S:.0f} s",)
        raise ToolFailed(argv=tuple(argv), status=-signal.SIGKILL, last_lines=lines, remedy=remedy) from error
