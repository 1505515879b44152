"""QEMU's tools on local images: convert, check, and serve over NBD. What they do with bytes is theirs."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tasks import process
from tasks.errors import DiskFull, FileLocked, IntegrityMismatch, InvalidInput, ToolFailed, UnsupportedDisk
from tasks.images.files import allocated_bytes, free_bytes, need_space, sync
from tasks.models import Compression, ImageFormat
from tasks.nbd import NbdClient

PACKAGE = "qemu-utils"
START_S = 10.0  # for qemu-nbd to serve
LOCK_S = 10.0  # for a process that is dying to let go of an image
POLL_S = 0.05
CONNECTIONS = 4
EMPTY_BYTES = 4 * 64 * 1024  # of a qcow2: header, refcount table and block, L1 table, a cluster each

_CORRUPT, _LEAKED = 2, 3  # exit statuses of qemu-img check (its man page)
_QCOW2_HEADER = struct.Struct(">4sIQII Q 40x Q")  # docs/interop/qcow2.txt: up to the incompatible features
_DATA_FILE_BIT = 1 << 2

_FLOCK = struct.Struct("hhqqi4x")  # struct flock, fcntl(2)
# Bytes that QEMU locks (block/file-posix.c): 100 + i for a permission that it uses, 200 + i for one it denies others.
_WRITERS = (101, 3)  # write, write unchanged, resize
_ANYBODY = (100, 128)


def create(path: Path, *, size: int) -> None:
    """Start an empty qcow2 image of `size` bytes in place of what is there, once no dying process holds that.

    Raises FileLocked, DiskFull, ToolFailed.
    """
    if path.exists():
        _wait_for_lock(path, read_only=False)
        path.unlink()
    try:
        process.run(["qemu-img", "create", "-q", "-f", "qcow2", named(path), str(size)], package=PACKAGE)
    except ToolFailed:
        need_space(path.parent, EMPTY_BYTES)
        raise


def overlay(image: Path, target: Path, *, format: str) -> None:
    """Start a qcow2 image that reads as `image` does and takes every write instead of it.

    Raises FileLocked, UnsupportedDisk, InvalidInput, ToolFailed.
    """
    if not image.is_file():
        raise InvalidInput(what=f"image {image}", why="it is not there", remedy="Put it back where the domain has it")
    if format in ("raw", "qcow2"):
        virtual_size(image, format="raw" if format == "raw" else "qcow2")
    _wait_for_lock(image, read_only=True)
    backing = ["-b", named(image), "-F", format]
    process.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, named(target)], package=PACKAGE)


def convert(
    source: Path,
    target: Path,
    *,
    source_format: ImageFormat,
    target_format: ImageFormat,
    compression: Compression = "none",
    progress: Callable[[float], None] | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Convert an image to a new file `target`, which is overwritten. progress: called with 0..100.

    Durable on return. Raises DiskFull, ToolFailed, or Stopped once `stop` is set; the target is worthless then.
    """
    _need_room(source, target)
    formats = ["-f", source_format, "-O", target_format, "-t", _cache(target.parent)]
    packed = ["-c", "-o", f"compression_type={compression}"] if compression != "none" else []
    argv = ["qemu-img", "convert", "-p", *formats, *packed, named(source), named(target)]
    try:
        process.run(argv, progress=progress, stop=stop, package=PACKAGE)
    except ToolFailed as error:
        _need_room(source, target, after=error)
        raise
    sync(target)


def _need_room(source: Path, target: Path, *, after: ToolFailed | None = None) -> None:
    """Raise DiskFull where `target` cannot hold what `source` has allocated; what it holds already is overwritten."""
    need, have = allocated_bytes(source), free_bytes(target.parent) + allocated_bytes(target)
    if have < need:
        raise DiskFull(path=str(target), need=need, have=have) from after


def check(
    path: Path, *, format: ImageFormat = "qcow2", mend_leaks: bool = False, stop: threading.Event | None = None
) -> None:
    """Raise IntegrityMismatch where the metadata of an image is damaged or leaks clusters. Raw has none to check.

    mend_leaks: give clusters back that nothing refers to, as a writer leaves them that was killed. Raises FileLocked.
    """
    if format == "raw":
        return
    _wait_for_lock(path, read_only=not mend_leaks)
    mending = ["-r", "leaks"] if mend_leaks else []
    try:
        process.run(["qemu-img", "check", "-q", *mending, "-f", format, named(path)], stop=stop, package=PACKAGE)
    except ToolFailed as error:
        if error.status not in (_CORRUPT, _LEAKED):
            raise
        raise IntegrityMismatch(path=str(path), where=f"qemu-img check: {' '.join(error.last_lines)}") from error


