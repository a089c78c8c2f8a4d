"""A run's token and certificates: drawn once, in a Secret of the run, known to its own pods only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml
from fake_kube import alignment_run
from test_controller_run import walk_to
from world import World

from services.controller.model import RUN_LABEL
from services.controller.objects import token_secret
from services.controller.plan import parse_run
from steersman.config.base import load_model
from steersman.config.manifest import AlignmentRun
from steersman.config.tls import ClientTls
from steersman.rpc.token import RUN_TOKEN

SERVICES = ("policy", "reward", "reference")


async def reach_rl(world: World, name: str = "demo", **spec: Any) -> None:
    world.kube.put(alignment_run(name, uid=f"uid-{name}", **spec))
    await walk_to(world, "rl", name)
    world.kube.run_pod(f"{name}-rl", "")  # it has its hardware, and the next run its turn
    world.kube.services_up()
    await world.settle(name)


def variable(pod: dict[str, Any]) -> dict[str, Any]:
    """Where the first container has the token from."""
    (found,) = [item for item in pod["spec"]["containers"][0]["env"] if item["name"] == RUN_TOKEN]
    return found["valueFrom"]["secretKeyRef"]


async def test_every_run_has_a_token_of_its_own(world: World) -> None:
    await reach_rl(world)
    await reach_rl(world, "other")
    tokens = [world.kube.find("Secret", f"{name}-token") for name in ("demo", "other")]
    drawn = [body["stringData"]["token"] for body in tokens if body]
    assert len(set(drawn)) == 2
    assert all(len(token) >= 40 for token in drawn)
    assert tokens[0] is not None
    assert tokens[0]["metadata"]["ownerReferences"][0]["uid"] == "uid-demo", "it goes away with its run"
    assert tokens[0]["metadata"]["labels"][RUN_LABEL] == "demo"
    for name, other in (("demo", "other"), ("other", "demo")):
        for service in SERVICES:
            body = world.kube.find("StatefulSet", f"{name}-{service}")
            assert body is not None
            pod = body["spec"]["template"]
            assert variable(pod) == {"name": f"{name}-token", "key": "token", "optional": False}
            assert f'tokenEnv="{RUN_TOKEN}"' in pod["spec"]["containers"][0]["args"]
            assert f"{other}-token" not in str(pod)
        job = world.kube.find("Job", f"{name}-rl")
        assert job is not None
        assert variable(job["spec"]["template"])["name"] == f"{name}-token"
    # It stands nowhere else: not in a manifest, an argument or a status.
    elsewhere = [body for (kind, _, _), body in world.kube.objects.items() if kind != "Secret"]
    assert not [token for token in drawn if token in str(elsewhere)]


async def test_the_token_stays_the_same_through_restarts_and_upgrades(world: World) -> None:
    await reach_rl(world)
    first = world.kube.find("Secret", "demo-token")
    assert first is not None
    world.restart()
    templates = {
        **world.settings.templates,
        "policy": {**world.settings.templates["policy"], "metadata": {"labels": {"new": "1"}}},
    }
    world.settings = replace(world.settings, templates=templates)
    world.restart()
    await world.settle()
    second = world.kube.find("Secret", "demo-token")
    assert second is not None
    assert second["stringData"] == first["stringData"]


async def test_services_of_an_older_controller_get_a_token_when_they_change(world: World) -> None:
    await reach_rl(world)
    del world.kube.objects["Secret", "ml", "demo-token"]
    policy = world.kube.find("StatefulSet", "demo-policy")
    assert policy is not None
    policy["metadata"]["annotations"] = {"steersman.dev/spec-hash": "of an older controller"}
    world.kube.objects.pop(("Job", "ml", "demo-rl"))
    await world.settle()
    assert world.kube.find("Secret", "demo-token") is not None


async def test_the_manifest_says_how_own_services_are_reached(world: World) -> None:
    tls = ClientTls(ca="/t/ca.crt", cert="/t/tls.crt", key="/t/tls.key")  # type: ignore[arg-type]
    world.settings = replace(world.settings, tls=tls)
    world.restart()
    other = {"endpoints": ["steersman-reward.shared.svc:50052"]}
    await reach_rl(world, services={"policy": {"replicas": 2}, "reward": other})
    body = world.kube.find("ConfigMap", "demo-manifest")
    assert body is not None
    services = load_model(AlignmentRun, yaml.safe_load(body["data"]["manifest.yaml"]), "test").spec.services
    assert services.policy.token_env == services.reference.token_env == RUN_TOKEN
    assert services.reward.token_env is None, "the run's token is for its own services"
    assert services.policy.tls == tls.model_copy(update={"server_name": "demo-policy.ml.svc"})
    assert services.reward.tls == tls, "the shared service shows a certificate of the same authority"


def test_without_tls_nothing_is_said_about_it(world: World) -> None:
    run = alignment_run()
    manifest = parse_run(run)
    body = token_secret(run, manifest)
    assert body["immutable"] is True
    assert "data" not in body
    assert "stringData" not in body, "whoever creates it draws it"
