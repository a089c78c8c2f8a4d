"""What goes wrong on a real cluster: why nothing moves, upgrades, leaving in order, names that are taken, hardware."""

from __future__ import annotations

import asyncio
import copy
import random
from typing import Any

import pytest
from fake_kube import TEMPLATES, alignment_run
from hypothesis import given, settings
from hypothesis import strategies as st
from world import World

from services.controller.model import Settings
from services.controller.reconcile import FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS, Backoff
from services.controller.trouble import Trouble, find_trouble
from services.controller.turns import Peer, next_turn

RL = [{"sft": {}}, {"rewardModel": {}}, {"rl": {"steps": 2}}, {"evaluate": {}}]


def pod(name: str, labels: dict[str, str], **status: Any) -> dict[str, Any]:
    limits = {"containers": [{"name": "main", "resources": {"limits": {"memory": "2Gi"}}}]}
    meta = {"name": name, "namespace": "ml", "labels": labels, "creationTimestamp": "2026-01-01T00:00:00Z"}
    return {"kind": "Pod", "metadata": meta, "spec": limits, "status": {"phase": "Pending", **status}}


def waiting(reason: str, message: str = "", last: dict[str, Any] | None = None) -> dict[str, Any]:
    state: dict[str, Any] = {"name": "main", "state": {"waiting": {"reason": reason, "message": message}}}
    if last:
        state |= {"lastState": {"terminated": last}, "restartCount": 3}
    return {"containerStatuses": [state]}


def warning(kind: str, name: str, reason: str, message: str) -> dict[str, Any]:
    return {
        "kind": "Event",
        "metadata": {"name": f"{name}.1", "namespace": "ml"},
        "type": "Warning",
        "involvedObject": {"kind": kind, "name": name},
        "reason": reason,
        "message": message,
        "lastTimestamp": "2026-01-01T00:00:00Z",
    }


async def at_rl(world: World, name: str = "demo", **spec: Any) -> None:
    """The run stands before its RL stage, whose services were asked for."""
    world.kube.put(alignment_run(name, stages=RL, **spec))
    for stage in ("sft", "reward-model"):
        await world.settle(name)
        world.kube.finish_job(f"{name}-{stage}")
    await world.settle(name)


def labels_of(world: World, name: str = "demo-policy") -> dict[str, str]:
    return world.kube.find("StatefulSet", name)["spec"]["template"]["metadata"]["labels"]


OOM = {"reason": "OOMKilled", "exitCode": 137}
TROUBLES = [
    (waiting("CrashLoopBackOff", "back-off 5m0s", OOM), "CrashLoopBackOff", "OOMKilled (memory limit 2Gi)"),
    (waiting("CrashLoopBackOff", "back-off", {"exitCode": 3, "message": "no CUDA"}), "CrashLoopBackOff", "no CUDA"),
    (waiting("ImagePullBackOff", 'Back-off pulling image "x"'), "ImagePullBackOff", 'pulling image "x"'),
    (waiting("CreateContainerConfigError", 'secret "tls" not found'), "CreateContainerConfigError", "not found"),
    (
        {
            "containerStatuses": [
                {"name": "main", "state": {"running": {}}, "ready": False, "lastState": {"terminated": OOM}}
            ]
        },
        "OOMKilled",
        "memory limit 2Gi",
    ),
    (
        {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 cpu"}]},
        "Unschedulable",
        "0/1 cpu",
    ),
    (
        {
            "conditions": [
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": "pod has unbound immediate PersistentVolumeClaims",
                }
            ]
        },
        "UnboundClaim",
        "unbound immediate",
    ),
]


@pytest.mark.parametrize(("status", "reason", "words"), TROUBLES, ids=[f"{case[1]}-{case[2][:9]}" for case in TROUBLES])
async def test_the_status_says_why_a_service_does_not_come_up(world, condition, status, reason, words):
    await at_rl(world)
    world.kube.put(pod("demo-policy-0", labels_of(world), **status))
    seen = await world.settle()
    assert seen["message"].startswith(f"rl: policy: {reason}")
    assert words in seen["message"]
    progressing = condition(seen, "Progressing")
    assert (progressing["status"], progressing["reason"]) == ("False", reason)
    assert reason in world.events()


