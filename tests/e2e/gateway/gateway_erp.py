"""Real business systems beside a gateway: Tryton on SQLite, seen through a recording proxy, and signed identities."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.testing import free_port, serve_app, wait_for_port

HERE = Path(__file__).resolve().parent
ISSUER, AUDIENCE = "https://login.example", "steersman"


# --- identities -------------------------------------------------------------------------------------------------


@dataclass
class Identities:
    """An issuer of customer tokens, with its key set in a file."""

    folder: Path
    keys: dict[str, rsa.RSAPrivateKey] = field(default_factory=dict)

    def rotate(self, *key_ids: str) -> None:
        """The key set holds exactly these keys from now on."""
        for key_id in key_ids:
            self.keys.setdefault(key_id, rsa.generate_private_key(public_exponent=65537, key_size=2048))
        public = []
        for key_id in key_ids:
            entry = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(self.keys[key_id].public_key()))
            public.append({**entry, "kid": key_id, "use": "sig", "alg": "RS256"})
        self.path.write_text(json.dumps({"keys": public}))

    @property
    def path(self) -> Path:
        return self.folder / "jwks.json"

    def public_pem(self, key_id: str) -> bytes:
        return (
            self.keys[key_id]
            .public_key()
            .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )

    def token(self, customer: Any, key_id: str = "k1", **changes: Any) -> str:
        """A token; `changes` replace claims, None removes one."""
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": customer, "exp": time.time() + 600, **changes}
        claims = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(claims, self.keys[key_id], algorithm="RS256", headers={"kid": key_id})

    @property
    def config(self) -> dict[str, Any]:
        return {
            "jwt": [{"issuer": ISSUER, "audience": AUDIENCE, "jwks": str(self.path), "lookupSeconds": 0.05}],
            "signedHeader": {"secretEnv": "TEST_IDENTITY_SECRET"},
        }


@pytest.fixture(scope="session")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    os.environ["TEST_IDENTITY_SECRET"] = "s" * 40
    found = Identities(tmp_path_factory.mktemp("identities"))
    found.rotate("k1")
    return found


# --- what goes over the wire to a business system ---------------------------------------------------------------


@dataclass
class Exchange:
    path: str
    query: dict[str, list[str]]
    status: int
    body: Any

    @property
    def domain(self) -> Any:
        """Tryton's search domain."""
        return json.loads(base64.urlsafe_b64decode(self.query["d"][0]))


@dataclass
class Boundary:
    """A proxy before a business system that keeps everything that passes."""

    target: str
    exchanges: list[Exchange] = field(default_factory=list)
    url: str = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        headers = {k: v for k, v in request.headers.items() if k not in ("host", "accept-encoding")}
        query: dict[str, list[str]] = {}
        for name, value in request.query_params.multi_items():
            query.setdefault(name, []).append(value)
        async with httpx.AsyncClient(base_url=self.target, timeout=30) as client:
            answer = await client.request(
                request.method, f"{request.url.path}?{request.url.query}", headers=headers, content=await request.body()
            )
        try:
            body = answer.json()
        except ValueError:
            body = answer.text
        self.exchanges.append(Exchange(request.url.path, query, answer.status_code, body))
        await Response(answer.content, answer.status_code, media_type="application/json")(scope, receive, send)


@asynccontextmanager
async def recording(target: str) -> AsyncIterator[Boundary]:
    boundary = Boundary(target)
    async with serve_app(boundary) as url:
        boundary.url = url
        yield boundary


# --- Tryton -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrytonServer:
    url: str
    facts: dict[str, Any]

    def system(self, url: str) -> dict[str, Any]:
        """The gateway's configuration for it, reached at `url`."""
        os.environ["TEST_TRYTON_KEY"] = self.facts["key"]
        return {
            "name": "erp",
            "type": "tryton",
            "url": url,
            "database": "erp",
            "keyEnv": "TEST_TRYTON_KEY",
            "seconds": 30,
            "stockLocations": [self.facts["warehouse"]],
        }


@pytest.fixture(scope="session")
def tryton(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrytonServer]:
    trytond = pytest.importorskip("trytond", reason="Tryton is not installed (extra `dev`)")
    pytest.importorskip("proteus")
    setup = HERE / "tryton_setup.py"
    version = hashlib.sha256(setup.read_bytes() + trytond.__version__.encode()).hexdigest()[:16]
    cache = repo_root / ".cache" / "tests" / f"tryton-{version}"
    folder, port = tmp_path_factory.mktemp("tryton"), free_port()
    config = folder / "trytond.conf"
    config.write_text(f"[database]\nuri = sqlite://\npath = {folder}\n[web]\nlisten = 127.0.0.1:{port}\n")
    scripts = Path(sys.executable).parent
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:  # one worker makes it, the other waits
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / "facts.json").is_file():
            _make_database(scripts, setup, config, folder)
            shutil.copy(folder / "erp.sqlite", cache / "erp.sqlite")
            shutil.copy(folder / "facts.json", cache / ".facts.json")
            (cache / ".facts.json").rename(cache / "facts.json")  # the last, so that what is there is whole
    shutil.copy(cache / "erp.sqlite", folder / "erp.sqlite")
    facts = json.loads((cache / "facts.json").read_text())
    server = subprocess.Popen(
        [scripts / "trytond", "-c", config, "-d", "erp"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for_port(port, server)
        yield TrytonServer(f"http://127.0.0.1:{port}", facts)
    finally:
        server.terminate()
        server.wait(20)


def _make_database(scripts: Path, setup: Path, config: Path, folder: Path) -> None:
    (folder / "erp.sqlite").touch()
    (folder / "password").write_text("only for this test")
    environment = {**os.environ, "TRYTONPASSFILE": str(folder / "password")}
    modules = ["sale", "account_invoice_stock"]
    admin = [scripts / "trytond-admin", "-c", config, "-d", "erp", "--all", "--email", "admin@example.com"]
    run = {"check": True, "stdin": subprocess.DEVNULL, "env": environment, "timeout": 900}
    subprocess.run([*admin, "-u", *modules, "--activate-dependencies"], stderr=subprocess.DEVNULL, **run)
    made = subprocess.run([sys.executable, setup, config, "erp"], stdout=subprocess.PIPE, **run)
    (folder / "facts.json").write_bytes(made.stdout.splitlines()[-1])
