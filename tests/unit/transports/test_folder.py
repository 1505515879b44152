import logging
import pickle
import ssl
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.errors import (
    CertificateUntrusted,
    ConnectionFailed,
    FileLocked,
    FileMissing,
    FileUnfit,
    Hyper2KvmError,
    PermissionMissing,
    SessionExpired,
    ThumbprintMismatch,
    UnsupportedDisk,
)
from tasks.images.copy import Limits, copy
from tasks.images.digests import Digests
from tasks.images.extents import whole_disk
from tasks.images.raw import RawWriter
from tasks.models import Connection, Extent, Trust
from tasks.process import Stopped
from tasks.reader import TransientFault
from tasks.tls import thumbprint_of
from tasks.transports import folder
from tasks.transports.folder import FolderDisk, FolderFile, FolderReader
from tests.unit.https import Handler, Server, make_certificate, serving
from tests.unit.images.fakes import leaves

SECRET = "5e551on-5ecret"
COOKIE = f'vmware_soap_session="{SECRET}"'
CONTENT = leaves("ab0c0d", tail=512)
SECTOR = Extent(start=512, length=512)
QUICK = Limits(threads=2, attempts=3, first_wait_s=0.001, longest_wait_s=0.002)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def server(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(folder, "PROBE_WAIT_S", 0.01)
    before = set(threading.enumerate())
    with serving(CONTENT, certificate, cookie=COOKIE) as server:
        server.certificate = certificate  # type: ignore[attr-defined]
        yield server
    assert {each for each in threading.enumerate() if not each.daemon} <= before


class Session:
    """Owns the cookie, as `tasks.vsphere.session` does."""

    def __init__(self, cookie: str = COOKIE + "; Path=/; HttpOnly") -> None:
        self.current = cookie
        self.stale: list[str] = []

    def cookie(self) -> str:
        return self.current

    def renew(self, stale: str) -> str:
        self.stale.append(stale)
        self.current = COOKIE
        return self.current


def reader(
    server: Server,
    session: Session | None = None,
    *,
    trust: Trust | None = None,
    kind: type[FolderDisk] = FolderDisk,
    **fields: object,
) -> FolderReader:
    session = session or Session()
    ca = server.certificate[0].read_text()  # type: ignore[attr-defined]
    connection = Connection(
        host="127.0.0.1",
        port=server.port,
        username="u",
        password="p",
        trust=trust or Trust(ca_pem=ca),  # type: ignore[arg-type]
    )
    names = {"datacenter_path": "/DC0", "datastore_path": "[ds] web/web.vmdk", "capacity_bytes": len(CONTENT)}
    timeout_s = float(fields.pop("timeout_s", 10))  # type: ignore[arg-type]
    depth = fields.pop("depth", None)
    disk = kind(connection=connection, **{**names, **fields})  # type: ignore[arg-type]
    return FolderReader(disk, cookie=session.cookie, renew=session.renew, timeout_s=timeout_s, depth=depth)  # type: ignore[arg-type]


def read(source: FolderReader, extent: Extent) -> bytes:
    return b"".join(bytes(buffer) for _, buffer in source.stream(extent))


def says(status: int, **headers: str) -> object:
    return lambda handler: handler.status(status, **headers)


APART = [Extent(start=start, length=700) for start in range(0, 100_000, 1000)]


def read_apart(source: FolderReader) -> bool:
    """Read scattered extents; tell whether each came, with its bytes."""
    found = {start: bytes(buffer) for start, buffer in source.stream_scattered(APART)}
    return found == {each.start: CONTENT[each.start : each.end] for each in APART}


# ── what is asked for ────────────────────────────────────────────────────────────────────────────────────


def test_an_extent_is_one_ranged_request_after_one_sector(server: Server) -> None:
    with reader(server) as source:
        assert read(source, Extent(start=1000, length=300_000)) == CONTENT[1000:301_000]
    assert [headers["Range"] for _, headers in server.requests] == ["bytes=0-511", "bytes=1000-300999"]
    path, headers = server.requests[0]
    assert path == "/folder/web/web-flat.vmdk?dcPath=DC0&dsName=ds"
    assert headers["Accept-Encoding"] == "identity"
    assert headers["Cookie"] == COOKIE
    assert server.connections == 1


def test_scattered_extents_are_few_requests(server: Server) -> None:
    with reader(server) as source:
        assert read_apart(source)
        assert "one range" not in source.road_reason
    assert [headers["Range"].count("-") for _, headers in server.requests] == [1, 64, 36]
    assert server.connections == 1


NOT_SEVERAL = {
    "only the first": lambda handler: handler.partial(0, 700, CONTENT[:700]),
    "the whole file": lambda handler: handler.status(200, CONTENT),
    "refused": says(416),
    "not understood": says(400),
    "broken by it": says(500),
    "too long a header": says(431),
    "joined": lambda handler: handler.parts([(0, 1700), *handler.ranges()[2:]]),
    "in another order": lambda handler: handler.parts(handler.ranges()[::-1]),
    "endless": lambda handler: handler.status(
        206, bytes(300_000), **{"Content-Type": "multipart/byteranges; boundary=x"}
    ),
    "some left out": lambda handler: handler.parts(handler.ranges()[1:]),
}


@pytest.mark.parametrize("answer", NOT_SEVERAL.values(), ids=NOT_SEVERAL)
def test_a_server_that_does_not_do_several_ranges_is_asked_one_by_one_and_nothing_is_lost(
    server: Server, answer: object, caplog: pytest.LogCaptureFixture
) -> None:
    with reader(server) as source:
        server.script.append(answer)  # type: ignore[arg-type]
        assert read_apart(source)
        assert read_apart(source)
        assert source.road_reason.count("one range a request: it ") == 1
    asked = [headers["Range"].count("-") for _, headers in server.requests]
    assert asked == [1, 64, *[1] * (2 * len(APART))]
    assert caplog.text.count("one range a request from now on") == 1


LIES = {
    "of another file": (lambda handler: handler.parts(handler.ranges(), total=7), "file of 7 bytes"),
    "unasked": (lambda handler: handler.parts([*handler.ranges()[:-1], (90_000, 90_700)]), "nobody asked for"),
    "twice": (lambda handler: handler.parts([(0, 700), *handler.ranges()[:-1]]), "0-699 twice"),
}


@pytest.mark.parametrize(("answer", "words"), LIES.values(), ids=LIES)
def test_a_lying_part_is_named(server: Server, answer: object, words: str) -> None:
    with reader(server) as source:
        server.script.append(answer)  # type: ignore[arg-type]
        with pytest.raises(UnsupportedDisk, match=words):
            read_apart(source)


def test_a_server_that_did_several_ranges_may_be_busy_later(server: Server) -> None:
    with reader(server) as source:
        assert read_apart(source)
        for answer in (says(500), says(503), cut):
            server.script.append(answer)  # type: ignore[arg-type]
            with pytest.raises(TransientFault):
                read_apart(source)
        assert read_apart(source)
        assert "one range" not in source.road_reason


def test_names_are_quoted_once_and_slashes_of_the_path_kept(server: Server) -> None:
    """A datacenter stored as `50%25 a%2fb` is those characters, quoted."""
    with reader(server, datacenter_path="/Büro/50%25 a%2fb", datastore_path="[d s+#1] wéb & co/x%2fy #1?.vmdk"):
        path, _ = server.requests[0]
    assert path == (
        "/folder/w%C3%A9b%20%26%20co/x%252fy%20%231%3F-flat.vmdk"
        "?dcPath=B%C3%BCro%2F50%2525%20a%252fb&dsName=d%20s%2B%231"
    )


def test_a_file_is_asked_for_under_its_own_name(server: Server) -> None:
    with reader(server, kind=FolderFile, datastore_path="[d s] wéb/a b.vmx~") as source:
        assert read(source, Extent(start=0, length=700)) == CONTENT[:700]
    assert server.requests[0][0] == "/folder/w%C3%A9b/a%20b.vmx~?dcPath=DC0&dsName=d%20s"


def test_a_small_file_costs_one_request_and_comes_whole(server: Server, tmp_path: Path) -> None:
    with reader(server, kind=FolderFile) as source:
        copy_to(tmp_path / "x", source)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert [headers["Range"] for _, headers in server.requests] == [f"bytes=0-{len(CONTENT) - 1}"]


def test_a_small_file_of_which_another_part_is_wanted_is_asked_again(server: Server) -> None:
    with reader(server, kind=FolderFile, depth=1) as source:
        assert read(source, SECTOR) == CONTENT[512:1024]
        assert read(source, SECTOR) == CONTENT[512:1024]
    whole = f"bytes=0-{len(CONTENT) - 1}"
    assert [headers["Range"] for _, headers in server.requests] == [whole, "bytes=512-1023", "bytes=512-1023"]


@pytest.mark.parametrize(("most", "begun"), [(len(CONTENT) - 1, False), (len(CONTENT), True)])
def test_a_file_that_is_large_or_here_in_part_is_tried_by_a_sector(
    server: Server, monkeypatch: pytest.MonkeyPatch, most: int, begun: bool
) -> None:
    monkeypatch.setattr(folder, "REQUEST_BYTES", most)
    with reader(server, kind=FolderFile, begun=begun):
        assert [headers["Range"] for _, headers in server.requests] == ["bytes=0-511"]


def test_a_small_file_that_is_cut_comes_through(server: Server, tmp_path: Path) -> None:
    server.script.append(cut)
    with reader(server, kind=FolderFile) as source:
        copy_to(tmp_path / "x", source)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (500, FileLocked, r"web\.vmx is locked.*--snapshot"),
        (404, FileMissing, "was there when the folder was listed"),
        (416, FileUnfit, "shorter.*changes while the VM runs"),
    ],
)
def test_a_refusal_of_a_file_is_named(server: Server, status: int, error: type[Hyper2KvmError], words: str) -> None:
    server.script.extend([says(status)])  # type: ignore[list-item]
    with (
        pytest.raises(error, match=words),
        reader(server, kind=FolderFile, datastore_path="[ds] web/web.vmx"),
    ):
        pass


