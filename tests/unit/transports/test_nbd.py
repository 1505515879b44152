"""The NBD reader against nbdkit and qemu-nbd, as servers and as commands, and against what is no NBD server."""

from __future__ import annotations

import os
import random
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from tasks.errors import InvalidInput, NbdCommandEnded, NbdFailed, NbdTlsRefused, TransferInterrupted
from tasks.images.copy import CopyResult, Limits, copy
from tasks.images.digests import Digests
from tasks.images.extents import leaf_aligned
from tasks.images.raw import RawWriter
from tasks.models import Extent, NbdSettings, Trust
from tasks.reader import TransientFault
from tasks.tls import thumbprint_of
from tasks.transports.nbd import NbdDisk, NbdReader, parsed
from tasks.transports.nbd_command import filled
from tests.runs import children
from tests.unit.https import make_certificate

MIB = 1024 * 1024
SIZE = 24 * MIB
DATA = 9 * MIB
QUICK = Limits(attempts=4, first_wait_s=0.001, longest_wait_s=0.01)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse raw disk: data at its head, one MiB in the middle, and its last sector."""
    path, noise = tmp_path_factory.mktemp("nbd") / "disk.raw", random.Random(7)
    with path.open("wb") as file:
        file.write(noise.randbytes(8 * MIB))
        file.seek(12 * MIB)
        file.write(noise.randbytes(MIB))
        file.truncate(SIZE)
        file.seek(SIZE - 512)
        file.write(noise.randbytes(512))
    return path


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


@contextmanager
def served(socket_path: Path, *words: str) -> Iterator[str]:
    """nbdkit on a unix socket, for the block; yields its URI."""
    argv = ["setpriv", "--pdeathsig", "KILL", "nbdkit", "-f", "-r", "-U", str(socket_path), *words]
    server = subprocess.Popen(argv)
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            await_answer(server, lambda: probe.connect_ex(str(socket_path)))
        yield f"nbd+unix:///?socket={socket_path}"
    finally:
        server.kill()
        server.wait()


def await_answer(server: subprocess.Popen[bytes], attempt: Callable[[], int]) -> None:
    deadline = time.monotonic() + 30
    while attempt():
        assert server.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def disk(*command: str, uri: str = "", size: int = SIZE, secret: str = "", **trust: Any) -> NbdDisk:
    return NbdDisk(
        settings=NbdSettings(
            uri=uri, command=command, trust=Trust(**trust), secret=SecretStr(secret) if secret else None
        ),
        blanks={"moref": "vm-1", "path": "[ds] web/web.vmdk"},
        password=SecretStr("of the account"),
        datastore_path="[ds] web/web.vmdk",
        capacity_bytes=size,
    )


def copied(reader: NbdReader, folder: Path, limits: Limits = QUICK) -> CopyResult:
    wanted = leaf_aligned(reader.allocated(), size=reader.size)
    with (
        RawWriter.create(folder / "raw", size=reader.size) as writer,
        Digests.create(folder / "digests", size=reader.size) as digests,
    ):
        return copy(reader, wanted, writer, digests=digests, limits=limits)


def test_a_server_that_says_what_is_allocated_is_read_over_several_connections(image: Path, tmp_path: Path) -> None:
    with served(tmp_path / "s", "file", str(image)) as uri, NbdReader(disk(uri=uri)) as reader:
        result = copied(reader, tmp_path)
        assert reader.road_reason == f"{uri}, 4 connections, only what is allocated"
        assert len(reader._connections) == 4
    assert (tmp_path / "raw").read_bytes() == image.read_bytes()
    assert DATA <= result.bytes_transferred <= DATA + MIB


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        (["--filter=noextents"], "4 connections, only what"),
        (["--filter=multi-conn", "multi-conn-mode=disable"], "one connection, only what"),
        (["--no-sr"], "all of it: the server does not say"),
    ],
)
def test_other_manners_of_a_server_give_the_same_bytes(
    image: Path, tmp_path: Path, filters: list[str], words: str
) -> None:
    options = [each for each in filters if each.startswith("--")]
    parameters = [each for each in filters if not each.startswith("--")]
    with served(tmp_path / "s", *options, "file", str(image), *parameters) as uri:
        with NbdReader(disk(uri=uri)) as reader:
            assert words in reader.road_reason
            copied(reader, tmp_path)
    assert (tmp_path / "raw").read_bytes() == image.read_bytes()


def test_requests_that_fail_are_asked_for_again(image: Path, tmp_path: Path) -> None:
    trouble = tmp_path / "trouble"
    words = ["--filter=error", "file", str(image), "error=EIO", "error-pread-rate=20%", f"error-pread-file={trouble}"]
    with served(tmp_path / "s", *words) as uri, NbdReader(disk(uri=uri)) as reader:
        trouble.touch()
        copied(reader, tmp_path, QUICK.model_copy(update={"attempts": 20}))
        assert not any(connection.lost for connection in reader._connections)
    assert (tmp_path / "raw").read_bytes() == image.read_bytes()


def test_a_command_on_stdin_and_stdout_has_one_connection_and_many_requests_under_way(
    image: Path, tmp_path: Path
) -> None:
    with NbdReader(disk("nbdkit", "-s", "-r", "file", str(image))) as reader:
        assert reader.road_reason == "nbdkit, one connection, only what is allocated"
        copied(reader, tmp_path)
    assert (tmp_path / "raw").read_bytes() == image.read_bytes()


def test_a_command_on_a_socket_that_we_name_may_be_qemu_nbd_on_a_chain(image: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "top.qcow2"
    backing = ["-b", str(image), "-F", "raw"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(overlay)], check=True)
    subprocess.run(["qemu-io", "-c", f"write -q -P 7 {20 * MIB} 1M", str(overlay)], check=True)
    command = ["qemu-nbd", "-f", "qcow2", "--read-only", "-e", "4", "--persistent", "-k", "{socket}", str(overlay)]
    with NbdReader(disk(*command)) as reader:
        copied(reader, tmp_path)
    expected = bytearray(image.read_bytes())
    expected[20 * MIB : 21 * MIB] = b"\7" * MIB
    assert (tmp_path / "raw").read_bytes() == expected


def test_secrets_come_by_file_descriptor_and_are_in_no_command_line(image: Path, tmp_path: Path) -> None:
    script = 'echo "$(cat /dev/fd/$1)/$(cat /dev/fd/$2)" > "$3"; exec nbdkit -s -r file "$4"'
    words = ["sh", "-c", script, "sh", "{password_fd}", "{secret_fd}", str(tmp_path / "said"), str(image)]
    with NbdReader(disk(*words, secret="a licence")) as reader:
        lines = [Path(f"/proc/{pid}/{name}").read_bytes() for pid in children() for name in ("cmdline", "environ")]
        copied(reader, tmp_path)
    assert (tmp_path / "said").read_text() == "of the account/a licence\n"
    assert lines and not any(secret in line for line in lines for secret in (b"of the account", b"a licence"))
    assert "a licence" not in disk(*words, secret="a licence").model_dump_json()


def test_blanks_are_filled_in_words_and_other_braces_stay() -> None:
    assert filled("{path}:{other}${path}{2#x}", {"path": "[ds] a b.vmdk"}) == "[ds] a b.vmdk:{other}${path}{2#x}"
    for wrong in ({"uri": "nbd://h/{nonsense}"}, {"command": ("x", "{nonsense}")}, {"uri": "nbd://h/{password_fd}"}):
        with pytest.raises(ValueError, match="is no blank"):
            NbdSettings(**wrong)


def test_a_uri_says_address_and_export() -> None:
    assert parsed("nbd://h/a%2Fb") == (("h", 10809), "a/b", "h")
    assert parsed("nbds://[::1]:7/") == (("::1", 7), "", "::1")
    assert parsed("nbd+unix:///x?socket=/run/nbd%20s") == (Path("/run/nbd s"), "x", "")
    for wrong, words in (("nbd+unix:///x", "names no socket"), ("nbd:///x", "names no host")):
        with pytest.raises(InvalidInput, match=words):
            parsed(wrong)
    for settings in ({"uri": "http://h/"}, {}, {"uri": "nbd://h", "command": ("x",)}):
        with pytest.raises(ValueError):
            NbdSettings(**settings)


@pytest.mark.parametrize("size", [SIZE + 512, SIZE - MIB])
def test_an_export_of_another_size_is_another_disk(image: Path, tmp_path: Path, size: int) -> None:
    with served(tmp_path / "s", "file", str(image)) as uri:
        with pytest.raises(NbdFailed, match=f"serves {SIZE} bytes, where the disk has {size}"):
            NbdReader(disk(uri=uri, size=size)).__enter__()


def test_what_is_no_nbd_server_or_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NbdFailed, match="No such file"):
        NbdReader(disk(uri=f"nbd+unix:///?socket={tmp_path}/none")).__enter__()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def say() -> None:
            with listener.accept()[0] as other:
                other.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=say)
        thread.start()
        port = listener.getsockname()[1]
        with pytest.raises(NbdFailed, match="no newstyle greeting"):
            NbdReader(disk(uri=f"nbd://127.0.0.1:{port}")).__enter__()
        thread.join()
    with pytest.raises(NbdFailed, match=f"nbd://127.0.0.1:{port}.*refused"):
        NbdReader(disk(uri=f"nbd://127.0.0.1:{port}")).__enter__()


def test_an_export_that_is_not_there_is_named(image: Path, tmp_path: Path) -> None:
    command = ["qemu-nbd", "-f", "raw", "-r", "-x", "web", "-k", "{socket}", str(image)]
    with pytest.raises(NbdFailed, match="has no such export"):
        NbdReader(disk(*command)).__enter__()


def test_a_command_that_ends_says_its_last_words(image: Path, tmp_path: Path) -> None:
    with pytest.raises(NbdCommandEnded, match="exit status 1") as raised:
        NbdReader(disk("nbdkit", "-s", "-r", "file", str(tmp_path / "none"))).__enter__()
    assert "none" in raised.value.detail[-1]
    with pytest.raises(NbdCommandEnded, match="exit status 1"):
        NbdReader(disk("qemu-nbd", "-k", "{socket}", str(tmp_path / "none"))).__enter__()
    with pytest.raises(NbdCommandEnded, match=r"exit status 0.*foreground"):
        NbdReader(disk("true", "{socket}")).__enter__()
    with pytest.raises(NbdCommandEnded, match=r"exit status 127: no\.such\.program") as raised:
        NbdReader(disk("no.such.program")).__enter__()
    assert "not found" in raised.value.detail[-1]


def test_a_command_that_dies_while_it_is_read_is_named_not_asked_again(image: Path, tmp_path: Path) -> None:
    with NbdReader(disk("nbdkit", "-s", "-r", "file", str(image))) as reader:
        assert reader._command
        os.kill(reader._command._process.pid, signal.SIGKILL)
        with pytest.raises(NbdCommandEnded, match="signal 9"):
            copied(reader, tmp_path)


def test_a_server_that_falls_silent_interrupts_the_transfer(image: Path, tmp_path: Path) -> None:
    with served(tmp_path / "s", "--filter=delay", "file", str(image), "rdelay=0") as uri:
        with NbdReader(disk(uri=uri)) as reader:
            pid = int(subprocess.run(["pgrep", "-f", str(tmp_path / "s")], capture_output=True).stdout.split()[0])
            os.kill(pid, signal.SIGSTOP)
            for connection in reader._connections:
                connection._socket.settimeout(0.2)
            with pytest.raises(TransferInterrupted, match="does not answer"):
                copied(reader, tmp_path)
            os.kill(pid, signal.SIGCONT)


def test_a_connection_that_was_lost_is_opened_anew(image: Path, tmp_path: Path) -> None:
    with served(tmp_path / "s", "file", str(image)) as uri, NbdReader(disk(uri=uri)) as reader:
        reader.interrupt()
        with pytest.raises(TransientFault):
            list(reader.stream(Extent(start=0, length=MIB)))
        copied(reader, tmp_path)
    assert (tmp_path / "raw").read_bytes() == image.read_bytes()


def test_a_stream_that_is_left_early_leaves_the_others_their_bytes(image: Path, tmp_path: Path) -> None:
    with NbdReader(disk("nbdkit", "-s", "-r", "file", str(image))) as reader:
        for start in range(0, 4 * MIB, MIB):
            stream = reader.stream(Extent(start=start, length=4 * MIB))
            next(stream)
            stream.close()
        copied(reader, tmp_path)
    assert (tmp_path / "raw").read_bytes() == image.read_bytes()


@pytest.fixture
def secure(image: Path, tmp_path: Path) -> Iterator[tuple[int, str]]:
    """nbdkit with TLS on a loopback port; yields that and its certificate, which signs itself."""
    certificate, key = make_certificate(tmp_path)
    (tmp_path / "server-cert.pem").write_bytes(certificate.read_bytes())
    (tmp_path / "server-key.pem").write_bytes(key.read_bytes())
    (tmp_path / "ca-cert.pem").write_bytes(certificate.read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tls = ["--tls=require", f"--tls-certificates={tmp_path}"]
    server = subprocess.Popen(
        ["nbdkit", "-f", "-r", "-i", "127.0.0.1", "-p", str(port), *tls, "file", str(image)],
        stderr=subprocess.DEVNULL,
    )
    try:
        with socket.socket() as probe:
            await_answer(server, lambda: probe.connect_ex(("127.0.0.1", port)))
        yield port, certificate.read_text()
    finally:
        server.kill()
        server.wait()


def test_tls_is_verified_by_ca_or_pin(secure: tuple[int, str], image: Path, tmp_path: Path) -> None:
    port, pem = secure
    uri = f"nbds://127.0.0.1:{port}"
    pin = thumbprint_of(ssl.PEM_cert_to_DER_cert(pem), like="0" * 64)
    for trust in ({"ca_pem": pem}, {"thumbprint": pin}):
        with NbdReader(disk(uri=uri, **trust)) as reader:
            copied(reader, tmp_path)
        assert (tmp_path / "raw").read_bytes() == image.read_bytes()
    with pytest.raises(NbdTlsRefused, match="self-signed"):
        NbdReader(disk(uri=uri)).__enter__()
    with pytest.raises(NbdTlsRefused, match="not the pinned AA:AA"):
        NbdReader(disk(uri=uri, thumbprint="AA" * 32)).__enter__()
    with pytest.raises(NbdTlsRefused, match="asks for TLS"):
        NbdReader(disk(uri=f"nbd://127.0.0.1:{port}")).__enter__()


def test_a_server_without_tls_is_refused_where_tls_was_asked_for(image: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = ["-i", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(["nbdkit", "-f", "-r", *where, "file", str(image)])
    try:
        with socket.socket() as probe:
            await_answer(server, lambda: probe.connect_ex(("127.0.0.1", port)))
        with pytest.raises(NbdTlsRefused, match="speaks no TLS"):
            NbdReader(disk(uri=f"nbds://127.0.0.1:{port}")).__enter__()
    finally:
        server.kill()
        server.wait()