@pytest.mark.parametrize(
    ("kind", "name", "reason", "message", "said"),
    [
        ("StatefulSet", "demo-policy", "FailedCreate", "pods is forbidden: exceeded quota: gpus", "QuotaExceeded"),
        ("StatefulSet", "demo-policy", "FailedCreate", "violates PodSecurity restricted", "FailedCreate"),
        ("Job", "demo-sft", "FailedCreate", "exceeded quota: gpus", "QuotaExceeded"),
    ],
)
async def test_pods_that_are_refused_are_explained_by_the_events_of_their_makers(
    world, kind, name, reason, message, said
):
    if kind == "Job":
        world.kube.put(alignment_run(stages=RL))
        await world.settle()
    else:
        await at_rl(world)
    world.kube.put(warning(kind, name, reason, message))
    world.kube.put(warning(kind, "another-run", reason, "of somebody else"))
    assert f"{said}: {message}" in (await world.settle())["message"]


async def test_a_mount_that_fails_is_explained_by_the_pods_events(world):
    await at_rl(world)
    world.kube.put(pod("demo-policy-0", labels_of(world), **waiting("ContainerCreating")))
    assert "load their models" in (await world.settle())["message"]
    world.kube.put(warning("Pod", "demo-policy-0", "FailedMount", 'secret "tls" not found'))
    assert 'FailedMount: secret "tls" not found' in (await world.settle())["message"]


async def test_what_does_not_mend_itself_ends_the_stage_after_a_while(world):
    await at_rl(world)
    world.kube.put(pod("demo-policy-0", labels_of(world), **waiting("ImagePullBackOff", "no such image")))
    await world.settle()
    world.later(minutes=29)
    assert (await world.settle())["phase"] == "Running"
    world.later(minutes=2)
    status = await world.settle()
    assert status["phase"] == "Failed"
    assert "ImagePullBackOff: no such image; this does not mend itself" in status["message"]
    assert {item["spec"]["replicas"] for item in sets(world)} == {0}


async def test_waiting_for_room_is_not_ended(world):
    await at_rl(world)
    world.kube.put(pod("demo-policy-0", labels_of(world), **TROUBLES[5][0]))
    for _ in range(3):
        await world.settle()
        world.later(hours=5)
    assert (await world.settle())["phase"] == "Running"


async def test_what_mended_in_time_starts_the_clock_anew(world):
    await at_rl(world)
    broken = pod("demo-policy-0", labels_of(world), **waiting("ErrImagePull", "registry is down"))
    for _ in range(3):
        world.kube.put(copy.deepcopy(broken))
        await world.settle()
        world.later(minutes=20)
        world.kube.put(pod("demo-policy-0", labels_of(world), **waiting("ContainerCreating")))
        await world.settle()
    assert world.status()["phase"] == "Running"
    assert "blockedSince" not in world.status()


async def test_why_a_pod_was_killed_is_said(world):
    world.kube.put(alignment_run())
    await world.settle()
    world.kube.fail_pod("demo-sft", 137, "", final=False)
    world.kube.find("Pod", "demo-sft-x1")["status"]["containerStatuses"][0]["state"]["terminated"] |= OOM
    assert (await world.settle())["stages"][0]["reason"] == "OutOfMemory"
    world.kube.fail_pod("demo-sft", 137, "", final=False, number=2)
    world.kube.find("Pod", "demo-sft-x2")["status"] |= {"reason": "Evicted", "message": "low on memory"}
    assert (await world.settle())["stages"][0]["reason"] == "Evicted"


def sets(world: World) -> list[dict[str, Any]]:
    return [body for (kind, _, _), body in world.kube.objects.items() if kind == "StatefulSet"]


