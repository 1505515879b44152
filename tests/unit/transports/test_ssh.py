"""The SSH reader against a real sshd with busybox, on loopback."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from tasks.errors import (
    FileLocked,
    HostKeyChanged,
    InvalidInput,
    SshFailed,
    TransferInterrupted,
    UnsupportedDisk,
)
from tasks.images.copy import CopyResult, Limits, copy
from tasks.images.digests import Digests
from tasks.images.extents import whole_disk
from tasks.images.raw import RawWriter
from tasks.models import Extent, SshSettings, normalise_host_key
from tasks.reader import TransientFault
from tasks.transports.ssh import SshDisk, SshReader
from tasks.transports.ssh_client import fingerprint
from tests.runs import children
from tests.sshd import PASSPHRASE, EsxiHost, esxi_host, make_key

KIB = 1024
MIB = 1024 * 1024
SIZE = 24 * MIB + 512
QUICK = Limits(attempts=3, first_wait_s=0.001, longest_wait_s=0.01)
PATH = "[data store] it's web/web.vmdk"


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(11).randbytes(SIZE)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Iterator[EsxiHost]:
    folder = tmp_path_factory.mktemp("esxi")
    place = folder / "volumes" / "data store" / "it's web"
    place.mkdir(parents=True)
    (place / "web-flat.vmdk").write_bytes(content)
    with esxi_host(folder / "sshd", folder / "volumes") as host:
        yield host


@pytest.fixture(autouse=True)
def no_process_is_left(host: EsxiHost) -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


def disk(settings: SshSettings, *, path: str = PATH, size: int = SIZE) -> SshDisk:
    return SshDisk(settings=settings, datastore_path=path, capacity_bytes=size)


def copied(reader: SshReader, folder: Path) -> CopyResult:
    with (
        RawWriter.create(folder / "raw", size=reader.size) as writer,
        Digests.create(folder / "digests", size=reader.size) as digests,
    ):
        return copy(reader, whole_disk(reader.size), writer, digests=digests, limits=QUICK)


def test_the_copy_is_the_file_over_one_connection(host: EsxiHost, content: bytes, tmp_path: Path) -> None:
    with SshReader(disk(host.settings())) as reader:
        copied(reader, tmp_path)
    assert (tmp_path / "raw").read_bytes() == content
    assert "Accepted publickey" in (host.folder / "sshd.log").read_text()


def test_several_ranges_come_at_once_over_the_same_connection(host: EsxiHost, content: bytes) -> None:
    def accepted() -> int:
        return (host.folder / "sshd.log").read_text().count("Accepted publickey")

    before = accepted()
    with SshReader(disk(host.settings())) as reader:
        streams = [reader.stream(Extent(start=number * 6 * MIB, length=6 * MIB)) for number in range(reader.depth)]
        for _ in range(6):
            for stream in streams:
                offset, buffer = next(stream)
                assert bytes(buffer) == content[offset : offset + len(buffer)]
    assert accepted() == before + 1


@pytest.mark.parametrize(
    ("start", "length"), [(0, 512), (256 * KIB, 256 * KIB), (768 * KIB, 5 * MIB), (24 * MIB, 512), (MIB, SIZE - MIB)]
)
def test_a_range_comes_whole_and_nothing_else_does(host: EsxiHost, content: bytes, start: int, length: int) -> None:
    with SshReader(disk(host.settings())) as reader:
        got = b"".join(bytes(buffer) for _, buffer in reader.stream(Extent(start=start, length=length)))
    assert got == content[start : start + length]


def test_who_stops_reading_early_leaves_nobody_reading_ahead(host: EsxiHost, content: bytes) -> None:
    with SshReader(disk(host.settings())) as reader:
        stream = reader.stream(Extent(start=0, length=SIZE))
        offset, first = next(stream)
        assert bytes(first) == content[offset : len(first)]
        stream.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "ssh-ahead"]


def test_a_password_opens_what_asks_for_one_and_no_secret_is_in_a_command_line(host: EsxiHost) -> None:
    locked = (host.folder / "locked").read_text()
    settings = host.settings(key=SecretStr(locked), password=SecretStr(PASSPHRASE))
    with SshReader(disk(settings)) as reader:
        stream = reader.stream(Extent(start=0, length=8 * MIB))
        next(stream)
        said = [Path(f"/proc/{pid}/{name}").read_bytes() for pid in children() for name in ("cmdline", "environ")]
        stream.close()
    assert any(b"ControlMaster" in each for each in said)
    assert not any(secret in each for each in said for secret in (PASSPHRASE.encode(), locked.splitlines()[1].encode()))
    assert PASSPHRASE not in settings.model_dump_json() and "PRIVATE" not in settings.model_dump_json()


def test_who_is_not_let_in_is_told_so(host: EsxiHost, tmp_path: Path) -> None:
    make_key(tmp_path / "strange")
    for settings in (
        host.settings(key=SecretStr((tmp_path / "strange").read_text())),
        host.settings(key=SecretStr((host.folder / "locked").read_text()), password=SecretStr("wrong")),
        host.settings(key=None, password=SecretStr("wrong")),
    ):
        with pytest.raises(SshFailed, match=r"Permission denied.*check user, key and password"):
            SshReader(disk(settings)).__enter__()


def test_a_host_of_another_key_is_refused_before_anybody_logs_in(host: EsxiHost, tmp_path: Path) -> None:
    make_key(tmp_path / "other")
    other = (tmp_path / "other.pub").read_text()
    expected, actual = (fingerprint(normalise_host_key(key)) for key in (other, host.host_key))
    for pinned in (other, expected):
        with pytest.raises(HostKeyChanged) as raised:
            SshReader(disk(host.settings(host_key=pinned))).__enter__()
        assert (raised.value.expected, raised.value.actual) == (expected, actual)
    with SshReader(disk(host.settings(host_key=actual))):
        pass


def test_where_no_ssh_answers_it_is_said(host: EsxiHost, tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(SshFailed, match=rf"127\.0\.0\.1:{port} failed: no SSH server answers.*SSH is on"):
        SshReader(disk(host.settings(port=port))).__enter__()


def test_a_file_that_is_not_there_or_has_another_size_is_named(host: EsxiHost) -> None:
    with pytest.raises(UnsupportedDisk, match=r"\[data store\] none/x.vmdk.*has no such file.*No such file"):
        SshReader(disk(host.settings(), path="[data store] none/x.vmdk")).__enter__()
    with pytest.raises(UnsupportedDisk, match=f"has {SIZE} bytes, not the {SIZE + 512} expected"):
        SshReader(disk(host.settings(), size=SIZE + 512)).__enter__()
    with pytest.raises(UnsupportedDisk, match="no datastore path"):
        SshReader(disk(host.settings(), path="x"))


def test_a_lock_is_named_before_and_while_it_is_read(host: EsxiHost, tmp_path: Path) -> None:
    with host.trouble("busy"), pytest.raises(FileLocked, match=r"it's web/web.vmdk.*power the VM off"):
        SshReader(disk(host.settings())).__enter__()
    with SshReader(disk(host.settings())) as reader, host.trouble("busy"), pytest.raises(FileLocked):
        copied(reader, tmp_path)


@pytest.mark.parametrize(("kind", "words"), [("stall", "no byte for"), ("broken", "exit status 1: dd: error reading")])
def test_reads_that_keep_failing_interrupt_the_transfer(host: EsxiHost, tmp_path: Path, kind: str, words: str) -> None:
    with SshReader(disk(host.settings()), read_timeout_s=0.4 if kind == "stall" else 60.0) as reader:
        with host.trouble(kind), pytest.raises(TransferInterrupted, match=words):
            copied(reader, tmp_path)


def test_ranges_that_are_cut_are_gone_on_with(host: EsxiHost, content: bytes, tmp_path: Path) -> None:
    with SshReader(disk(host.settings())) as reader, host.trouble("cut"):
        result = copied(reader, tmp_path)
    assert (tmp_path / "raw").read_bytes() == content
    assert result.bytes_transferred < SIZE + 4 * MIB  # of each cut, at most what is left of a leaf is read twice


def test_without_the_shared_connection_each_range_makes_its_own(host: EsxiHost, content: bytes, tmp_path: Path) -> None:
    before = children()
    with SshReader(disk(host.settings())) as reader:
        (master,) = children() - before
        os.kill(master, signal.SIGKILL)
        copied(reader, tmp_path)
    assert (tmp_path / "raw").read_bytes() == content


def test_interrupted_whoever_waits_is_woken(host: EsxiHost) -> None:
    with SshReader(disk(host.settings())) as reader, host.trouble("stall"):
        woken: list[BaseException] = []

        def wait() -> None:
            try:
                list(reader.stream(Extent(start=0, length=8 * MIB)))
            except TransientFault as fault:
                woken.append(fault)

        thread = threading.Thread(target=wait)
        thread.start()
        deadline = time.monotonic() + 20
        while not reader._live and time.monotonic() < deadline:
            time.sleep(0.01)
        reader.interrupt()
        thread.join(10)
        assert [str(each) for each in woken] == ["interrupted"]


def test_a_host_key_is_read_in_any_usual_spelling(host: EsxiHost) -> None:
    kind, key, _ = host.host_key.split(maxsplit=2)
    for text in (host.host_key, f"esx1 {kind} {key}", f"[esx1]:2022 {kind} {key} root@esx1"):
        assert normalise_host_key(text) == f"{kind} {key}"
    printed = f"256 {fingerprint(f'{kind} {key}')} root@esx1 (ED25519)"
    assert normalise_host_key(printed) == fingerprint(f"{kind} {key}")
    with pytest.raises(InvalidInput, match="neither SHA256"):
        normalise_host_key("AA:BB:CC")
