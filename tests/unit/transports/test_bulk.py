"""The TLS backend against servers that are Python's `ssl` or OpenSSL itself."""

import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

import httpx
import pytest

from tasks.tls import unverified
from tasks.transports import bulk
from tests.unit.https import make_certificate, serving

MIB = 1024 * 1024
CONTENT = os.urandom(3 * MIB + 7)
T = TypeVar("T")
Talk = Callable[[ssl.SSLSocket], object]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        yield listener


@contextmanager
def talking(certificate: tuple[Path, Path], talk: Talk, *, version: ssl.TLSVersion | None = None) -> Iterator[int]:
    """Say `talk` to whoever comes first; yield the port. A client that hangs up ends it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.minimum_version = version or context.minimum_version
    context.maximum_version = version or context.maximum_version
    with listening() as listener:

        def serve() -> None:
            plain, _ = listener.accept()
            plain.settimeout(10)
            try:
                with context.wrap_socket(plain, server_side=True) as secure:
                    talk(secure)
            except OSError:
                pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(20)
        assert not thread.is_alive()


def connect(
    port: int, context: ssl.SSLContext | None = None, *, name: str = "127.0.0.1", timeout: float = 10
) -> bulk.BulkStream:
    plain = socket.create_connection(("127.0.0.1", port), timeout)
    try:
        return bulk.BulkStream(plain, context or unverified(), name, timeout)
    except BaseException:
        plain.close()
        raise


@contextmanager
def client(context: ssl.SSLContext, *, connections: int, timeout_s: float) -> Iterator[httpx.Client]:
    """A client that shares with nobody: its connections end with it."""
    with closing(bulk.Shared(context)) as shared:
        with bulk.client(bulk.BulkTransport(shared, connections=connections), timeout_s=timeout_s) as asking:
            yield asking


def read(stream: bulk.BulkStream, timeout: float = 10, *, size: int = 65536) -> bytes:
    buffer = memoryview(bytearray(size))
    return bytes(buffer[: stream.read_into(buffer, timeout)])


def read_all(stream: bulk.BulkStream) -> bytes:
    parts = []
    while part := read(stream):
        parts.append(part)
    return b"".join(parts)


# ── what arrives ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("sizes", [[len(CONTENT)], [1, 2, 16384, 5, 16383, 100_000], [1] * 3000])
def test_records_of_any_length_come_whole_and_in_order(
    certificate: tuple[Path, Path], version: ssl.TLSVersion, sizes: list[int]
) -> None:
    def talk(secure: ssl.SSLSocket) -> None:
        at = 0
        for size in sizes:
            secure.sendall(CONTENT[at : at + size])
            at += size
        secure.unwrap()

    with talking(certificate, talk, version=version) as port, closing(connect(port)) as stream:
        assert stream.tls.version() == version.name.replace("_", ".")
        assert read_all(stream) == CONTENT[: sum(sizes)]


def test_what_is_sent_arrives(certificate: tuple[Path, Path]) -> None:
    heard: list[bytes] = []

    def talk(secure: ssl.SSLSocket) -> None:
        while len(b"".join(heard)) < len(CONTENT):
            heard.append(secure.recv(65536))
        secure.sendall(b"thanks")

    with talking(certificate, talk) as port, closing(connect(port)) as stream:
        stream.write(CONTENT, 10)
        stream.write(b"", 10)
        assert read(stream) == b"thanks"
    assert b"".join(heard) == CONTENT


def test_data_comes_before_more_is_waited_for(certificate: tuple[Path, Path]) -> None:
    """A block that is not full is handed out."""
    seen = threading.Event()

    def talk(secure: ssl.SSLSocket) -> None:
        secure.sendall(b"a little")
        seen.wait(10)

    with talking(certificate, talk) as port, closing(connect(port)) as stream:
        assert read(stream) == b"a little"
        seen.set()


# ── how it ends ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_goodbye_is_an_end_and_a_cut_is_an_error(certificate: tuple[Path, Path]) -> None:
    def polite(secure: ssl.SSLSocket) -> None:
        secure.sendall(b"all")
        secure.unwrap()

    def abrupt(secure: ssl.SSLSocket) -> None:
        secure.sendall(b"half")
        socket.socket.shutdown(secure, socket.SHUT_RDWR)

    with talking(certificate, polite) as port, closing(connect(port)) as stream:
        assert read_all(stream) == b"all"
        assert read(stream) == b""
    with talking(certificate, abrupt) as port, closing(connect(port)) as stream:
        assert read(stream) == b"half"
        with pytest.raises(httpx.ReadError) as raised:
            read(stream)
        assert isinstance(raised.value.__cause__, ssl.SSLEOFError)


def test_a_record_that_was_tampered_with_is_an_error(certificate: tuple[Path, Path]) -> None:
    def talk(secure: ssl.SSLSocket) -> None:
        socket.socket.sendall(secure, b"\x17\x03\x03\x00\x20" + bytes(32))  # below TLS: application data, of no key

    with talking(certificate, talk) as port, closing(connect(port)) as stream:
        with pytest.raises(httpx.ReadError) as raised:
            read_all(stream)
        assert isinstance(raised.value.__cause__, ssl.SSLError)


def test_a_server_that_says_nothing_times_out(certificate: tuple[Path, Path]) -> None:
    done = threading.Event()
    with talking(certificate, lambda secure: done.wait(10)) as port, closing(connect(port)) as stream:
        with pytest.raises(httpx.ReadTimeout):
            read(stream, 0.05)
        with pytest.raises(httpx.WriteTimeout):
            stream.write(bytes(64 * MIB), 0.05)
        done.set()


def test_a_handshake_has_a_time_limit_as_a_whole() -> None:
    """One byte now and then does not prolong it."""
    done = threading.Event()
    with listening() as listener:

        def drip() -> None:
            accepted, _ = listener.accept()
            with accepted:
                for byte in b"\x16\x03\x03\x40\x00" + bytes(500):
                    accepted.sendall(bytes([byte]))
                    if done.wait(0.02):
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        started = time.monotonic()
        with pytest.raises(httpx.ConnectTimeout):
            bulk.BulkStream.connect(("127.0.0.1", listener.getsockname()[1]), unverified(), 0.2)
        assert time.monotonic() - started < 5
        done.set()
        thread.join()


def test_a_connection_shut_down_by_another_thread_wakes_its_reader(certificate: tuple[Path, Path]) -> None:
    done = threading.Event()
    with talking(certificate, lambda secure: done.wait(10)) as port, closing(connect(port)) as stream:
        threading.Timer(0.1, stream.shut_down).start()
        with pytest.raises(httpx.ReadError):
            read(stream)
        done.set()


# ── trust ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_certificate_of_nobody_or_of_another_name_ends_the_handshake(certificate: tuple[Path, Path]) -> None:
    known = ssl.create_default_context(cafile=certificate[0])
    for context, name in [(ssl.create_default_context(), "127.0.0.1"), (known, "127.0.0.2"), (known, "other.test")]:
        with talking(certificate, lambda secure: secure.recv(1)) as port:
            with pytest.raises(ssl.SSLCertVerificationError):
                connect(port, context, name=name)
    with talking(certificate, lambda secure: secure.sendall(b"x")) as port, closing(connect(port, known)) as stream:
        assert read(stream, size=1) == b"x"


def test_what_speaks_no_tls_is_a_failed_connection() -> None:
    with listening() as listener:

        def answer() -> None:
            accepted, _ = listener.accept()
            with accepted:
                accepted.recv(4096)
                accepted.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(httpx.ConnectError) as raised:
            bulk.BulkStream.connect(("127.0.0.1", listener.getsockname()[1]), unverified(), 5)
        assert isinstance(raised.value.__cause__, ssl.SSLError)
        thread.join()


def test_the_name_is_sent_as_sni(certificate: tuple[Path, Path]) -> None:
    names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.sni_callback = lambda _socket, name, _context: names.append(name)  # type: ignore[assignment]
    with listening() as listener:

        def serve() -> None:
            with context.wrap_socket(listener.accept()[0], server_side=True) as secure:
                secure.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        with closing(connect(listener.getsockname()[1], name="vcenter.test")) as stream:
            stream.write(b"x", 10)
        thread.join()
    assert names == ["vcenter.test"]


def test_plain_http_is_refused_before_a_byte_is_sent() -> None:
    with listening() as listener, client(unverified(), connections=1, timeout_s=5) as asking:
        with pytest.raises(httpx.UnsupportedProtocol):
            asking.get(f"http://127.0.0.1:{listener.getsockname()[1]}/", headers={"Cookie": "secret"})
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


# ── TLS speaks up after the handshake ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("version", "command"), [("-tls1_3", b"K"), ("-tls1_3", b"k"), ("-tls1_2", b"R")])
def test_new_keys_in_the_middle_are_no_interruption(
    certificate: tuple[Path, Path], version: str, command: bytes
) -> None:
    """OpenSSL's own server renegotiates at an `R`, and asks for new keys at a `K`."""
    with listening() as free:
        port = free.getsockname()[1]
    argv = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", version, "-cert", str(certificate[0])]
    argv += ["-key", str(certificate[1])]
    server = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert server.stdin and server.stdout
    try:
        while b"ACCEPT" not in (line := server.stdout.readline()):
            assert line
        with closing(connect(port)) as stream:
            stream.write(b"first\n", 10)
            while b"first" not in server.stdout.readline():
                pass
            for words in (b"before\n", command + b"\n", b"after\n"):
                server.stdin.write(words)
                server.stdin.flush()
                if words != command + b"\n":
                    assert read(stream) == words
                else:
                    time.sleep(0.1)  # s_server takes what follows in the same read for part of the command
            stream.write(b"last\n", 10)
            while b"last" not in (line := server.stdout.readline()):
                assert line
    finally:
        server.kill()
        server.communicate()