async def test_an_upgrade_of_the_chart_restarts_nothing_that_a_stage_works_with(world):
    await at_rl(world)
    world.kube.services_up()
    await world.settle()
    before = copy.deepcopy(sets(world))
    newer = copy.deepcopy(TEMPLATES)
    for template in newer.values():
        template["spec"]["containers"][0]["image"] = "registry.example/steersman:2"
    world.settings = Settings(newer, can_watch=True)
    world.restart()
    await world.settle()
    assert sets(world) == before
    world.kube.finish_job("demo-rl")
    await world.settle()
    images = {item["spec"]["template"]["spec"]["containers"][0]["image"] for item in sets(world)}
    assert images == {"registry.example/steersman:2"}, "the next stage begins with the new shape"


@pytest.mark.parametrize("how", ["suspend", "cancel"])
async def test_the_trainer_leaves_before_its_services(world, how):
    await at_rl(world)
    world.kube.services_up()
    await world.settle()
    job = world.kube.find("Job", "demo-rl")
    job["metadata"]["finalizers"] = ["foregroundDeletion"]  # its pods are still there
    if how == "suspend":
        world.kube.edit("demo", suspend=True)
    else:
        world.kube.edit("demo", annotations={"steersman.dev/cancel": "true"})
    await world.settle()
    assert world.kube.find("Job", "demo-rl")["metadata"]["deletionTimestamp"]
    assert {item["spec"]["replicas"] for item in sets(world)} == {1}, "it may need them to end its step"
    del world.kube.objects["Job", "ml", "demo-rl"]
    await world.settle()
    assert {item["spec"]["replicas"] for item in sets(world)} == {0}


async def test_time_in_suspension_does_not_count_for_the_deadline(world):
    world.kube.put(alignment_run(activeDeadlineSeconds=100))
    await world.settle()
    world.later(seconds=50)
    world.kube.edit("demo", suspend=True)
    await world.settle()
    world.later(hours=5)
    assert (await world.settle())["phase"] == "Suspended"
    world.kube.edit("demo", suspend=False)
    await world.settle()
    world.later(seconds=49)
    assert (await world.settle())["phase"] == "Running"
    world.later(seconds=2)
    assert (await world.settle())["phase"] == "Failed"


async def test_the_step_of_the_stage_before_is_not_the_next_ones(world):
    world.kube.put(alignment_run(stages=RL))
    await world.settle()
    world.kube.run_pod("demo-sft", '{"event": "progress", "step": 9, "total": 9}')
    assert (await world.settle())["step"] == 9
    world.kube.finish_job("demo-sft")
    await world.settle()
    world.kube.finish_job("demo-reward-model")
    status = await world.settle()
    assert status["stage"] == "rl"
    assert "step" not in status


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("Service", "demo-policy"),
        ("StatefulSet", "demo-policy"),
        ("ConfigMap", "demo-manifest"),
        ("Job", "demo-sft"),
    ],
)
async def test_an_object_of_somebody_else_is_refused_by_name(world, condition, kind, name):
    foreign = {
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": "ml",
            "uid": "foreign",
            "resourceVersion": "7",
            "annotations": {"meta.helm.sh/release-name": "shop"},
        },
        "spec": {},
        "data": {"manifest.yaml": "of another time"},
    }
    world.kube.put(copy.deepcopy(foreign))
    world.kube.put(alignment_run(stages=RL))
    for stage in ("sft", "reward-model"):
        await world.settle()
        if world.kube.find("Job", f"demo-{stage}") and kind != "Job":
            world.kube.finish_job(f"demo-{stage}")
    status = await world.settle()
    assert world.kube.find(kind, name) == foreign, "untouched"
    assert f"{kind} {name} exists already and belongs to the Helm release shop" in status["message"]
    assert condition(status, "Progressing")["reason"] == "Blocked"


