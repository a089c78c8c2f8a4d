"""Requests to named addresses: metadata services and link-local ones are refused, redirects included."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from services.gateway.backends.openai import OpenAIReplica
from services.gateway.backends.tgi import TgiReplica
from services.policy.engines.tgi import TgiEngine
from services.policy.weights import _pieces
from steersman import net
from steersman.data.opening import open_bytes
from steersman.errors import (
    InternalError,
    PermissionDeniedError,
    RateLimitedError,
    SteersmanError,
    UnavailableError,
    without_credentials,
)
from steersman.net import fetched, guarded_client, guarded_sync_client, patiently, refusal
from steersman.openmp import remove_left_behind
from steersman.rewards.builtin import http as http_reward
from steersman.testing.models import tiny_tokenizer
from steersman.v1.policy_pb2 import PolicyServiceChatRequest


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("169.254.169.254", "link-local"), ("169.254.170.2", "link-local"), ("fe80::1%eth0", "link-local"),
        ("::ffff:169.254.169.254", "link-local"), ("fd00:ec2::254", "a metadata service"),
        ("100.100.100.200", "a metadata service"), ("0.0.0.0", "unspecified"), ("::", "unspecified"),
        ("64:ff9b::a9fe:a9fe", "link-local"), ("::a9fe:a9fe", "link-local"), ("2002:a9fe:a9fe::1", "link-local"),
        ("2001:0:1:2:3:4:5601:5601", "link-local"), ("fd20:ce::254", "a metadata service"), ("::1", None),
        ("224.0.0.1", "multicast"), ("10.0.0.1", None), ("127.0.0.1", None), ("8.8.8.8", None),
    ],
)  # fmt: skip
def test_addresses(address: str, reason: str | None) -> None:
    assert refusal(address) == reason
    if reason is None:
        assert refusal(address, public_only=True) == (None if address == "8.8.8.8" else "not public")


class _Redirecting(http.server.BaseHTTPRequestHandler):
    target = ""

    def do_GET(self) -> None:
        self.send_response(302 if self.path == "/away" else 200)
        if self.path == "/away":
            self.send_header("location", self.target)
        self.end_headers()
        self.wfile.write(self.headers["host"].encode())

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Redirecting)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield f"localhost:{listener.server_port}"
    listener.shutdown()


async def test_redirects_are_looked_at_and_names_stay_names(server: str) -> None:
    for target in ("http://169.254.169.254/latest/meta-data", "http://[fd00:ec2::254]/", "http://[::ffff:a9fe:a9fe]/"):
        _Redirecting.target = target
        async with guarded_client(follow_redirects=True, timeout=5) as client:
            with pytest.raises(PermissionDeniedError, match="not connected to"):
                await client.get(f"http://{server}/away")
        with guarded_sync_client(follow_redirects=True, timeout=5) as threaded:
            assert threaded.get(f"http://{server}/").text == server, "::1 is tried first, then 127.0.0.1"
            with pytest.raises(PermissionDeniedError):
                threaded.get(f"http://{server}/away")
    async with guarded_client(public_only=True) as client:
        with pytest.raises(PermissionDeniedError, match="not public"):
            await client.get(f"http://{server}/")


async def test_a_name_that_points_inside_is_refused_unless_it_is_allowed(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = server.partition(":")[2]
    monkeypatch.setattr(net, "_resolve", lambda host, port: ["127.0.0.1"] if host == "inside.example" else ["::"])
    async with guarded_client(public_only=True, allow=["inside.example"]) as client:
        assert (await client.get(f"http://inside.example:{port}/")).text == f"inside.example:{port}"
    monkeypatch.setenv(net.ALLOW_VARIABLE, "10.0.0.0/8, 127.0.0.0/8")
    async with guarded_client(public_only=True) as client:
        assert (await client.get(f"http://inside.example:{port}/")).status_code == 200
        with pytest.raises(PermissionDeniedError, match="unspecified"):
            await client.get(f"http://other.example:{port}/")


async def test_a_name_that_does_not_exist_is_no_answer() -> None:
    async with guarded_client() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get("http://no-such-name.invalid/")


def test_rewards_do_not_reach_metadata_services_and_show_no_password() -> None:
    with pytest.raises(PermissionDeniedError, match="link-local"):
        http_reward("http://169.254.169.254/score")([], "answer", {})
    with pytest.raises(UnavailableError) as failed:
        http_reward("http://ann:hunter2@127.0.0.1:9/score?api_key=abc")([], "answer", {})
    assert "hunter2" not in str(failed.value)
    assert "abc" not in str(failed.value)
    assert "127.0.0.1:9" in str(failed.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:pw@db/x", "postgresql://***@db/x"),
        (
            "see s3://k:s@b/p?X-Amz-Signature=ab&v=1 and http://h/",
            "see s3://***@b/p?X-Amz-Signature=***&v=1 and http://h/",
        ),
        ("mail ann@example.com", "mail ann@example.com"),
        ("https://host/a@b", "https://host/a@b"),
    ],
)
def test_urls_lose_their_credentials(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
    assert str(UnavailableError(text)) == shown


def test_shared_memory_of_killed_processes_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    uid = os.getuid()
    left = tmp_path / f"__KMP_REGISTERED_LIB_{dead.pid}_{uid}"
    others = [tmp_path / f"__KMP_REGISTERED_LIB_{os.getpid()}_{uid}", tmp_path / f"__KMP_REGISTERED_LIB_1_{uid + 1}"]
    for path in (left, *others):
        path.write_bytes(bytes(1024))
    assert remove_left_behind(tmp_path) == 1
    assert sorted(tmp_path.iterdir()) == sorted(others)
    # A container that is started again has the process numbers of the one that was killed.
    assert remove_left_behind(tmp_path, own=True) == 1
    assert sorted(tmp_path.iterdir()) == others[1:]


def test_files_of_urls_come_from_no_address_inside(server: str, tmp_path: Path) -> None:
    """Data files and weights: what a manifest names, and what it is redirected to."""
    _Redirecting.target = "http://169.254.169.254/latest/meta-data"
    for url in (f"http://{server}/away", "http://169.254.169.254/a.jsonl", "http://[64:ff9b::a9fe:a9fe]/a.jsonl"):
        with pytest.raises(PermissionDeniedError, match="not connected to"), open_bytes(url):
            pass
        with pytest.raises(PermissionDeniedError, match="not connected to"):
            list(_pieces(url))
    with open_bytes(f"http://{server}/a.jsonl") as stream:
        assert stream.read() == server.encode()
    assert b"".join(_pieces(f"http://{server}/w")) == server.encode()
    with (
        pytest.raises(UnavailableError, match=r"http://\*\*\*@nowhere.invalid/a: "),
        fetched("http://u:p@nowhere.invalid/a"),
    ):
        pass


@pytest.mark.parametrize("kind", ["openai", "tgi"])
async def test_a_model_server_is_no_metadata_service(kind: str) -> None:
    url = "http://169.254.169.254/v1"
    replica = OpenAIReplica(url, "m", "", 1.0) if kind == "openai" else TgiReplica(url, "", 1.0)
    with pytest.raises(UnavailableError, match="not connected to"):
        async for _ in replica.stream(PolicyServiceChatRequest(prompt="a"), 5.0):
            pass
    with pytest.raises(SteersmanError, match="not connected to"):
        await replica.probe()
    await replica.close()


def test_the_policys_tgi_server_is_no_metadata_service(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(PermissionDeniedError, match="not connected to"):
        TgiEngine("http://169.254.169.254", tmp_path).start()


def test_what_is_full_or_away_is_asked_again_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steersman.net._LONGEST_WAIT", 0.0)
    asked: list[type[Exception] | None] = []

    def asking(*errors: type[Exception] | None) -> Callable[[], str]:
        answers = iter(errors)

        def ask() -> str:
            error = next(answers)
            asked.append(error)
            if error is not None:
                raise error("no")
            return "yes"

        return ask

    assert patiently(asking(UnavailableError, RateLimitedError, UnavailableError, None)) == "yes"
    with pytest.raises(UnavailableError):
        patiently(asking(UnavailableError, None), away=0)
    asked.clear()
    with pytest.raises(RateLimitedError):
        patiently(asking(*[RateLimitedError] * 20))
    assert len(asked) == 6
    asked.clear()
    with pytest.raises(InternalError):
        patiently(asking(InternalError, None))
    assert len(asked) == 1
