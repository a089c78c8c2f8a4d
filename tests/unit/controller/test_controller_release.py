"""The release: approval, canary steps, promotion, rollback, conflicts, and what is left when the run goes."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import yaml
from fake_kube import alignment_run, deployment, inference_service
from kubernetes.aio.client.exceptions import ApiException
from world import World

from services.controller.model import Signals
from services.controller.release import candidate_name
from services.gateway.backends.split import Shares
from steersman.canary import Arm
from steersman.errors import UnavailableError
from steersman.registry import Registry

CANARY = {"steps": [10, 50, 100], "minutesPerStep": 30, "minFeedback": 20}
GOOD = Arm(judged=2000, bad=200, requests=5000, errors=5, timed=5000, slow=500)


class FakeSignals:
    """Live signals that the test sets; None: the sources do not answer."""

    def __init__(self) -> None:
        self.candidate: Arm | None = GOOD
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


class KServeBot:
    """An InferenceService `chat`, and KServe's part."""

    stage = {"inferenceService": "chat"}
    old = "pvc://steersman-artifacts/old"
    new = "pvc://steersman-artifacts/runs/ml/demo/release/model"

    def __init__(self, world: World) -> None:
        self.world = world
        world.kube.put(inference_service())

    @property
    def spec(self) -> dict[str, Any]:
        return self.world.kube.find("InferenceService", "chat")["spec"]

    def percent(self) -> int | None:
        entries = self.spec.get("canary") or []
        return entries[0]["trafficPercent"] if entries else None

    def model(self) -> str:
        return self.spec["predictor"]["model"]["storageUri"]

    def ready(self) -> None:
        entry = self.spec["canary"][0]
        status = {"name": entry["predictor"]["name"], "ready": True, "trafficPercent": entry["trafficPercent"]}
        self.world.kube.set_status("InferenceService", "chat", {"canaryStatuses": [status]})

    def of_another_run(self) -> None:
        self.spec["canary"] = [{"trafficPercent": 5, "predictor": {"name": "other", "model": {}}}]

    def other_ends(self) -> None:
        self.spec["canary"] = []


class SplitBot:
    """The chart's Deployment behind our gateway, and the Deployment controller's part."""

    stage = {"deployment": "steersman-policy"}
    old = None
    new = "/artifacts/runs/ml/demo/release/model"

    def __init__(self, world: World) -> None:
        self.world = world
        world.kube.put(deployment())

    def percent(self) -> int | None:
        split = self.world.kube.find("ConfigMap", "steersman-policy-split")
        return yaml.safe_load(split["data"]["split.yaml"])["candidate"]["percent"] if split else None

    def model(self) -> str | None:
        containers = self.world.kube.find("Deployment", "steersman-policy")["spec"]["template"]["spec"]["containers"]
        found = [item["value"] for item in containers[0]["env"] if item["name"] == "STEERSMAN_SET"]
        return found[0].removeprefix("model=") if found else None

    def ready(self) -> None:
        self.world.kube.roll_out()

    def of_another_run(self) -> None:
        shares = {"candidate": {"name": "other", "percent": 5, "endpoints": ["other:1"]}}
        self.world.kube.put(
            {
                "kind": "ConfigMap",
                "metadata": {"name": "steersman-policy-split", "namespace": "ml", "uid": "x", "resourceVersion": "1"},
                "data": {"split.yaml": yaml.safe_dump(shares)},
            }
        )

    def other_ends(self) -> None:
        del self.world.kube.objects["ConfigMap", "ml", "steersman-policy-split"]


@pytest.fixture(params=[KServeBot, SplitBot], ids=["kserve", "split"])
def bot(world, request):
    """What serves: the same tests for every implementation of `Endpoint`."""
    return request.param(world)


@pytest.fixture
async def release(world, bot):
    """A run whose models are made and whose release begins."""

    async def begin(canary: dict[str, Any] | None = CANARY) -> str:
        world.kube.put(alignment_run(stages=[{"release": {**bot.stage, **({"canary": canary} if canary else {})}}]))
        await world.settle()
        world.kube.finish_job("demo-release")
        await world.settle()
        return candidate_name(world.kube.find("AlignmentRun", "demo"))

    world.signals = FakeSignals()
    world.registry = FakeRegistry()
    world.restart()
    return begin


