"""One `ssl.SSLContext` for every connection to a server, made from `Trust`: SOAP, /folder, hosts.

A pinned thumbprint becomes a context that trusts that one certificate and nothing else, so a library that
knows no thumbprints (httpx) is as safe as one that does.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
from pathlib import Path

from tasks.errors import CertificateUntrusted, ConnectionFailed, InvalidInput, ThumbprintMismatch
from tasks.models import Connection, Trust

HANDSHAKE_TIMEOUT_S = 10.0
X509_V_FLAG_NO_CHECK_TIME = 0x200000  # openssl/x509_vfy.h: a pin does not expire


def context_for(connection: Connection) -> ssl.SSLContext:
    """Return the context for `connection`; a pinned certificate is fetched and compared now.

    Raises ThumbprintMismatch, ConnectionFailed, InvalidInput (CA text that is none).
    """
    trust = connection.trust
    if trust.thumbprint:
        certificate = fetch_certificate(connection)
        actual = thumbprint_of(certificate, like=trust.thumbprint)
        if actual != trust.thumbprint:
            raise ThumbprintMismatch(host=connection.address, expected=colons(trust.thumbprint), actual=colons(actual))
        return _trusting_only(certificate)
    if not trust.verify:
        return unverified()
    return trusting_cas(trust)


def unverified() -> ssl.SSLContext:
    """Return a context that believes anybody: only where an operator wrote the word."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def fetch_certificate(connection: Connection) -> bytes:
    """Return the server's certificate (DER), whatever it is worth. Raises ConnectionFailed."""
    return _shown(connection, unverified())


def believed_certificate(connection: Connection) -> bytes:
    """Return the server's certificate (DER), after it was verified as `connection` says.

    Raises CertificateUntrusted, ThumbprintMismatch, ConnectionFailed.
    """
    return _shown(connection, context_for(connection))


def _shown(connection: Connection, context: ssl.SSLContext) -> bytes:
    try:
        with (
            socket.create_connection((connection.host, connection.port), HANDSHAKE_TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=connection.host) as secure,
        ):
            certificate = secure.getpeercert(binary_form=True)
    except ssl.SSLCertVerificationError as error:
        raise untrusted(connection, error) from error
    except OSError as error:
        raise ConnectionFailed(host=connection.address, why=reason(error)) from error
    if not certificate:
        raise ConnectionFailed(host=connection.address, why="it shows no certificate")
    return certificate


def untrusted(connection: Connection, error: ssl.SSLCertVerificationError) -> CertificateUntrusted:
    """Return the error for a certificate that did not verify, with the thumbprint that the server shows."""
    actual = colons(hashlib.sha256(fetch_certificate(connection)).hexdigest())
    return CertificateUntrusted(host=connection.address, why=error.verify_message, actual=actual)


def thumbprint_of(certificate: bytes, *, like: str) -> str:
    """Return the thumbprint of a DER certificate by the algorithm of `like` (by its length)."""
    digest = hashlib.sha1(certificate) if len(like) == 40 else hashlib.sha256(certificate)
    return digest.hexdigest().upper()


def colons(digits: str) -> str:
    """Return hex digits as `AA:BB:…`, as vSphere and openssl show them."""
    return ":".join(digits[i : i + 2] for i in range(0, len(digits), 2)).upper()


def reason(error: OSError) -> str:
    """Return an operating-system error in words, without its number and class."""
    if isinstance(error, TimeoutError):
        return f"no answer within {HANDSHAKE_TIMEOUT_S:.0f} s"
    return error.strerror or str(error) or type(error).__name__


def _trusting_only(certificate: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the certificate itself is the identity
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | X509_V_FLAG_NO_CHECK_TIME
    context.load_verify_locations(cadata=ssl.DER_cert_to_PEM_cert(certificate))
    return context


def trusting_cas(trust: Trust) -> ssl.SSLContext:
    """Return a context that believes the CAs of `trust`, or the system's. Raises InvalidInput."""
    if not trust.ca_pem:
        return ssl.create_default_context()
    text = trust.ca_pem if "-----BEGIN" in trust.ca_pem else _read_ca(Path(trust.ca_pem).expanduser())
    try:
        return ssl.create_default_context(cadata=text)
    except ssl.SSLError as error:
        raise InvalidInput(what="CA bundle", why="no certificate in PEM form in it", remedy="Give PEM text") from error


def _read_ca(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise InvalidInput(
            what=f"CA bundle {path}", why=reason(error), remedy="Give the path of a PEM file, or its text"
        ) from error
