import hashlib
import socket
import ssl
from pathlib import Path

import pytest

from tasks.errors import CertificateUntrusted, ConnectionFailed, InvalidInput, ThumbprintMismatch
from tasks.models import Connection, Trust
from tasks.tls import context_for, untrusted
from tests.unit.https import Server, make_certificate, serving


def connection(server: Server, trust: Trust) -> Connection:
    return Connection(host="127.0.0.1", port=server.port, username="u", password="p", trust=trust)  # type: ignore[arg-type]


def shake_hands(to: Connection) -> None:
    with (
        socket.create_connection((to.host, to.port), 5) as plain,
        context_for(to).wrap_socket(plain, server_hostname=to.host),
    ):
        pass


def der(pem: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem.read_text())


def test_a_ca_is_text_or_a_path(tmp_path: Path) -> None:
    pem, key = make_certificate(tmp_path)
    with serving(b"", (pem, key)) as server:
        shake_hands(connection(server, Trust(ca_pem=pem.read_text())))
        shake_hands(connection(server, Trust(ca_pem=str(pem))))


@pytest.mark.parametrize("algorithm", ["sha1", "sha256"])
def test_a_pin_is_enough_even_where_name_and_date_are_wrong(tmp_path: Path, algorithm: str) -> None:
    """As of every vCenter with the certificate that it was born with."""
    pem, key = make_certificate(tmp_path, address="192.0.2.1", days=-1)
    with serving(b"", (pem, key)) as server:
        shake_hands(connection(server, Trust(thumbprint=hashlib.new(algorithm, der(pem)).hexdigest())))


def test_a_pin_trusts_no_other_certificate(tmp_path: Path) -> None:
    """The context that was made for one certificate refuses another on the next connection."""
    (tmp_path / "other").mkdir()
    pem, key = make_certificate(tmp_path)
    with serving(b"", (pem, key)) as server:
        context = context_for(connection(server, Trust(thumbprint=hashlib.sha256(der(pem)).hexdigest())))
    with (
        serving(b"", make_certificate(tmp_path / "other")) as server,
        socket.create_connection(("127.0.0.1", server.port), 5) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        context.wrap_socket(plain)


def test_a_wrong_pin_names_both(tmp_path: Path) -> None:
    pem, key = make_certificate(tmp_path)
    with serving(b"", (pem, key)) as server, pytest.raises(ThumbprintMismatch) as raised:
        context_for(connection(server, Trust(thumbprint="ab" * 32)))
    assert raised.value.expected == ":".join(["AB"] * 32)
    assert raised.value.actual.replace(":", "").lower() == hashlib.sha256(der(pem)).hexdigest()


@pytest.mark.parametrize(("address", "days"), [("192.0.2.1", 1), ("127.0.0.1", -1)])
def test_a_ca_does_not_excuse_a_wrong_name_or_date(tmp_path: Path, address: str, days: int) -> None:
    pem, key = make_certificate(tmp_path, address=address, days=days)
    with serving(b"", (pem, key)) as server:
        to = connection(server, Trust(ca_pem=pem.read_text()))
        with pytest.raises(ssl.SSLCertVerificationError) as raised:
            shake_hands(to)
        error = untrusted(to, raised.value)
    assert isinstance(error, CertificateUntrusted)
    assert error.actual.replace(":", "").lower() == hashlib.sha256(der(pem)).hexdigest()


def test_nothing_is_believed_by_default(tmp_path: Path) -> None:
    with serving(b"", make_certificate(tmp_path)) as server:
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(connection(server, Trust()))
        shake_hands(connection(server, Trust(verify=False)))


def test_nobody_there_is_a_failed_connection() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port, pin = bound.getsockname()[1], Trust(thumbprint="ab" * 20)
        to = Connection(host="127.0.0.1", port=port, username="u", password="p", trust=pin)  # type: ignore[arg-type]
        with pytest.raises(ConnectionFailed, match="Connection refused"):
            context_for(to)


@pytest.mark.parametrize("ca", ["-----BEGIN nothing", "/no/such/file.pem"])
def test_a_ca_that_is_none_is_refused(ca: str) -> None:
    to = Connection(host="h", username="u", password="p", trust=Trust(ca_pem=ca))  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="CA bundle"):
        context_for(to)