async def test_the_candidate_walks_through_all_steps_and_is_promoted(world, bot, release, condition):
    await release()
    for percent in (10, 50, 100):
        assert bot.percent() == percent
        assert bot.model() == bot.old
        bot.ready()
        status = await world.settle()
        assert status["release"]["percent"] == percent
        world.later(minutes=29)
        assert (await world.settle())["release"]["percent"] == percent, "a step is watched to its end"
        world.later(minutes=2)
        status = await world.settle()
    bot_settles(world, bot)
    status = await world.settle()
    assert bot.percent() is None
    assert bot.model() == bot.new
    assert status["phase"] == "Succeeded"
    assert status["release"]["decision"] == "Promoted"
    assert status["release"].get("previousModel") == bot.old
    assert condition(status, "Released")["status"] == "True"
    assert world.registry.aliases[0] == "candidate"
    assert world.registry.aliases[-1] == "champion"
    assert not world.kube.find("AlignmentRun", "demo")["metadata"].get("finalizers")
    assert {"CandidateRegistered", "CanaryStep", "Promoted"} <= set(world.events())


def bot_settles(world, bot) -> None:
    """The champion's own pods roll over to the new model, where they have to."""
    if isinstance(bot, SplitBot):
        world.kube.roll_out()


async def test_kserve_runs_the_candidate_as_the_champion_runs(world):
    bot = KServeBot(world)
    await begin_on(world, bot)
    name = candidate_name(world.kube.find("AlignmentRun", "demo"))
    assert bot.spec["canary"][0]["predictor"] == {
        "name": name,
        "minReplicas": 2,
        "model": {"modelFormat": {"name": "steersman"}, "storageUri": bot.new},
    }, "KServe refuses maxReplicas in a canary"
    assert bot.spec["predictor"]["minReplicas"] == 2


async def begin_on(world, bot) -> None:
    world.signals, world.registry = FakeSignals(), FakeRegistry()
    world.restart()
    world.kube.put(alignment_run(stages=[{"release": {**bot.stage, "canary": CANARY}}]))
    await world.settle()
    world.kube.finish_job("demo-release")
    await world.settle()


async def test_the_split_runs_a_copy_of_the_champion_that_goes_with_the_run(world):
    bot = SplitBot(world)
    await begin_on(world, bot)
    name = candidate_name(world.kube.find("AlignmentRun", "demo"))
    copy, champion = world.kube.find("Deployment", name), world.kube.find("Deployment", "steersman-policy")
    container = copy["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == champion["spec"]["template"]["spec"]["containers"][0]["image"]
    assert {"name": "STEERSMAN_SET", "value": f"model={bot.new}"} in container["env"]
    assert copy["spec"]["replicas"] == 2
    labels = copy["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/component"] == "policy", "the network policies hold for it"
    selector = champion["spec"]["selector"]["matchLabels"]
    assert not selector.items() <= labels.items(), "but the champion's Service does not find it"
    service = world.kube.find("Service", name)
    assert service["spec"]["selector"].items() <= labels.items()
    for kind, made in (("Deployment", name), ("Service", name), ("ConfigMap", "steersman-policy-split")):
        assert world.kube.find(kind, made)["metadata"]["ownerReferences"][0]["uid"] == "uid-1"
    shares = yaml.safe_load(world.kube.find("ConfigMap", "steersman-policy-split")["data"]["split.yaml"])
    assert shares["candidate"] == {"name": name, "percent": 10, "endpoints": [f"dns:///{name}.ml.svc:50051"]}
    assert Shares.model_validate(shares).champion.name == "steersman-policy", "the gateway reads it"


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (GOOD.model_copy(update={"errors": 250}), "5.0% of the requests failed, more than 2.0%"),
        (GOOD.model_copy(update={"slow": 3000}), "60.0% of the answers took longer than 1.5 times the champion's"),
        (GOOD.model_copy(update={"bad": 400}), "thumbs down in 20.0% of 2000 judged conversations, 10.0% of 2000"),
    ],
)
async def test_a_worse_candidate_is_rolled_back_and_the_reason_kept(world, bot, release, condition, bad, why):
    await release()
    bot.ready()
    await world.settle()
    world.signals.candidate = bad
    status = await world.settle()
    assert status["phase"] == "RolledBack"
    assert why in status["release"]["reason"]
    assert bot.percent() is None
    assert bot.model() == bot.old
    assert condition(status, "Released")["reason"] == "RolledBack"
    assert "champion" not in world.registry.aliases
    world.later(days=1)
    assert (await world.settle())["phase"] == "RolledBack"


async def test_missing_signals_hold_and_never_promote(world, bot, release):
    await release()
    bot.ready()
    await world.settle()
    world.signals.candidate = None
    world.later(days=3)
    status = await world.settle()
    assert status["release"]["percent"] == 10
    assert "not available" in status["message"]


