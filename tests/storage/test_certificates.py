"""A server that proves itself by a certificate nobody knows: no patience cures that, and none is spent."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lungseg.errors import StorageError
from lungseg.storage import open_store
from lungseg.storage.s3_errors import may_pass


def write_certificate(file: Path) -> None:
    """Self-signed, for 127.0.0.1, with its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "nobody")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    file.write_bytes(key.private_bytes(pem, *plain) + certificate.public_bytes(pem))


@pytest.fixture
def unknown_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    write_certificate(tmp_path / "pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem")
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def test_reads_and_writes_end_at_once(unknown_server: None, tmp_path: Path) -> None:
    store = open_store("s3://bucket/prefix")
    store._met = True  # type: ignore[attr-defined]  # or a write would not be patient anyway
    (tmp_path / "file").write_bytes(b"1")
    began = time.monotonic()
    for act in (
        lambda: store.get("key"),
        lambda: store.put("key", b"1"),
        lambda: store.put("key", tmp_path / "file"),
    ):
        with pytest.raises(StorageError, match="store-unreachable") as caught:
            act()
        assert caught.value.__cause__ is not None
        assert not may_pass(caught.value.__cause__)  # type: ignore[arg-type]
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("error", [ssl.SSLEOFError(8, "cut"), ConnectionResetError(), TimeoutError()])
def test_a_connection_that_is_cut_may_hold_the_next_time(error: OSError) -> None:
    assert may_pass(error)
