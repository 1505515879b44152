"""Names on a local disk: given only when complete, durably, and never over something that is there."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from tasks.errors import DiskFull, OutputExists

PART = ".part"
NAME_BYTES = 200  # of the 255 that Linux file systems allow: room for what other tools append
BLOCK_BYTES = 4096  # of a file system: what a new name takes at most
RENAME_NOREPLACE = 1  # linux/fs.h
AT_FDCWD = -100

_TAG = re.compile(r"-[0-9a-f]{12}$")
_libc = ctypes.CDLL(None, use_errno=True)


def part_of(final: Path) -> Path:
    """Return the name that `final` has until it is complete and verified."""
    return final.with_name(final.name + PART)


def publish(part: Path, final: Path) -> None:
    """Make `part` durable and name it `final`, durably. Raises OutputExists, DiskFull; then `part` stays as it is."""
    with naming_full_disk(final, need=BLOCK_BYTES):
        sync(part)
        try:
            _rename_without_replacing(part, final)
        except FileExistsError as error:
            raise OutputExists(path=str(final), why="something was put there during the run") from error
        sync(final.parent)


@contextmanager
def new_file(path: Path, *, need: int = BLOCK_BYTES) -> Iterator[int]:
    """Yield the descriptor of an empty file, closed if the block fails; what was there under that name (a `*.part`)
    is emptied. Raises DiskFull, where `need` bytes do not fit or the block says so.
    """
    with naming_full_disk(path, need=need):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
        try:
            yield fd
        except BaseException:
            os.close(fd)
            raise


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`, whole and durable, or leave it as it was. Raises DiskFull."""
    part, content = part_of(path), text.encode()
    with naming_full_disk(path, need=len(content)):
        part.write_bytes(content)
        sync(part)
        part.replace(path)
        sync(path.parent)


def append_durably(path: Path, text: str) -> None:
    """Write `text` at the end of a file that is there, durably. A kill, or DiskFull, may leave the beginning of it."""
    content = memoryview(text.encode())
    with naming_full_disk(path, need=len(content)), path.open("ab", buffering=0) as file:
        while content:
            content = content[file.write(content) :]
        os.fdatasync(file.fileno())


def sync(path: Path) -> None:
    """Return once the file or folder `path` is durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user may still write on the file system where `folder` is, or would be made."""
    there = os.statvfs(next(each for each in (folder, *folder.absolute().parents) if each.exists()))
    return there.f_bavail * there.f_frsize


def allocated_bytes(path: Path) -> int:
    """Return what `path` takes of its file system; nothing where it is not there."""
    return path.stat().st_blocks * 512 if path.exists() else 0  # stat(2): of 512 bytes, whatever the file system's


def need_space(folder: Path, need_bytes: int) -> None:
    """Raise DiskFull where the file system of `folder` has less than `need_bytes` left."""
    have = free_bytes(folder)
    if have < need_bytes:
        raise DiskFull(path=str(folder), need=need_bytes, have=have)


@contextmanager
def naming_full_disk(path: Path, *, need: int) -> Iterator[None]:
    """Turn "no space" and "over quota" into DiskFull: `need` bytes were to be written just now."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(path=str(path), need=need, have=free_bytes(path.parent)) from error


def safe_name(name: str) -> str:
    """Return `name` (of a VM, decoded) as the name of one folder: no path, nothing hidden, nothing unprintable.

    A name that has to be changed, or that looks as if it had been, ends in a hash of the original, so that two
    names never share a folder.
    """
    plain = "".join("_" if _unfit(c) else c for c in name)
    plain = re.sub(r"^$|^[.\-\s]|\s$", "_", plain)
    if plain == name and plain and len(os.fsencode(plain)) <= NAME_BYTES and not _TAG.search(plain):
        return plain
    tag = "-" + blake3(name.encode("utf-8", "surrogatepass")).hexdigest(length=6)
    return plain.encode()[: NAME_BYTES - len(tag)].decode(errors="ignore") + tag


def _unfit(character: str) -> bool:
    """Tell whether a character is a slash, a control, a format or a surrogate, or ends a line."""
    return character == "/" or unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _rename_without_replacing(old: Path, new: Path) -> None:
    if _libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), RENAME_NOREPLACE) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number), str(old), None, str(new))
    os.link(old, new)  # NFS knows no RENAME_NOREPLACE; a crash in between leaves both names, of one file
    old.unlink()