async def test_a_step_is_not_left_before_enough_judgements(world, bot, release):
    await release()
    bot.ready()
    world.signals.candidate = GOOD.model_copy(update={"judged": 5, "bad": 1})
    await world.settle()
    world.later(hours=5)
    status = await world.settle()
    assert "waiting for 15 more judgements" in status["message"]
    world.signals.candidate = GOOD
    assert (await world.settle())["release"]["percent"] == 50


async def test_with_all_traffic_the_limit_alone_decides(world, bot, release):
    await release({**CANARY, "steps": [50, 100]})
    bot.ready()
    await world.settle()
    world.later(minutes=31)
    await world.settle()
    bot.ready()
    world.signals.candidate = GOOD.model_copy(update={"requests": 9000, "errors": 900})
    assert (await world.settle())["phase"] == "RolledBack"


async def test_a_candidate_that_never_gets_ready_is_taken_back(world, bot, release):
    await release()
    world.later(minutes=31)
    status = await world.settle()
    assert status["phase"] == "RolledBack"
    assert "not ready" in status["release"]["reason"]
    assert bot.percent() is None


async def test_approval_is_waited_for(world, bot, release):
    await release({**CANARY, "manualApproval": True})
    assert world.status()["phase"] == "AwaitingApproval"
    assert bot.percent() is None
    world.kube.find("AlignmentRun", "demo")["metadata"]["annotations"] = {"steersman.dev/approve": "true"}
    await world.settle()
    assert bot.percent() == 10


async def test_without_a_canary_the_model_is_published_at_once(world, bot, release):
    await release(None)
    bot_settles(world, bot)
    status = await world.settle()
    assert bot.model() == bot.new
    assert status["phase"] == "Succeeded"


async def test_a_canary_without_signals_configured_is_refused_clearly(world, bot, release):
    world.settings = type(world.settings)(world.settings.templates, can_watch=False)
    world.restart()
    await release()
    assert "controller.prometheusUrl" in world.status()["message"]
    assert bot.percent() is None


async def test_another_runs_canary_is_waited_for(world, bot, release):
    bot.of_another_run()
    await release()
    status = await world.settle()
    assert "another canary" in status["message"]
    assert bot.percent() == 5
    bot.other_ends()
    await world.settle()
    assert bot.percent() == 10


async def test_too_few_judgements_hold_before_the_last_comparison(world, bot, release):
    """A step of 50% is left for 100% only when the harm is excluded."""
    world.signals.candidate = Arm(judged=60, bad=6, requests=500)
    world.signals.champion = Arm(judged=600, bad=60, requests=5000)
    await release()
    bot.ready()
    await world.settle()
    world.later(minutes=31)
    await world.settle()
    assert bot.percent() == 50, "a small share may grow while nothing speaks against it"
    bot.ready()
    await world.settle()
    world.later(days=3)
    status = await world.settle()
    assert bot.percent() == 50
    assert "not enough people judged (660) to exclude 5.0% more thumbs down" in status["message"]
    world.signals.candidate = GOOD
    world.signals.champion = GOOD
    world.later(minutes=31)
    await world.settle()
    assert bot.percent() == 100


async def test_signals_count_from_the_moment_the_candidate_is_ready(world, bot, release):
    await release()
    world.later(minutes=7, seconds=13)
    bot.ready()
    status = await world.settle()
    since = status["release"]["countedSince"]
    assert since == "2026-01-01T00:07:13Z"
    world.later(minutes=31)
    await world.settle()
    bot.ready()
    assert (await world.settle())["release"]["countedSince"] == since, "the evidence of earlier steps stays"


async def test_a_broken_source_holds_the_release_and_nothing_else(world, bot, release):
    """Whatever the sources throw: cancelling still works."""
    await release()
    bot.ready()
    await world.settle()

    async def broken(*_: Any) -> Signals:
        raise KeyError("data")

    world.signals.read = broken
    world.later(days=1)
    status = await world.settle()
    assert "not available" in status["message"]
    assert bot.percent() == 10
    world.kube.find("AlignmentRun", "demo")["metadata"]["annotations"] = {"steersman.dev/cancel": "true"}
    assert (await world.settle())["phase"] == "Cancelled"
    assert bot.percent() is None


