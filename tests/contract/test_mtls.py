"""The trainer's whole loop over mTLS and with a run's token; certificates that change; callers without either."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.gateway.testing import gateway_config, running_gateway
from steersman.candidates import Sampling, generate
from steersman.config.tls import ClientTls
from steersman.data.records import Prompt, Row
from steersman.errors import ConfigError, UnauthenticatedError, UnavailableError
from steersman.rpc import probe, tls
from steersman.rpc.client import open_aio_channel, open_channel
from steersman.rpc.server import Server, ServerConfig
from steersman.testing.certificates import Authority
from steersman.testing.fake_policy import FakePolicy, serve_policy
from steersman.v1 import policy_pb2, policy_pb2_grpc, weights_pb2, weights_pb2_grpc

PROMPTS = ["one", "two", "three", "four"]
GENERATION = {"maxNewTokens": 4}
TOKEN_ENV = "TOKEN_OF_THIS_TEST"
STAGES: dict[str, dict[str, Any]] = {
    "rl": {"steps": 2, "promptsPerStep": 2, "samplesPerPrompt": 2, "algorithm": "grpo", "generation": GENERATION},
    "rejectionSampling": {"rounds": 1, "promptsPerRound": 4, "samplesPerPrompt": 2, "generation": GENERATION},
    "evaluate": {"generation": GENERATION, "checks": [{"name": "regex", "options": {"pattern": "[a-z]"}}]},
}


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    drawn = secrets.token_urlsafe(32)
    monkeypatch.setenv(TOKEN_ENV, drawn)
    return drawn


@pytest.mark.parametrize("wrong", ["Umläut", "two words", "line\n", "\x7f"])
def test_a_token_that_no_header_carries_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv(TOKEN_ENV, wrong)
    with pytest.raises(ConfigError, match="a header cannot carry") as caught:
        Server(ServerConfig(token_env=TOKEN_ENV), [])
    assert wrong not in str(caught.value)


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def secret(tmp_path: Path, authority: Authority) -> Path:
    """What a pod mounts; the certificate carries names, not the address that the test's servers have."""
    return authority.issue(tmp_path / "tls", "localhost", "*.ml.svc")


@pytest.fixture
def guarded(cluster: Any, tiny_model: Path, secret: Path, token: str) -> Any:
    """The three services as the chart starts them with `tls.secretName`, and with the token of a run."""
    server = {"cert": secret / "tls.crt", "key": secret / "tls.key", "clientCa": secret / "ca.crt"}
    cluster.server_options = {
        "tls": {key: str(path) for key, path in server.items()},
        "tokenEnv": TOKEN_ENV,
    }
    client = ClientTls.in_folder(secret).model_copy(update={"server_name": "a-run-policy.ml.svc"})
    cluster.client_options = {"tls": client.model_dump(mode="json", by_alias=True), "tokenEnv": TOKEN_ENV}
    cluster.start_policy(tiny_model)
    cluster.start_reference(tiny_model)
    cluster.start_reward([{"name": "regex", "kind": "verifiable", "options": {"pattern": "[a-z]"}}])
    return cluster


@pytest.mark.parametrize("kind", STAGES)
def test_every_stage_with_services_passes(guarded: Any, tiny_model: Path, run_manifest: Callable, kind: str) -> None:
    folder = run_manifest(guarded, tiny_model, {kind: STAGES[kind]}, prompts=PROMPTS)
    complete = json.loads((folder / "complete.json").read_text())
    assert complete["files"]
    if kind == "rl":
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def ask(target: str, tls: ClientTls | None, token: str | None) -> policy_pb2.GetPolicyInfoResponse:
    with open_channel(target, tls, token) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        return stub.GetPolicyInfo(policy_pb2.GetPolicyInfoRequest(), timeout=5)