def virtual_size(path: Path, *, format: Literal["raw", "qcow2"]) -> int:
    """Return the size in bytes that a guest sees.

    Read from the header, not by qemu-img, which follows what an untrusted header names (CVE-2024-4467). Raises
    UnsupportedDisk where it names another file, IntegrityMismatch where it is no header of that format.
    """
    if format == "raw":
        return path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_QCOW2_HEADER.size)
    if len(header) < _QCOW2_HEADER.size or not header.startswith(b"QFI\xfb"):
        raise IntegrityMismatch(path=str(path), where="it has no qcow2 header")
    _, version, backing, _, _, size, features = _QCOW2_HEADER.unpack(header)
    if backing or (version >= 3 and features & _DATA_FILE_BIT):
        what = "a backing file" if backing else "an external data file"
        raise UnsupportedDisk(disk=str(path), reason=f"it names {what}", remedy="Give an image that stands by itself")
    return int(size)


def resize(path: Path, *, format: Literal["raw", "qcow2"], size: int) -> None:
    """Make an image one of `size` bytes; what is added reads as zeros. Raises FileLocked, ToolFailed, DiskFull.

    May be killed, and called again.
    """
    if format == "raw":
        os.truncate(path, size)
    elif virtual_size(path, format=format) != size:
        _wait_for_lock(path, read_only=False)
        argv = ["qemu-img", "resize", "-q", "--shrink", "-f", format, named(path), str(size)]
        process.run(argv, package=PACKAGE)


def takes_direct(path: Path) -> bool:
    """Tell whether the file system lets a file (or, of a folder, a new file in it) be opened with O_DIRECT."""
    try:
        if path.is_dir():
            with tempfile.NamedTemporaryFile(dir=path, prefix=".direct-") as probe:
                return takes_direct(Path(probe.name))
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def _cache(path: Path) -> str:
    """Return how QEMU is to open a file: past the page cache where the file system lets it."""
    return "none" if takes_direct(path) else "writeback"


@contextmanager
def qemu_nbd(
    path: Path,
    *,
    format: ImageFormat,
    read_only: bool = True,
    connections: int = CONNECTIONS,
) -> Iterator[Path]:
    """Serve an image for the block, past the page cache where that can be; yield the path of the unix socket.

    Ends with the thread that enters.

    Raises FileLocked where another process keeps the image, ToolFailed where qemu-nbd will not serve it, or died of
    what the block asked of it.
    """
    if format == "qcow2":
        virtual_size(path, format=format)
    _wait_for_lock(path, read_only=read_only)
    with tempfile.TemporaryDirectory(prefix="hyper2kvm-") as folder:
        address = Path(folder) / "nbd"
        options = ["-f", format, "--persistent", "-e", str(connections), "--cache", _cache(path), "-k", str(address)]
        rights = ["--read-only"] if read_only else ["--discard=unmap", "--detect-zeroes=unmap"]
        with process.child(["qemu-nbd", *options, *rights, named(path)]) as server:
            _wait_for_server(server, address)
            try:
                yield address
            except OSError as error:
                if process.wait_for_end(server, POLL_S):
                    raise _not_serving(server) from error
                raise


def named(path: Path) -> str:
    """Return a path that QEMU takes for a file, whatever it looks like (`nbd:…`, `json:{…}`, `-x`)."""
    return os.fspath(path.absolute())


def _wait_for_server(server: subprocess.Popen[bytes], address: Path) -> None:
    """Wait until it shakes hands: it listens before it opens the image."""
    deadline = time.monotonic() + START_S
    while not _serves(address):
        if server.poll() is not None or time.monotonic() > deadline:
            process.end_group(server, close=False)
            raise _not_serving(server)
        time.sleep(POLL_S)


def _serves(address: Path) -> bool:
    try:
        with NbdClient(address, timeout_s=START_S):
            return True
    except OSError:
        return False


def _not_serving(server: subprocess.Popen[bytes]) -> ToolFailed:
    assert server.stderr
    server.poll()
    lines = tuple(server.stderr.read().decode(errors="replace").splitlines())[-process.LAST_LINES :]
    return ToolFailed(argv=("qemu-nbd",), status=server.returncode, last_lines=lines)


def _wait_for_lock(path: Path, *, read_only: bool) -> None:
    """Wait, bounded, until no other QEMU process holds the image in a way that ours would be refused."""
    deadline = time.monotonic() + LOCK_S
    while _locked(path, *(_WRITERS if read_only else _ANYBODY)):
        if time.monotonic() > deadline:
            raise FileLocked(
                path=str(path), remedy="Another program has the image open: find it with fuser, and end it"
            )
        time.sleep(POLL_S)


def _locked(path: Path, start: int, length: int) -> bool:
    with path.open("rb") as file:
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        try:
            answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, wanted)
        except OSError:  # a file system without such locks: QEMU goes without them there as well
            return False
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
