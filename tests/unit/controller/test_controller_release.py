"""The release: approval, canary steps, promotion, rollback, conflicts, and what is left when the run goes."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fake_kube import alignment_run, inference_service
from kubernetes.aio.client.exceptions import ApiException

from services.controller.model import Signals
from services.controller.release import candidate_name, verdict
from services.controller.status import VariantSignals
from steersman.config.manifest import Canary
from steersman.errors import UnavailableError
from steersman.registry import Registry

CANARY = {"steps": [10, 50, 100], "minutesPerStep": 30, "minFeedback": 20}
GOOD = VariantSignals(requests=500, error_rate=0.0, feedback=40, thumbs_down_share=0.1, latency_seconds=1.0)


class FakeSignals:
    """Live signals that the test sets; None: the sources do not answer."""

    def __init__(self) -> None:
        self.candidate: VariantSignals | None = GOOD
        self.champion = GOOD

    async def read(self, *_: Any) -> Signals:
        if self.candidate is None:
            raise UnavailableError("Prometheus does not answer")
        return Signals(self.champion, self.candidate)


class FakeRegistry:
    def __init__(self) -> None:
        self.aliases: list[str] = []

    async def set_alias(self, alias: str, *_: Any) -> str:
        self.aliases.append(alias)
        return "1"


@pytest.fixture
async def release(world):
    """A run whose models are made and whose release begins."""

    async def begin(canary: dict[str, Any] | None = CANARY, **service: Any) -> str:
        stage = {"inferenceService": "chat", **({"canary": canary} if canary else {})}
        world.kube.put(inference_service(**service))
        world.kube.put(alignment_run(stages=[{"release": stage}]))
        await world.settle()
        world.kube.finish_job("demo-release")
        await world.settle()
        return candidate_name(world.kube.find("AlignmentRun", "demo"))

    world.signals = FakeSignals()
    world.registry = FakeRegistry()
    world.restart()
    return begin


def canary_ready(world, candidate: str) -> None:
    entry = world.kube.find("InferenceService", "chat")["spec"]["canary"][0]
    status = {"name": candidate, "ready": True, "trafficPercent": entry["trafficPercent"]}
    world.kube.set_status("InferenceService", "chat", {"canaryStatuses": [status]})


def spec(world) -> dict[str, Any]:
    return world.kube.find("InferenceService", "chat")["spec"]


async def test_the_candidate_walks_through_all_steps_and_is_promoted(world, release, condition):
    candidate = await release()
    uri = "pvc://steersman-artifacts/runs/ml/demo/release/model"
    for percent in (10, 50, 100):
        entry = spec(world)["canary"][0]
        assert entry["trafficPercent"] == percent
        assert entry["predictor"] == {
            "name": candidate,
            "minReplicas": 2,
            "model": {"modelFormat": {"name": "steersman"}, "storageUri": uri},
        }, "KServe refuses maxReplicas in a canary"
        assert spec(world)["predictor"]["model"]["storageUri"] == "pvc://steersman-artifacts/old"
        canary_ready(world, candidate)
        status = await world.settle()
        assert status["release"]["percent"] == percent
        world.later(minutes=29)
        assert (await world.settle())["release"]["percent"] == percent, "a step is watched to its end"
        world.later(minutes=2)
        status = await world.settle()
    assert "canary" not in spec(world)
    assert spec(world)["predictor"]["name"] == candidate
    assert spec(world)["predictor"]["model"]["storageUri"] == uri
    assert status["phase"] == "Succeeded"
    assert status["release"]["decision"] == "Promoted"
    assert status["release"]["previousModel"] == "pvc://steersman-artifacts/old"
    assert condition(status, "Released")["status"] == "True"
    assert world.registry.aliases[0] == "candidate"
    assert world.registry.aliases[-1] == "champion"
    assert not world.kube.find("AlignmentRun", "demo")["metadata"].get("finalizers")
    assert {"CandidateRegistered", "CanaryStep", "Promoted"} <= set(world.events())


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (GOOD.model_copy(update={"error_rate": 0.05}), "5.0% of the requests failed"),
        (GOOD.model_copy(update={"latency_seconds": 1.6}), "median latency is 1.60 times"),
        (GOOD.model_copy(update={"thumbs_down_share": 0.2}), "thumbs down rose by 10.0%"),
    ],
)
async def test_a_worse_candidate_is_rolled_back_and_the_reason_kept(world, release, condition, bad, why):
    candidate = await release()
    canary_ready(world, candidate)
    await world.settle()
    world.signals.candidate = bad
    status = await world.settle()
    assert status["phase"] == "RolledBack"
    assert why in status["release"]["reason"]
    assert "canary" not in spec(world)
    assert spec(world)["predictor"]["model"]["storageUri"] == "pvc://steersman-artifacts/old"
    assert condition(status, "Released")["reason"] == "RolledBack"
    assert "champion" not in world.registry.aliases
    world.later(days=1)
    assert (await world.settle())["phase"] == "RolledBack"


async def test_missing_signals_hold_and_never_promote(world, release):
    candidate = await release()
    canary_ready(world, candidate)
    await world.settle()
    world.signals.candidate = None
    world.later(days=3)
    status = await world.settle()
    assert status["release"]["percent"] == 10
    assert "not available" in status["message"]


async def test_a_step_is_not_left_before_enough_judgements(world, release):
    candidate = await release()
    canary_ready(world, candidate)
    world.signals.candidate = GOOD.model_copy(update={"feedback": 5})
    await world.settle()
    world.later(hours=5)
    status = await world.settle()
    assert "waiting for 15 more judgements" in status["message"]
    world.signals.candidate = GOOD
    assert (await world.settle())["release"]["percent"] == 50


async def test_the_champion_of_earlier_steps_is_the_measure_when_it_has_no_traffic_left(world, release):
    candidate = await release({**CANARY, "steps": [50, 100]})
    canary_ready(world, candidate)
    await world.settle()
    world.later(minutes=31)
    await world.settle()
    canary_ready(world, candidate)
    world.signals.champion = VariantSignals(requests=0, error_rate=0, feedback=0, thumbs_down_share=0)
    world.signals.candidate = GOOD.model_copy(update={"thumbs_down_share": 0.3})
    assert (await world.settle())["phase"] == "RolledBack"


async def test_a_candidate_that_never_gets_ready_is_taken_back(world, release):
    await release()
    world.later(minutes=31)
    status = await world.settle()
    assert status["phase"] == "RolledBack"
    assert "not ready" in status["release"]["reason"]
    assert "canary" not in spec(world)


async def test_approval_is_waited_for(world, release):
    await release({**CANARY, "manualApproval": True})
    assert world.status()["phase"] == "AwaitingApproval"
    assert "canary" not in spec(world)
    world.kube.find("AlignmentRun", "demo")["metadata"]["annotations"] = {"steersman.dev/approve": "true"}
    await world.settle()
    assert spec(world)["canary"][0]["trafficPercent"] == 10


async def test_without_a_canary_the_model_is_published_at_once(world, release):
    await release(None)
    status = await world.settle()
    assert spec(world)["predictor"]["model"]["storageUri"].endswith("runs/ml/demo/release/model")
    assert "name" not in spec(world)["predictor"]
    assert status["phase"] == "Succeeded"


async def test_a_canary_without_signals_configured_is_refused_clearly(world, release):
    world.settings = type(world.settings)(world.settings.templates, can_watch=False)
    world.restart()
    await release()
    assert "controller.prometheusUrl" in world.status()["message"]
    assert "canary" not in spec(world)


async def test_another_runs_canary_is_waited_for(world, release):
    world.kube.put(inference_service())
    await release()
    own = spec(world)["canary"][0]
    foreign = {"trafficPercent": 5, "predictor": {"name": "other", "model": {}}}
    spec(world)["canary"] = [foreign]
    status = await world.settle()
    assert "another canary" in status["message"]
    assert spec(world)["canary"] == [foreign]
    spec(world)["canary"] = []
    await world.settle()
    assert spec(world)["canary"] == [own]


async def test_a_conflicting_edit_of_the_service_is_decided_anew(world, release):
    candidate = await release()
    canary_ready(world, candidate)
    await world.settle()
    world.later(minutes=31)
    real = world.kube.patch
    conflicts = []

    async def edited(kind, *arguments, **options):
        if kind == "InferenceService" and not conflicts:
            conflicts.append(1)
            raise ApiException(status=409, reason="Conflict")
        return await real(kind, *arguments, **options)

    world.kube.patch = edited
    assert await world.reconciler.reconcile("ml", "demo") == 0.0
    assert world.status()["release"]["percent"] == 10, "nothing is claimed that was not written"
    status = await world.settle()
    assert status["release"]["percent"] == 50
    assert spec(world)["canary"][0]["trafficPercent"] == 50


async def test_deleting_a_run_during_its_canary_gives_the_traffic_back(world, release):
    await release()
    assert world.kube.find("AlignmentRun", "demo")["metadata"]["finalizers"] == ["steersman.dev/canary"]
    await world.kube.delete("AlignmentRun", "ml", "demo")
    await world.look(times=2)
    assert "canary" not in spec(world)
    assert world.kube.names("AlignmentRun") == []


async def test_cancelling_during_the_canary_gives_the_traffic_back(world, release):
    await release()
    world.kube.find("AlignmentRun", "demo")["metadata"]["annotations"] = {"steersman.dev/cancel": "true"}
    status = await world.settle()
    assert status["phase"] == "Cancelled"
    assert "canary" not in spec(world)
    assert not world.kube.find("AlignmentRun", "demo")["metadata"]["finalizers"]


async def test_a_restart_between_promotion_and_status_does_not_release_again(world, release):
    candidate = await release({**CANARY, "steps": [100], "minFeedback": 0})
    canary_ready(world, candidate)
    await world.settle()
    world.later(minutes=31)
    real = world.kube.patch

    async def crash(kind, *arguments, **options):
        if kind == "AlignmentRun" and "canary" not in spec(world):
            raise RuntimeError("killed")
        return await real(kind, *arguments, **options)

    world.kube.patch = crash
    with pytest.raises(RuntimeError):
        await world.look()
    world.kube.patch = real
    world.restart()
    assert (await world.settle())["phase"] == "Succeeded"
    assert spec(world)["predictor"]["name"] == candidate


async def test_a_missing_inference_service_is_waited_for(world):
    world.kube.put(alignment_run(stages=[{"release": {"inferenceService": "chat"}}]))
    await world.settle()
    world.kube.finish_job("demo-release")
    status = await world.settle()
    assert status["message"] == "waiting for the InferenceService chat, which does not exist"
    world.kube.put(inference_service())
    assert (await world.settle())["phase"] == "Succeeded"


def test_too_little_traffic_says_nothing():
    few = VariantSignals(requests=5, error_rate=1.0, feedback=2, thumbs_down_share=1.0, latency_seconds=9.0)
    assert verdict(few, GOOD, Canary()) is None


async def test_the_registry_is_told_once_and_may_be_told_again():
    versions: list[dict[str, Any]] = []
    aliases: dict[str, str] = {}

    def mlflow(request: httpx.Request) -> httpx.Response:
        import json

        path = request.url.path.removeprefix("/api/2.0/mlflow")
        body = json.loads(request.content) if request.content else dict(request.url.params)
        if path == "/registered-models/create":
            return httpx.Response(400, json={"error_code": "RESOURCE_ALREADY_EXISTS", "message": "exists"})
        if path == "/model-versions/search":
            assert body["filter"] == "name='chat' and tag.`steersman.run_uid`='uid-1'"
            return httpx.Response(200, json={"model_versions": versions})
        if path == "/model-versions/create":
            versions.append({"version": "7", **body})
            return httpx.Response(200, json={"model_version": versions[-1]})
        assert path == "/registered-models/alias"
        aliases[body["alias"]] = body["version"]
        return httpx.Response(200, json={})

    registry = Registry("http://mlflow", "chat", httpx.MockTransport(mlflow))
    for alias in ("candidate", "candidate", "champion"):
        assert await registry.set_alias(alias, "uid-1", "demo", "pvc://x") == "7"
    assert len(versions) == 1
    assert aliases == {"candidate": "7", "champion": "7"}
    await registry.close()