def refusal(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code()


def test_who_has_neither_certificate_nor_token_gets_nothing(
    guarded: Any, tmp_path: Path, authority: Authority, secret: Path, token: str
) -> None:
    (target,) = guarded.endpoints["policy"]
    (weights,) = guarded.endpoints["weights"]
    own = ClientTls(**guarded.client_options["tls"])
    assert ask(target, own, token).model.max_context > 0
    stranger = ClientTls.in_folder(Authority("another").issue(tmp_path / "stranger", "localhost"))
    trusting = ClientTls(ca=secret / "ca.crt", server_name="localhost")
    for access in (None, trusting, stranger):
        assert refusal(lambda access=access: ask(target, access, token)) == grpc.StatusCode.UNAVAILABLE
    for wrong in (None, token[:-1], token + "x", "x"):
        assert refusal(lambda wrong=wrong: ask(target, own, wrong)) == grpc.StatusCode.UNAUTHENTICATED
    with open_channel(weights, own) as channel:
        stub = weights_pb2_grpc.WeightsServiceStub(channel)
        begin = weights_pb2.BeginUpdateRequest(version=9)
        assert refusal(lambda: stub.BeginUpdate(begin, timeout=5)) == grpc.StatusCode.UNAUTHENTICATED
        upload = iter([weights_pb2.UploadChunksRequest(version=9)])
        assert refusal(lambda: stub.UploadChunks(upload, timeout=5)) == grpc.StatusCode.UNAUTHENTICATED
    with open_channel(target, own) as channel:
        policy = policy_pb2_grpc.PolicyServiceStub(channel)
        request = policy_pb2.GenerateRequest(n=1)
        assert refusal(lambda: list(policy.Generate(request, timeout=5))) == grpc.StatusCode.UNAUTHENTICATED
    # Probes have no token, and another name than the service's.
    local = target.replace("127.0.0.1", "localhost")
    assert probe.serving(local, secret, live=False)
    assert not probe.serving(local, None, live=True)


def test_the_token_of_a_service_that_is_not_set_is_named(
    guarded: Any, tiny_model: Path, run_manifest: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_ENV)
    with pytest.raises(ConfigError, match=rf"services\.policy\.tokenEnv: .*{TOKEN_ENV} is not set"):
        run_manifest(guarded, tiny_model, {"rl": STAGES["rl"]}, prompts=PROMPTS)


def test_a_stage_with_a_wrong_token_says_so(
    guarded: Any, tiny_model: Path, run_manifest: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_ENV, "of-another-run")
    with pytest.raises(UnauthenticatedError, match="take the one of your own run"):
        run_manifest(guarded, tiny_model, {"rl": STAGES["rl"]}, prompts=PROMPTS)


def test_a_stage_without_tls_says_that_the_service_is_away(
    guarded: Any, tiny_model: Path, run_manifest: Callable
) -> None:
    guarded.client_options = {"tokenEnv": TOKEN_ENV}
    with pytest.raises(UnavailableError, match="PolicyService is not ready"):
        run_manifest(guarded, tiny_model, {"rl": STAGES["rl"]}, prompts=PROMPTS)


async def test_candidates_come_over_mtls(guarded: Any, secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`steersman data generate --tls FOLDER`; the token is for runs' own services."""
    client = ClientTls(**guarded.client_options["tls"])
    row: Row = Prompt.model_validate({"id": "1", "prompt": [{"role": "user", "content": "so?"}]})
    with pytest.raises(UnauthenticatedError):
        [found async for found in generate(guarded.endpoints["policy"], [row], Sampling(), client)]


@pytest.mark.parametrize("new_authority", [False, True], ids=["renewed", "new authority"])
async def test_new_certificates_are_taken_without_a_restart(
    guarded: Any, tmp_path: Path, authority: Authority, secret: Path, token: str, monkeypatch, new_authority: bool
) -> None:
    """Channels that are open go on; after the files have changed, both sides use the new ones."""
    monkeypatch.setattr(tls, "LOOK_SECONDS", 0.0)
    (target,) = guarded.endpoints["policy"]
    own = ClientTls(**guarded.client_options["tls"])
    stub = policy_pb2_grpc.PolicyServiceStub(open_channel(target, own, token))
    other = policy_pb2_grpc.PolicyServiceStub(open_aio_channel(target, own, token))
    request = policy_pb2.GetPolicyInfoRequest()
    for name in ("ca.crt", "tls.crt", "tls.key"):
        (tmp_path / f"old-{name}").write_bytes((secret / name).read_bytes())
    old = ClientTls(
        ca=tmp_path / "old-ca.crt",
        cert=tmp_path / "old-tls.crt",
        key=tmp_path / "old-tls.key",
        server_name="localhost",
    )
    assert stub.GetPolicyInfo(request, timeout=5) == await other.GetPolicyInfo(request, timeout=5)
    # Half of a renewal: the key does not belong to the certificate; both sides keep what they have.
    (secret / "tls.key").write_bytes((authority.issue(tmp_path / "next", "localhost") / "tls.key").read_bytes())
    assert stub.GetPolicyInfo(request, timeout=5)
    assert ask(target, old, token)
    await asyncio.sleep(1.05)  # the servers of the fixture look once a second
    (Authority("new") if new_authority else authority).issue(secret, "localhost", "*.ml.svc")
    assert ask(target, own, token)
    assert stub.GetPolicyInfo(request, timeout=5)
    assert await other.GetPolicyInfo(request, timeout=5)
    if new_authority:
        assert refusal(lambda: ask(target, old, token)) == grpc.StatusCode.UNAVAILABLE
    else:
        assert ask(target, old, token)


async def test_the_gateways_rest_port_takes_a_new_certificate(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "LOOK_SECONDS", 0.05)
    folder = authority.issue(tmp_path / "rest", "127.0.0.1")
    files = {"cert": str(folder / "tls.crt"), "key": str(folder / "tls.key")}
    trusting = ssl.create_default_context(cafile=str(folder / "ca.crt"))

    def shown(port: int) -> int:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
            trusting.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
        ):
            return int(secure.getpeercert()["serialNumber"], 16)  # type: ignore[index, arg-type]

    async with (
        serve_policy(FakePolicy()) as endpoint,
        running_gateway(gateway_config(endpoint, tls=files)) as gateway,
    ):
        before = await asyncio.to_thread(shown, gateway.port)
        (folder / "tls.key").write_text("half of a renewal")
        await asyncio.sleep(0.3)
        assert await asyncio.to_thread(shown, gateway.port) == before
        authority.issue(folder, "127.0.0.1")
        for _ in range(200):
            await asyncio.sleep(0.05)
            if await asyncio.to_thread(shown, gateway.port) != before:
                break
        assert await asyncio.to_thread(shown, gateway.port) != before


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path, authority: Authority) -> None:
    one, two = authority.issue(tmp_path / "one", "localhost"), authority.issue(tmp_path / "two", "localhost")
    with pytest.raises(ConfigError, match=r"tls: .*one/tls\.crt and .*two/tls\.key cannot be used"):
        open_channel("localhost:1", ClientTls(ca=one / "ca.crt", cert=one / "tls.crt", key=two / "tls.key"))
    with pytest.raises(ConfigError, match="cert and key belong together"):
        open_channel("localhost:1", ClientTls(ca=one / "ca.crt", cert=one / "tls.crt"))
    with pytest.raises(ConfigError, match=r"tls\.ca: .*nowhere cannot be read"):
        open_channel("localhost:1", ClientTls(ca=tmp_path / "nowhere"))


def test_health_is_open_without_a_token(guarded: Any, secret: Path) -> None:
    (target,) = guarded.endpoints["reward"]
    with open_channel(target, ClientTls(**guarded.client_options["tls"])) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