def test_a_copy_keeps_to_few_connections_and_equals_the_disk(server: Server, tmp_path: Path) -> None:
    with reader(server) as source:
        copy_to(tmp_path / "x", source)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.connections <= source.depth


def copy_to(path: Path, source: FolderReader, **options: object) -> None:
    size = source.size
    with RawWriter.create(path, size=size) as writer, Digests.create(path.with_suffix(".d"), size=size) as digests:
        copy(source, whole_disk(size), writer, digests=digests, limits=QUICK, **options)  # type: ignore[arg-type]


def test_cookies_of_the_server_and_proxies_of_the_environment_are_left_alone(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    server.script.append(lambda handler: handler.partial(0, 512, CONTENT[:512], Set_Cookie="other=1; Path=/"))
    with reader(server) as source:
        read(source, SECTOR)
    assert server.requests[1][1]["Cookie"] == COOKIE


@pytest.mark.parametrize("path", ["", "web/web.vmdk", "[ds]", "[ds] web/web.vmx"])
def test_what_is_no_datastore_path_of_a_disk_is_refused(server: Server, path: str) -> None:
    with pytest.raises(UnsupportedDisk, match="no datastore path"):
        reader(server, datastore_path=path)


# ── the session ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_session_that_died_midway_is_renewed_by_its_owner(server: Server, tmp_path: Path) -> None:
    session = Session()
    with reader(server, session) as source:
        session.current = 'vmware_soap_session="old"'
        assert read(source, SECTOR) == CONTENT[512:1024]
    assert session.stale == ['vmware_soap_session="old"']


def test_a_session_that_cannot_be_renewed_has_expired(server: Server) -> None:
    server.cookie = "another"
    with pytest.raises(SessionExpired, match=f"127.0.0.1:{server.port}"), reader(server):
        pass
    assert len(server.requests) == 2


# ── what cannot be read is named before the first byte ───────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "error", "names"),
    [
        (500, FileLocked, ["web/web.vmdk", "power the VM off", "vddk"]),
        (404, UnsupportedDisk, ["web/web.vmdk", "no flat file", "vddk"]),
        (403, PermissionMissing, ["Datastore.FileManagement", "datastore ds"]),
        (416, UnsupportedDisk, ["shorter"]),
        (200, UnsupportedDisk, ["ignores Range"]),
        (418, ConnectionFailed, ["status 418"]),
        (302, ConnectionFailed, ["redirects"]),
        (503, ConnectionFailed, ["status 503"]),
    ],
)
def test_a_refusal_is_named(server: Server, status: int, error: type[Hyper2KvmError], names: list[str]) -> None:
    server.script.extend([says(status, Location="https://127.0.0.1/")] * 9)  # type: ignore[list-item]
    with pytest.raises(error) as raised, reader(server):
        pass
    assert type(raised.value) is error
    assert all(name in str(raised.value) for name in names)
    assert len(server.requests) == (folder.PROBE_ATTEMPTS if status == 503 else 1)


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"total": "99999999"}, "has 99999999 bytes, not the 1573376 expected"),
        ({"total": "*"}, "ignores Range"),
        ({"Content_Encoding": "gzip"}, "encodes what it sends"),
        ({"Content_Range": "bytes 512-1023/1573376"}, "ignores Range|sent bytes"),
    ],
)
def test_a_reply_that_is_not_what_was_asked_for_is_refused(
    server: Server, headers: dict[str, str], reason: str
) -> None:
    def answer(handler: Handler) -> None:
        if "Content_Range" in headers:
            return handler.status(206, CONTENT[512:1024], **{"Content-Range": headers["Content_Range"]})
        handler.partial(0, 512, CONTENT[:512], **headers)

    server.script.append(answer)
    with pytest.raises(UnsupportedDisk, match=reason), reader(server):
        pass


