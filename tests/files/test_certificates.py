"""Servers whose certificate nobody has reason to trust: an error at once, by HTTP and of object stores."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.files.buckets import Bucket
from tests.files.web import Web, running
from vitscale.files.http import HttpFiles
from vitscale.files.objects import ObjectFiles
from vitscale.files.retry import retries

pytest.importorskip("obstore")
pytest.importorskip("cryptography")
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    key, now, day = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC), timedelta(days=1)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "server.pem").write_bytes(private + made.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    web = Web(Bucket)
    web.files["/images/a.tar"] = b"never sent"
    web.socket = context.wrap_socket(web.socket, server_side=True)
    with running(web):
        yield f"https://localhost:{web.server_port}"
    assert web.requests == []


@pytest.mark.parametrize("scheme", ["https", "s3"])
def test_a_certificate_that_is_not_trusted_is_an_error_at_once(
    url: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"AWS_ENDPOINT_URL": url, "AWS_SKIP_SIGNATURE": "true", "no_proxy": "localhost"}.items():
        monkeypatch.setenv(name, value)
    store, before = (HttpFiles(), int(retries)) if scheme == "https" else (ObjectFiles(), int(retries))
    with pytest.raises(OSError, match="its certificate is not one that this machine trusts"):
        store.stat(f"{url}/images/a.tar" if scheme == "https" else "s3://images/a.tar")
    assert int(retries) == before
