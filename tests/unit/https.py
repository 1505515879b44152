"""A small HTTPS server with a throw-away certificate, that answers as a test says."""

from __future__ import annotations

import ipaddress
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Answer = Callable[["Handler"], None]


def make_certificate(folder: Path, *, address: str = "127.0.0.1", days: int = 1) -> tuple[Path, Path]:
    """Write a self-signed certificate for an address, `days` from now its end; return it and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vcenter.test")])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=10))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
    )
    certificate = builder.sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(private)
    return folder / "cert.pem", folder / "key.pem"


class Handler(BaseHTTPRequestHandler):
    """Serves `server.content` by ranges to whoever has the cookie, unless `server.script` has an answer first."""

    protocol_version = "HTTP/1.1"
    server: Server

    disable_nagle_algorithm = True  # head and body are two writes: the second would wait 40 ms for the client's ACK

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers.items())))
            answer = self.server.script.popleft() if self.server.script else Handler.serve
        answer(self)

    def serve(self) -> None:
        if self.headers["Cookie"] != self.server.cookie:
            return self.status(401)
        if "," in self.headers["Range"]:
            return self.parts(self.ranges())
        start, end = self.range()
        self.partial(start, end, self.server.content[start:end])

    def ranges(self) -> list[tuple[int, int]]:
        each = (part.partition("-") for part in self.headers["Range"].removeprefix("bytes=").split(","))
        return [(int(first), int(last) + 1) for first, _, last in each]

    def parts(self, ranges: list[tuple[int, int]], *, total: int | None = None) -> None:
        """Answer several ranges: RFC 9110, section 14.6."""
        size = total or len(self.server.content)
        heads = [f"--parts\r\nContent-Range: bytes {start}-{end - 1}/{size}\r\n\r\n" for start, end in ranges]
        bodies = [self.server.content[start:end] + b"\r\n" for start, end in ranges]
        body = b"".join(head.encode() + content for head, content in zip(heads, bodies, strict=True)) + b"--parts--\r\n"
        self.status(206, body, **{"Content-Type": "multipart/byteranges; boundary=parts"})

    def range(self) -> tuple[int, int]:
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        return int(first), int(last) + 1

    def partial(self, start: int, end: int, body: bytes, **more: str) -> None:
        total = more.pop("total", str(len(self.server.content)))
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{total}", "Content-Length": str(end - start)}
        self.status(206, body, **headers, **{name.replace("_", "-"): value for name, value in more.items()})

    def status(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """What it serves, what it was asked, and what it answers next."""

    daemon_threads = True

    def __init__(self, content: bytes, cookie: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cookie = content, cookie
        self.script: deque[Answer] = deque()
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.connections = 0
        self.lock = threading.Lock()
        self.release = threading.Event()  # for an answer that stalls

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what these tests are about."""


@contextmanager
def serving(
    content: bytes, certificate: tuple[Path, Path], *, cookie: str = 'vmware_soap_session="s1"'
) -> Iterator[Server]:
    """Serve over HTTPS for the block."""
    server = Server(content, cookie)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    # the handshake belongs to the connection's thread: one that stalls must not keep the others
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        thread.join()
        server.server_close()