def test_the_back_off_grows_and_begins_anew():
    backoff = Backoff()
    pauses = [backoff.failed(("ml", "demo")) for _ in range(10)]
    assert pauses[:3] == [FIRST_RETRY_SECONDS, 2 * FIRST_RETRY_SECONDS, 4 * FIRST_RETRY_SECONDS]
    assert pauses[-1] == LONGEST_RETRY_SECONDS
    assert backoff.failed(("ml", "other")) == FIRST_RETRY_SECONDS
    backoff.succeeded(("ml", "demo"))
    assert backoff.failed(("ml", "demo")) == FIRST_RETRY_SECONDS


async def test_the_folder_goes_by_policy_before_the_run(world):
    world.kube.put(alignment_run(stages=[{"sft": {}}], ttlSecondsAfterFinished=100, ttlKeeps="released"))
    await world.settle()
    world.kube.finish_job("demo-sft")
    await world.settle()
    world.later(seconds=101)
    await world.settle()
    job = world.kube.find("Job", "demo-tidy")
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "steersman.local.tidy"]
    assert container["args"] == ["--keep-released", "/artifacts/runs/ml/demo"]
    assert world.kube.names("AlignmentRun") == ["demo"]
    world.kube.finish_job("demo-tidy")
    await world.look()
    assert world.kube.names("AlignmentRun") == []


async def test_a_queue_admits_services_and_trainer_together_or_not_at_all(world):
    await at_rl(world, trainer={"queue": "gpus", "resources": {"gpus": 2}})
    status = await world.settle()
    assert status["message"] == "rl: waiting in the queue gpus"
    assert sets(world) == []
    workload = world.kube.find("Workload", "demo-workload")
    counts = {item["name"]: item["count"] for item in workload["spec"]["podSets"]}
    assert counts == {"trainer": 1, "policy": 1, "reward": 1, "reference": 1}
    assert workload["spec"]["queueName"] == "gpus"
    trainer = workload["spec"]["podSets"][0]["template"]["spec"]["containers"][0]
    assert trainer["resources"]["limits"]["nvidia.com/gpu"] == 2

    admitted = {"type": "Admitted", "status": "True"}
    world.kube.set_status("Workload", "demo-workload", {"conditions": [admitted]})
    await world.settle()
    world.kube.services_up()
    await world.settle()
    assert "kueue.x-k8s.io/queue-name" not in world.kube.find("Job", "demo-rl")["metadata"]["labels"]

    evicted = {"type": "Evicted", "status": "True", "reason": "Preempted"}
    world.kube.set_status("Workload", "demo-workload", {"conditions": [admitted, evicted]})
    await world.settle()
    assert world.kube.find("Job", "demo-rl") is None
    assert {item["spec"]["replicas"] for item in sets(world)} == {0}
    again = world.kube.find("Workload", "demo-workload")
    assert again["metadata"]["uid"] != workload["metadata"]["uid"], "back in the queue"


def test_who_took_first_keeps_the_turn():
    early, late = ("2026-01-01T00:00:00Z", "a"), ("2026-01-01T00:00:00Z", "b")
    assert next_turn(None, late, [], starved=False) == "Acquiring"
    assert next_turn(None, early, [Peer("b", late, "Acquiring")], starved=False) == "Waiting"
    assert next_turn("Acquiring", late, [Peer("a", early, "Acquiring")], starved=True) == "Waiting"
    assert next_turn("Acquiring", early, [Peer("b", late, "Acquiring")], starved=True) == "Acquiring"
    assert next_turn("Holding", late, [Peer("a", early, "Acquiring")], starved=False) == "Holding"
    assert next_turn("Holding", late, [Peer("a", early, "Acquiring")], starved=True) == "Waiting"
    assert next_turn("Waiting", late, [Peer("a", early, "Waiting")], starved=False) == "Waiting"