# ── as a client ──────────────────────────────────────────────────────────────────────────────────────────


def test_one_connection_serves_many_requests_and_many_threads_share_few(certificate: tuple[Path, Path]) -> None:
    cookie = "c=1"
    context = ssl.create_default_context(cafile=certificate[0])
    failures: list[object] = []
    with serving(CONTENT, certificate, cookie=cookie) as server:
        with client(context, connections=4, timeout_s=10) as asking:

            def fetch(start: int) -> None:
                headers = {"Cookie": cookie, "Range": f"bytes={start}-{start + 99_999}"}
                body = asking.get(f"https://127.0.0.1:{server.port}/", headers=headers).content
                if body != CONTENT[start : start + 100_000]:
                    failures.append(start)

            for start in range(3):
                fetch(start)
            assert server.connections == 1
            threads = [threading.Thread(target=fetch, args=(7919 * number,)) for number in range(40)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert server.connections <= 4
    assert not failures
    assert len(server.requests) == 43


def test_a_connection_that_was_idle_for_long_is_replaced(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"Cookie": "c=1", "Range": "bytes=0-9"}
    with serving(CONTENT, certificate, cookie="c=1") as server:
        with client(unverified(), connections=1, timeout_s=10) as asking:
            for expected in (1, 1, 2):
                if expected == 2:
                    monkeypatch.setattr(bulk, "KEEP_ALIVE_S", -1.0)
                assert asking.get(f"https://127.0.0.1:{server.port}/", headers=headers).content == CONTENT[:10]
                assert server.connections == expected


def test_who_shares_goes_on_with_the_connections_of_those_before(certificate: tuple[Path, Path]) -> None:
    headers = {"Cookie": "c=1", "Range": "bytes=0-9"}
    with serving(CONTENT, certificate, cookie="c=1") as server, closing(bulk.Shared(unverified())) as shared:
        for _ in range(3):
            with bulk.client(bulk.BulkTransport(shared, connections=2), timeout_s=10) as asking:
                assert asking.get(f"https://127.0.0.1:{server.port}/", headers=headers).content == CONTENT[:10]
        assert server.connections == 1
        shared.close()
        with bulk.client(bulk.BulkTransport(shared, connections=1), timeout_s=10) as asking:
            for _ in range(2):
                assert asking.get(f"https://127.0.0.1:{server.port}/", headers=headers).content == CONTENT[:10]
        assert server.connections == 3  # once it is closed, nothing is kept


def test_a_connection_in_the_middle_of_a_reply_is_left_to_nobody(certificate: tuple[Path, Path]) -> None:
    headers = {"Cookie": "c=1", "Range": f"bytes=0-{len(CONTENT) - 1}"}
    with serving(CONTENT, certificate, cookie="c=1") as server, closing(bulk.Shared(unverified())) as shared:
        for expected in (1, 2):
            with bulk.client(bulk.BulkTransport(shared, connections=1), timeout_s=10) as asking:
                with asking.stream("GET", f"https://127.0.0.1:{server.port}/", headers=headers) as reply:
                    assert reply.extensions[bulk.READ_INTO](memoryview(bytearray(10)))
            assert server.connections == expected


def test_memory_is_lent_to_one_at_a_time_and_lent_again() -> None:
    shared = bulk.Shared(unverified())
    with shared.buffers.memory(MIB) as one, shared.buffers.memory(MIB) as two:
        one[0], two[0] = 1, 2
        assert (one[0], two[0]) == (1, 2)
    with shared.buffers.memory(MIB) as again:
        assert again is one or again is two
    with shared.buffers.memory(2 * MIB) as larger:
        assert len(larger) == 2 * MIB


def test_a_connection_that_the_server_left_between_two_requests_is_replaced(certificate: tuple[Path, Path]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    gone = threading.Event()
    with listening() as listener:

        def serve() -> None:
            for answer in (b"one", b"two"):
                with context.wrap_socket(listener.accept()[0], server_side=True) as secure:
                    secure.recv(65536)
                    secure.sendall(HEAD + b"Content-Length: 3\r\n\r\n" + answer)
                gone.set()

        thread = threading.Thread(target=serve)
        thread.start()
        with client(unverified(), connections=1, timeout_s=10) as asking:
            url = f"https://127.0.0.1:{listener.getsockname()[1]}/x"
            assert asking.get(url).content == b"one"
            assert gone.wait(10)
            assert asking.get(url).content == b"two"
        thread.join(20)


def test_once_shut_down_nothing_is_asked_any_more(certificate: tuple[Path, Path]) -> None:
    transport = bulk.BulkTransport(bulk.Shared(unverified()), connections=1)
    headers = {"Cookie": "c=1", "Range": "bytes=0-9"}
    with serving(CONTENT, certificate, cookie="c=1") as server, bulk.client(transport, timeout_s=10) as asking:
        assert asking.get(f"https://127.0.0.1:{server.port}/", headers=headers).content == CONTENT[:10]
        transport.shut_down()
        with pytest.raises(httpx.TransportError):
            asking.get(f"https://127.0.0.1:{server.port}/", headers=headers)


def test_between_two_requests_a_server_that_has_left_is_noticed(certificate: tuple[Path, Path]) -> None:
    with talking(certificate, lambda secure: secure.unwrap()) as port, closing(connect(port)) as stream:
        deadline = time.monotonic() + 10
        while not stream.has_something():
            assert time.monotonic() < deadline


def test_a_reply_that_is_left_unread_gives_its_connection_back(certificate: tuple[Path, Path]) -> None:
    headers = {"Cookie": "c=1", "Range": f"bytes=0-{len(CONTENT) - 1}"}
    with serving(CONTENT, certificate, cookie="c=1") as server:
        with client(unverified(), connections=1, timeout_s=0.5) as asking:
            for _ in range(3):
                with asking.stream("GET", f"https://127.0.0.1:{server.port}/", headers=headers) as reply:
                    next(reply.iter_raw())
                    with pytest.raises(httpx.PoolTimeout):
                        asking.get(f"https://127.0.0.1:{server.port}/", headers=headers, timeout=0.05)


HEAD = b"HTTP/1.1 206 Partial Content\r\n"
BODY = CONTENT[: 2 * MIB + 5]
COUNTED = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKED += b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (BODY[:7], BODY[7:MIB], BODY[MIB:])) + b"0\r\n\r\n"
TO_THE_END = HEAD + b"Connection: close\r\n\r\n" + BODY


def answered(certificate: tuple[Path, Path], answer: bytes, take: Callable[[httpx.Response], T]) -> T:
    """Have a server say `answer` to whatever it is asked; return what `take` makes of the reply."""

    def talk(secure: ssl.SSLSocket) -> None:
        while b"\r\n\r\n" not in secure.recv(65536):
            pass
        secure.sendall(answer)
        secure.unwrap()

    with talking(certificate, talk) as port, client(unverified(), connections=1, timeout_s=10) as asking:
        with asking.stream("GET", f"https://127.0.0.1:{port}/x") as reply:
            return take(reply)


def filled(reply: httpx.Response, size: int = 300_000) -> list[bytes]:
    """Return the body as `read_into` gives it, into a buffer of `size` bytes."""
    parts, buffer = [], memoryview(bytearray(size))
    while count := reply.extensions[bulk.READ_INTO](buffer):
        parts.append(bytes(buffer[:count]))
    return parts


@pytest.mark.parametrize("answer", [COUNTED, CHUNKED, TO_THE_END], ids=["counted", "chunked", "to the end"])
def test_a_body_of_any_framing_comes_whole(certificate: tuple[Path, Path], answer: bytes) -> None:
    assert answered(certificate, answer, lambda reply: reply.read()) == BODY
    assert b"".join(answered(certificate, answer, filled)) == BODY


@pytest.mark.parametrize("answer", [COUNTED[:-1], CHUNKED[:-6]], ids=["counted", "chunked"])
def test_a_body_cut_short_is_an_error_even_with_a_goodbye(certificate: tuple[Path, Path], answer: bytes) -> None:
    for take in (filled, httpx.Response.read):
        with pytest.raises(httpx.RemoteProtocolError):
            answered(certificate, answer, take)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 2", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 206 X\r\n" + 2**18 * b"y"])
def test_what_is_no_answer_is_a_protocol_error(certificate: tuple[Path, Path], answer: bytes) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        answered(certificate, answer, filled)


def test_what_comes_behind_a_body_is_no_answer_to_the_next_request(certificate: tuple[Path, Path]) -> None:
    def talk(secure: ssl.SSLSocket) -> None:
        secure.recv(65536)
        secure.sendall(HEAD + b"Content-Length: 3\r\n\r\nabc" + HEAD + b"Content-Length: 6\r\n\r\nforged")
        secure.recv(65536)

    with talking(certificate, talk) as port, client(unverified(), connections=1, timeout_s=1) as asking:
        assert asking.get(f"https://127.0.0.1:{port}/x").content == b"abc"
        with pytest.raises(httpx.TransportError):  # a new connection, which nobody accepts
            asking.get(f"https://127.0.0.1:{port}/x")


def test_a_reply_without_a_body_has_none(certificate: tuple[Path, Path]) -> None:
    assert answered(certificate, b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", filled) == []
    assert answered(certificate, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", filled) == []