def test_a_busy_server_is_asked_again_on_entering(server: Server) -> None:
    server.script.extend([says(503), says(502), says(503)])  # type: ignore[list-item]
    with reader(server):
        assert len(server.requests) == 4


# ── faults that may pass ─────────────────────────────────────────────────────────────────────────────────


def cut(handler: Handler) -> None:
    """Send half of what was promised, and hang up."""
    start, end = handler.range()
    handler.partial(start, end, CONTENT[start : (start + end) // 2])
    handler.close_connection = True


def stall(handler: Handler) -> None:
    start, end = handler.range()
    handler.partial(start, end, CONTENT[start : start + 300_000])
    handler.wfile.flush()
    handler.server.release.wait(10)


def reset(handler: Handler) -> None:
    handler.connection.close()


@pytest.mark.parametrize("fault", [cut, stall, reset, says(500), says(502), says(504)])
def test_a_fault_midway_is_transient_and_a_copy_comes_through(server: Server, tmp_path: Path, fault: object) -> None:
    with reader(server, timeout_s=0.3) as source:
        server.script.append(fault)  # type: ignore[arg-type]
        with pytest.raises(TransientFault):
            read(source, Extent(start=0, length=len(CONTENT)))
        server.script.append(fault)  # type: ignore[arg-type]
        copy_to(tmp_path / "x", source)
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_a_copy_asks_only_for_what_a_cut_reply_left_out(server: Server, tmp_path: Path) -> None:
    with reader(server) as source:
        server.script.append(cut)
        copy_to(tmp_path / "x", source)
    ranges = [headers["Range"] for _, headers in server.requests]
    assert ranges == ["bytes=0-511", f"bytes=0-{len(CONTENT) - 1}", f"bytes=786432-{len(CONTENT) - 1}"]


@pytest.mark.parametrize(("header", "wait_s"), [("7", 7), ("3600", 30), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("", 0)])
def test_retry_after_is_respected_up_to_a_bound(server: Server, header: str, wait_s: float) -> None:
    with reader(server) as source:
        server.script.append(says(503, **{"Retry-After": header}))  # type: ignore[arg-type]
        with pytest.raises(TransientFault) as raised:
            read(source, SECTOR)
    assert raised.value.wait_s == wait_s


@pytest.mark.parametrize("where", ["body", "headers"])
def test_stop_ends_a_copy_from_a_server_that_stalls(server: Server, tmp_path: Path, where: str) -> None:
    stop, stalled = threading.Event(), threading.Event()

    def answer(handler: Handler) -> None:
        stalled.set()
        stall(handler) if where == "body" else handler.server.release.wait(10)

    def set_it() -> None:
        stalled.wait(10)
        stop.set()

    with reader(server) as source:
        server.script.append(answer)
        setter = threading.Thread(target=set_it)
        setter.start()
        started = time.monotonic()
        with pytest.raises(Stopped):
            copy_to(tmp_path / "x", source, stop=stop)
        assert time.monotonic() - started < 1.5
        setter.join()


# ── trust ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pinned_certificate_is_enough(server: Server) -> None:
    der = ssl.PEM_cert_to_DER_cert(server.certificate[0].read_text())  # type: ignore[attr-defined]
    with reader(server, trust=Trust(thumbprint=thumbprint_of(der, like="0" * 64))) as source:
        assert read(source, SECTOR) == CONTENT[512:1024]


def test_an_untrusted_server_gets_no_cookie(server: Server) -> None:
    with pytest.raises(CertificateUntrusted, match="SHA-256 thumbprint is"), reader(server, trust=Trust()):
        pass
    with pytest.raises(ThumbprintMismatch, match="expected AA:AA"), reader(server, trust=Trust(thumbprint="AA" * 20)):
        pass
    assert server.requests == []


def test_a_server_that_is_not_there_is_a_failed_connection(server: Server) -> None:
    source = reader(server, trust=Trust(verify=False))
    server.socket.close()
    with pytest.raises(ConnectionFailed, match=f"Cannot talk to 127.0.0.1:{server.port}"), source:
        pass


@pytest.mark.parametrize("fault", [cut, says(500), says(403), says(404), says(401)])
def test_no_error_and_no_log_holds_the_cookie(server: Server, caplog: pytest.LogCaptureFixture, fault: object) -> None:
    caplog.set_level(logging.DEBUG)
    server.script.extend([fault] * 9)  # type: ignore[list-item]
    with pytest.raises(Hyper2KvmError) as raised, reader(server):
        pass
    shown = "".join(traceback.format_exception(raised.value)) + caplog.text + repr(pickle.dumps(raised.value))
    assert SECRET not in shown