async def test_a_conflicting_edit_of_the_service_is_decided_anew(world):
    bot = KServeBot(world)
    await begin_on(world, bot)
    bot.ready()
    await world.settle()
    world.later(minutes=31)
    real = world.kube.apply
    conflicts = []

    async def edited(kind, *arguments, **options):
        if kind == "InferenceService" and not conflicts:
            conflicts.append(1)
            raise ApiException(status=409, reason="Conflict")
        return await real(kind, *arguments, **options)

    world.kube.apply = edited
    assert await world.reconciler.reconcile("ml", "demo") == 0.0
    assert world.status()["release"]["percent"] == 10, "nothing is claimed that was not written"
    status = await world.settle()
    assert status["release"]["percent"] == 50
    assert bot.percent() == 50


async def test_deleting_a_run_during_its_canary_gives_the_traffic_back(world, bot, release):
    await release()
    assert not world.kube.find("AlignmentRun", "demo")["metadata"].get("finalizers"), "nothing that could outlive us"
    await world.kube.delete("AlignmentRun", "ml", "demo")
    await world.look(times=2)
    assert bot.percent() is None
    assert world.kube.names("AlignmentRun") == []


async def test_cancelling_during_the_canary_gives_the_traffic_back(world, bot, release):
    await release()
    world.kube.find("AlignmentRun", "demo")["metadata"]["annotations"] = {"steersman.dev/cancel": "true"}
    status = await world.settle()
    assert status["phase"] == "Cancelled"
    assert bot.percent() is None
    assert not world.kube.find("AlignmentRun", "demo")["metadata"].get("finalizers")


async def test_a_restart_between_promotion_and_status_does_not_release_again(world, bot, release):
    await release({**CANARY, "steps": [50], "minFeedback": 0})
    bot.ready()
    await world.settle()
    world.later(minutes=31)
    real = world.kube.patch

    async def crash(kind, *arguments, **options):
        if kind == "AlignmentRun" and bot.model() == bot.new:
            raise RuntimeError("killed")
        return await real(kind, *arguments, **options)

    world.kube.patch = crash
    with pytest.raises(RuntimeError):
        await world.look()
    world.kube.patch = real
    for _ in range(3):
        world.restart()
        bot_settles(world, bot)
        await world.settle()
    assert world.status()["phase"] == "Succeeded"
    assert bot.model() == bot.new
    assert bot.percent() is None


async def test_the_canary_of_a_run_that_is_gone_is_taken_back(world):
    """The run went while no controller was there, with its namespace or by force: nothing holds it, nothing stays."""
    bot = KServeBot(world)
    await begin_on(world, bot)
    del world.kube.objects["AlignmentRun", "ml", "demo"]
    world.restart()
    assert await world.reconciler.reconcile("ml", "demo") is None
    assert bot.percent() is None
    assert bot.model() == bot.old


async def test_a_finalizer_of_an_earlier_version_is_let_go(world):
    run = alignment_run(stages=[{"sft": {}}])
    run["metadata"]["finalizers"] = ["steersman.dev/canary", "example.com/other"]
    world.kube.put(run)
    await world.settle()
    assert world.kube.find("AlignmentRun", "demo")["metadata"]["finalizers"] == ["example.com/other"]


async def test_helm_that_applies_its_own_fields_never_meets_ours(world):
    """Helm 4 applies server-side and does not force: what it renders again (the chart leaves the model alone) fits."""
    bot = KServeBot(world)
    helm = {"metadata": {}, "spec": {"predictor": {"minReplicas": 2, "model": {"storageUri": bot.old}}}}
    await world.kube.apply("InferenceService", "ml", "chat", helm, manager="helm", force=False)
    await begin_on(world, bot)
    for _ in range(3):
        bot.ready()
        await world.settle()
        world.later(minutes=31)
        await world.settle()
    assert bot.model() == bot.new
    with pytest.raises(ApiException, match=r"conflict with .*steersman-controller"):
        await world.kube.apply("InferenceService", "ml", "chat", helm, manager="helm", force=False)
    for model in ({"storageUri": bot.new}, {}):  # as the chart's look-up finds it
        upgrade = {"metadata": {}, "spec": {"predictor": {"minReplicas": 3, "model": model}}}
        await world.kube.apply("InferenceService", "ml", "chat", upgrade, manager="helm", force=False)
        assert bot.model() == bot.new
        assert bot.spec["predictor"]["minReplicas"] == 3


async def test_a_missing_inference_service_is_waited_for(world):
    world.kube.put(alignment_run(stages=[{"release": {"inferenceService": "chat"}}]))
    await world.settle()
    world.kube.finish_job("demo-release")
    status = await world.settle()
    assert status["message"] == "waiting for the InferenceService chat, which does not exist"
    world.kube.put(inference_service())
    assert (await world.settle())["phase"] == "Succeeded"


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
