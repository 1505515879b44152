"""The client against qemu-nbd, and against servers that misbehave."""

import errno
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tasks.images.qemu import qemu_nbd
from tasks.nbd import HOLE, ZERO, NbdClient

MIB = 1024 * 1024
SIZE = 8 * MIB


@pytest.fixture(params=["raw", "qcow2"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"disk.{request.param}"
    subprocess.run(["qemu-img", "create", "-q", "-f", request.param, path, str(SIZE)], check=True)
    return path


@pytest.fixture
def client(image: Path) -> Iterator[NbdClient]:
    format = image.suffix[1:]
    with qemu_nbd(image, format=format, read_only=False) as address, NbdClient(address) as client:  # type: ignore[arg-type]
        yield client


def read(client: NbdClient, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xee" * length)
    client.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def test_what_is_written_is_read(client: NbdClient) -> None:
    content = bytes(range(256)) * 4096
    client.write(MIB, memoryview(content))
    client.flush()
    assert client.size == SIZE
    assert read(client, MIB, MIB) == content
    assert read(client, MIB - 512, 1024) == bytes(512) + content[:512]
    assert read(client, SIZE - 1, 1) == b"\0"


def test_zeros_become_a_hole(client: NbdClient) -> None:
    client.write(0, memoryview(b"x" * SIZE))
    assert client.block_status(0, SIZE) == [(SIZE, 0)]
    client.zero(MIB, 2 * MIB)
    assert read(client, MIB, 2 * MIB) == bytes(2 * MIB)
    client.flush()
    runs = client.block_status(0, SIZE)
    assert [(length, bool(flags & ZERO)) for length, flags in runs] == [(MIB, False), (2 * MIB, True), (5 * MIB, False)]
    assert runs[1][1] & (HOLE | ZERO)


def test_the_status_covers_what_was_asked_and_no_more(client: NbdClient) -> None:
    client.write(MIB, memoryview(b"x" * MIB))
    runs = client.block_status(MIB // 2, 2 * MIB)
    assert sum(length for length, _ in runs) == 2 * MIB


def test_errors_come_with_the_servers_errno_and_the_connection_lives_on(client: NbdClient) -> None:
    for request in (lambda: read(client, SIZE - 512, 1024), lambda: client.write(SIZE, memoryview(b"x"))):
        with pytest.raises(OSError, match=r"past EOF") as raised:
            request()
        assert raised.value.errno == errno.EINVAL
    assert read(client, 0, 512) == bytes(512)


def test_a_read_only_export_refuses_writes(image: Path) -> None:
    with qemu_nbd(image, format=image.suffix[1:]) as address, NbdClient(address) as client:  # type: ignore[arg-type]
        assert client.read_only
        with pytest.raises(OSError, match="read-only"):
            client.write(0, memoryview(b"x"))


def test_an_export_that_is_not_there_is_a_missing_file(image: Path) -> None:
    with (
        qemu_nbd(image, format=image.suffix[1:]) as address,  # type: ignore[arg-type]
        pytest.raises(FileNotFoundError, match="no such export"),
    ):
        NbdClient(address, export="other")


def test_several_connections_at_once(image: Path) -> None:
    with (
        qemu_nbd(image, format=image.suffix[1:], read_only=False) as address,  # type: ignore[arg-type]
        NbdClient(address) as one,
        NbdClient(address) as two,
    ):
        one.write(0, memoryview(b"1" * 512))
        one.flush()
        assert one.can_multi_conn is two.can_multi_conn
        assert read(two, 0, 512) == b"1" * 512


def test_over_tcp(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"tcp!" * 1024)
    port = _free_port()
    argv = ["qemu-nbd", "-f", "raw", "-r", "-b", "127.0.0.1", "-p", str(port), "-x", "name", str(tmp_path / "x")]
    with subprocess.Popen(argv) as server:
        with _connected(lambda: NbdClient(("127.0.0.1", port), export="name")) as client:
            assert read(client, 4, 4) == b"tcp!"
        server.wait(5)


def test_interrupting_wakes_a_waiting_read(tmp_path: Path) -> None:
    handshake = b"NBDMAGICIHAVEOPT" + b"\0\3"
    refuse = b"\x00\x03\xe8\x89\x04\x55\x65\xa9" + b"\0\0\0\x08" + b"\x80\0\0\1" + b"\0\0\0\0"
    info = b"\0\0" + SIZE.to_bytes(8, "big") + b"\0\1"
    go = refuse[:8] + b"\0\0\0\7" + b"\0\0\0\3" + len(info).to_bytes(4, "big") + info
    ack = refuse[:8] + b"\0\0\0\7" + b"\0\0\0\1" + b"\0\0\0\0"
    with _server(tmp_path, handshake + refuse + go + ack) as address, NbdClient(address) as client:
        assert client.block_status(0, MIB) == [(MIB, 0)]  # nothing is told, so it all counts
        threading.Timer(0.2, client.interrupt).start()
        started = time.monotonic()
        with pytest.raises(ConnectionResetError):
            read(client, 0, 512)
        assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    "greeting", [b"HTTP/1.1 400 Bad\r\n\r\n", b"NBDMAGICIHAVEOPT\0\0", b"NBDMAGICIHAVEOPT\0\1" + b"x" * 20]
)
def test_a_server_that_speaks_nonsense_is_said_to(tmp_path: Path, greeting: bytes) -> None:
    with _server(tmp_path, greeting) as address, pytest.raises(OSError) as raised:
        NbdClient(address)
    assert raised.value.errno == errno.EPROTO


def test_a_server_that_hangs_up_or_says_nothing(tmp_path: Path) -> None:
    with _server(tmp_path, b"NBD", hang_up=True) as address, pytest.raises(ConnectionResetError):
        NbdClient(address)
    with _server(tmp_path, b"") as address, pytest.raises(TimeoutError):
        NbdClient(address, timeout_s=0.1)
    with pytest.raises(FileNotFoundError):
        NbdClient(tmp_path / "none")


class _server:
    """Sends the same bytes to whoever connects, and listens to nothing."""

    def __init__(self, folder: Path, says: bytes, *, hang_up: bool = False) -> None:
        self._path, self._says, self._hang_up = folder / "nbd", says, hang_up

    def __enter__(self) -> Path:
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self._path

    def __exit__(self, *exc: object) -> None:
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.sendall(self._says)
            with suppress(ConnectionResetError):
                while not self._hang_up and connection.recv(4096):
                    pass


def _connected(connect: Callable[[], NbdClient]) -> NbdClient:
    deadline = time.monotonic() + 5
    while True:
        try:
            return connect()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
