"""What belongs to each run alone: the network policy around its pods, and its certificate."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import kmock
import pytest
from api_server import ApiServer
from fake_kube import alignment_run
from kubernetes.aio.client.exceptions import ApiException
from operators import Operator, until
from test_controller_run import walk_to
from world import World

from services.controller.config import RunCertificates
from services.controller.model import ONLY_FOR_LABEL

ISSUER = {"name": "company", "kind": "ClusterIssuer"}
OTHERS = {"reward": {"endpoints": ["steersman-reward.shared.svc:50052"]}}


def walled(world: World, **settings: Any) -> World:
    world.settings = replace(world.settings, network=True, **settings)
    world.restart()
    return world


def labels_of_pods(world: World) -> dict[str, str | None]:
    """For whom the pods of each workload are, by the workload's name."""
    return {
        name: body["spec"]["template"]["metadata"]["labels"].get(ONLY_FOR_LABEL)
        for (kind, _, name), body in world.kube.objects.items()
        if kind in ("Job", "StatefulSet")
    }


async def test_only_the_pods_of_a_run_reach_its_pods(world: World) -> None:
    walled(world).kube.put(alignment_run())
    await walk_to(world, "rl")
    world.kube.services_up()
    await world.settle()
    policy = world.kube.find("NetworkPolicy", "demo-pods")
    assert policy is not None
    mine = {"matchLabels": {ONLY_FOR_LABEL: "demo"}}
    assert policy["spec"] == {
        "podSelector": mine,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": mine}]}],
    }
    assert policy["metadata"]["ownerReferences"][0]["uid"] == world.kube.find("AlignmentRun", "demo")["metadata"]["uid"]
    pods = labels_of_pods(world)
    assert {"demo-sft", "demo-rl", "demo-policy", "demo-reward", "demo-reference"} <= set(pods)
    assert set(pods.values()) == {"demo"}


async def test_a_run_that_began_before_gets_its_wall_with_the_next_look(world: World) -> None:
    """Its new pods ask for a policy of their run, so an upgrade in the middle must not leave them without."""
    world.kube.put(alignment_run())
    await world.settle()
    assert world.kube.find("NetworkPolicy", "demo-pods") is None
    walled(world)
    await world.settle()
    assert world.kube.find("NetworkPolicy", "demo-pods") is not None
    world.kube.objects.pop(("NetworkPolicy", "ml", "demo-pods"))
    await world.settle()
    assert world.kube.find("NetworkPolicy", "demo-pods") is not None, "removed by hand"


async def test_a_run_has_a_certificate_with_the_names_of_its_own_services(world: World) -> None:
    secret = {"name": "tls", "secret": {"secretName": "all-runs"}}
    templates = {
        name: {**body, "spec": {**body["spec"], "volumes": [secret]}} for name, body in world.settings.templates.items()
    }
    walled(world, templates=templates, certificates=RunCertificates(issuer_ref=ISSUER))
    world.kube.put(alignment_run(services=OTHERS))
    await walk_to(world, "rl")
    world.kube.services_up()
    await world.settle()
    certificate = world.kube.find("Certificate", "demo-tls")
    assert certificate is not None
    spec = certificate["spec"]
    assert spec["dnsNames"] == [
        "localhost",
        *("demo-policy.ml.svc", "*.demo-policy.ml.svc"),
        *("demo-reference.ml.svc", "*.demo-reference.ml.svc"),
    ], "the reward service is another's"
    assert (spec["secretName"], spec["issuerRef"]) == ("demo-tls", ISSUER)
    for kind, name in (("Job", "demo-rl"), ("StatefulSet", "demo-policy"), ("StatefulSet", "demo-reference")):
        body = world.kube.find(kind, name)
        assert body is not None
        (volume,) = [item for item in body["spec"]["template"]["spec"]["volumes"] if item["name"] == "tls"]
        assert volume["secret"]["secretName"] == "demo-tls"
    assert secret["secret"] == {"secretName": "all-runs"}, "the template stays as it is"


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    async with ApiServer() as server, kmock.Server(server):
        yield server


async def test_a_cluster_without_kueue_is_said_and_not_asked_in_a_loop(api: ApiServer) -> None:
    asked = []

    def absent(request: kmock.Request) -> ApiException | None:
        if request.resource.plural != "workloads":
            return None
        asked.append(request)
        return ApiException(status=404, reason="Not Found")

    def message() -> str:
        return str((api.kube.find("AlignmentRun", "demo") or {})["status"]["message"])

    api.intercept = absent
    async with Operator(api):
        api.kube.put(alignment_run(trainer={"queue": "gpus"}))
        for job in ("demo-sft", "demo-reward-model"):
            await until(lambda job=job: api.kube.find("Job", job))
            api.kube.finish_job(job)
        await until(lambda: "install Kueue" in message())
    assert "no kind Workload" in message()
    assert len(asked) < 20, "with pauses that grow"
