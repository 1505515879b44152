"""Which files of a VM are downloaded, and whether their names can stand in a folder of ours. Names only, no I/O."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from tasks.errors import FileUnfit, InvalidInput
from tasks.models import DatastoreFile, LeftOut

NAME_BYTES = 255  # limits.h: NAME_MAX of Linux file systems
OURS = (".hyper2kvm", "manifest.json")  # what names of ours begin with, at the top of a VM's folder
LOST = "\ufffd"  # what a server puts in place of a character that XML cannot carry
LEAVE_OUT = "Leave it out (--exclude-glob), or rename it in vSphere"
RUNNING = {
    "*.lck": "a lock of a running VM",
    "*.lck/*": "a lock of a running VM",
    "*.vmx~": "a file that a running VM is writing",
    "*.vswp": "swap of a running VM",
    "*.log": "a log that a running VM is writing",
    "*-ctk.vmdk": "a map of changes that a running VM is writing",
}


def select(
    files: Iterable[DatastoreFile], *, include: Sequence[str], exclude: Sequence[str], running: bool
) -> tuple[tuple[DatastoreFile, ...], tuple[LeftOut, ...]]:
    """Return the files to download, and those left out with the reason.

    Globs are matched with case, on the path inside the VM's folder; `*` matches `/` too.
    """
    chosen, left_out = [], []
    for file in files:
        why = _why_not(file.path, include, exclude, running)
        if why:
            left_out.append(LeftOut(path=file.path, why=why))
        else:
            chosen.append(file)
    return tuple(chosen), tuple(left_out)


def _why_not(path: str, include: Sequence[str], exclude: Sequence[str], running: bool) -> str:
    for glob, why in RUNNING.items() if running else ():
        if fnmatchcase(path, glob):
            return why
    for glob in exclude:
        if fnmatchcase(path, glob):
            return f"it matches {glob}"
    return "" if not include or any(fnmatchcase(path, glob) for glob in include) else "it matches no include glob"


def check_count(files: Sequence[DatastoreFile], *, max_files: int) -> None:
    """Raise InvalidInput where there are no files, or more than `max_files`."""
    if not files:
        raise InvalidInput(what="files", why="none is left to download", remedy="Look at the include and exclude globs")
    if len(files) > max_files:
        raise InvalidInput(
            what="files",
            why=f"there are {len(files)} to download, and at most {max_files} are allowed",
            remedy="Allow more (--max-files), or choose some (--include-glob, --exclude-glob)",
        )


def check_names(files: Sequence[DatastoreFile]) -> None:
    """Raise FileUnfit for the first name that leads out of the folder, cannot be shown, is ours, or collides."""
    seen: dict[str, str] = {}
    for file in files:
        reason = _unfit(file.path)
        if reason:
            raise FileUnfit(path=repr(file.path), reason=reason, remedy=LEAVE_OUT)
    for file in files:
        same = unicodedata.normalize("NFC", file.path).casefold()
        if same in seen:
            raise _collision(file.path, seen[same])
        seen[same] = file.path
    for file in files:
        parts = unicodedata.normalize("NFC", file.path).casefold().split("/")
        for length in range(1, len(parts)):
            if (above := "/".join(parts[:length])) in seen:
                raise _collision(file.path, seen[above])


def _collision(path: str, other: str) -> FileUnfit:
    return FileUnfit(path=repr(path), reason=f"its name collides with that of {other!r}", remedy=LEAVE_OUT)


def _unfit(path: str) -> str:
    parts = path.split("/")
    if path.startswith("/") or any(part in ("", ".", "..") for part in parts):
        return "its name leads out of the folder"
    if any(sign == LOST or unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp") for sign in path):
        return "its name has characters that cannot be shown"
    if any(len(part.encode()) > NAME_BYTES for part in parts):
        return f"its name is longer than {NAME_BYTES} bytes"
    if parts[0].casefold().startswith(OURS):
        return "the name is one of ours in a download's folder"
    return ""