class Machines:
    """A scheduler over a number of GPUs: pods take what is free in any order, and keep it until they end."""

    def __init__(self, world: World, gpus: int, draw: random.Random) -> None:
        self.world, self.gpus, self.draw = world, gpus, draw
        self.running: set[str] = set()

    def wanted(self) -> dict[str, dict[str, str]]:
        """Pods that their makers want: name -> labels."""
        pods: dict[str, dict[str, str]] = {}
        for (kind, _, name), body in self.world.kube.objects.items():
            done = (body.get("status") or {}).get("conditions")
            if kind == "StatefulSet" or (kind == "Job" and not done):
                count = body["spec"].get("replicas", body["spec"].get("parallelism", 1))
                for index in range(count):
                    pods[f"{name}-{index}"] = body["spec"]["template"]["metadata"]["labels"]
        return pods

    def schedule(self) -> None:
        wanted = self.wanted()
        self.running &= set(wanted)
        for name in self.draw.sample(sorted(set(wanted) - self.running), len(set(wanted) - self.running)):
            if len(self.running) < self.gpus:
                self.running.add(name)
        for key in [key for key in self.world.kube.objects if key[0] == "Pod"]:
            del self.world.kube.objects[key]
        for name, labels in wanted.items():
            status = {"phase": "Running"} if name in self.running else TROUBLES[5][0]
            self.world.kube.put(pod(name, labels, **status))
        for (kind, _, name), body in list(self.world.kube.objects.items()):
            if kind == "StatefulSet":
                count = body["spec"]["replicas"]
                ready = sum(f"{name}-{index}" in self.running for index in range(count))
                generation = body["metadata"]["generation"]
                body["status"] = {"observedGeneration": generation, "updatedReplicas": count, "readyReplicas": ready}
        for (kind, _, name), body in list(self.world.kube.objects.items()):
            if kind == "Job" and not (body.get("status") or {}).get("conditions"):
                count = body["spec"].get("parallelism", 1)
                if all(f"{name}-{index}" in self.running for index in range(count)) and self.draw.random() < 0.5:
                    self.world.kube.finish_job(name)


async def race(seed: int, gpus: int, runs: int) -> set[str]:
    """Runs that need 4 or 5 GPUs at a time on few of them; phases in the end."""
    draw = random.Random(seed)
    world = World()
    machines = Machines(world, gpus, draw)
    names = [f"run{index}" for index in range(runs)]
    for index, name in enumerate(names):
        workers = draw.choice([1, 2])
        world.kube.put(alignment_run(name, uid=name, stages=RL, trainer={"workers": workers if index else 1}))
    for _ in range(300):
        for name in draw.sample(names, len(names)):
            await world.look(name, times=draw.choice([1, 2]))
        if draw.random() < 0.2:
            world.restart()
        machines.schedule()
        world.later(seconds=15)
        if all(world.status(name).get("phase") == "Succeeded" for name in names):
            break
    return {world.status(name).get("phase", "") for name in names}


@given(seed=st.integers(0, 10_000), gpus=st.integers(5, 9), runs=st.integers(2, 3))
@settings(max_examples=12, deadline=None)
def test_runs_that_share_hardware_never_wait_in_a_circle(seed, gpus, runs):
    """Any order of looks and of scheduling, restarts in between: every run ends, where each fits for itself."""
    assert asyncio.run(race(seed, gpus, runs)) == {"Succeeded"}


def test_without_turns_they_do(monkeypatch):
    """What the property would find: each of two runs has a part of the hardware and waits for the other's."""
    monkeypatch.setattr("services.controller.plan.next_turn", lambda *_, **__: "Holding")
    assert any(asyncio.run(race(seed, 5, 2)) != {"Succeeded"} for seed in range(6))


def test_a_pod_that_runs_and_ended_ones_are_no_trouble():
    fine = pod("a", {}, phase="Running", containerStatuses=[{"ready": True, "lastState": {"terminated": OOM}}])
    over = pod("b", {}, phase="Failed", **TROUBLES[0][0])
    assert find_trouble([fine, over], [warning("Job", "x", "FailedCreate", "old")], [("Job", "x")]) is None
    assert find_trouble([], [], []) is None
    assert not Trouble("QuotaExceeded").hopeless
