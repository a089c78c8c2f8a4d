"""The life of a run: create, progress, failure, retry, suspend, resume, delete, restart, two at once, conflicts."""

from __future__ import annotations

import asyncio
import copy
import json

import pytest
import yaml
from fake_kube import alignment_run
from hypothesis import given, settings
from hypothesis import strategies as st
from kubernetes.aio.client.exceptions import ApiException
from world import World

from services.controller.objects import final_exit_codes, object_name
from steersman.config.base import load_model
from steersman.config.manifest import AlignmentRun


async def walk_to(world, stage: str, name: str = "demo") -> None:
    """Finishes the Jobs of all stages before `stage`."""
    for _ in range(12):
        await world.settle(name)
        world.kube.services_up()
        status = await world.settle(name)
        if status["stage"] == stage and world.kube.find("Job", f"{name}-{stage}"):
            return
        world.kube.finish_job(f"{name}-{status['stage']}")
    raise AssertionError(f"{stage} was not reached: {status}")


def replicas(world) -> dict[str, int]:
    """Wanted replicas by StatefulSet."""
    return {name: world.kube.find("StatefulSet", name)["spec"]["replicas"] for name in world.kube.names("StatefulSet")}


async def test_the_first_stage_becomes_a_job_that_the_run_owns(world):
    world.kube.put(alignment_run())
    status = await world.settle()
    assert world.kube.names("Job") == ["demo-sft"]
    job = world.kube.find("Job", "demo-sft")
    assert job["metadata"]["ownerReferences"][0]["uid"] == "uid-1"
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "training.stage"]
    assert container["args"] == ["--run-dir", "/artifacts/runs/ml/demo", "--stage", "sft"]
    assert status["phase"] == "Running"
    assert [stage["phase"] for stage in status["stages"]] == ["Running", "Pending", "Pending", "Pending"]
    assert status["observedGeneration"] == 1
    assert "Started" in world.events()


async def test_the_mounted_manifest_is_complete_for_the_cluster(world):
    world.kube.put(alignment_run(services={"policy": {"replicas": 2}, "reward": {"endpoints": ["reward.other:50052"]}}))
    await world.settle()
    text = world.kube.find("ConfigMap", "demo-manifest")["data"]["manifest.yaml"]
    manifest = load_model(AlignmentRun, yaml.safe_load(text), "manifest.yaml")
    policy = manifest.spec.services.policy
    assert policy.endpoints == [f"demo-policy-{index}.demo-policy.ml.svc:50051" for index in (0, 1)]
    assert policy.weights_endpoints == [f"demo-policy-{index}.demo-policy.ml.svc:50054" for index in (0, 1)]
    assert manifest.spec.services.reward.endpoints == ["reward.other:50052"]
    assert manifest.spec.services.reference.endpoints == ["dns:///demo-reference.ml.svc:50053"]
    assert manifest.spec.data.prompts.train == "/artifacts/data/prompts.jsonl"
    assert manifest.spec.data.prompts.heldout == "s3://bucket/heldout.jsonl"


async def test_services_come_up_for_rl_with_the_models_of_the_run_and_go_down_after_it(world):
    world.kube.put(alignment_run())
    await walk_to(world, "reward-model")
    world.kube.finish_job("demo-reward-model")
    await world.settle()
    assert world.kube.names("StatefulSet") == ["demo-policy", "demo-reference", "demo-reward"]
    assert world.kube.find("Job", "demo-rl") is None, "the Job waits until the services are ready"
    policy = world.kube.find("StatefulSet", "demo-policy")
    arguments = policy["spec"]["template"]["spec"]["containers"][0]["args"]
    assert 'model="/artifacts/runs/ml/demo/sft/model"' in arguments
    arguments = world.kube.find("StatefulSet", "demo-reward")["spec"]["template"]["spec"]["containers"][0]["args"]
    scorers = next(argument for argument in arguments if argument.startswith("scorers="))
    assert json.loads(scorers.partition("=")[2])[0]["path"] == "/artifacts/runs/ml/demo/reward-model/model"

    world.kube.services_up()
    await world.settle()
    world.kube.finish_job("demo-rl")
    await world.settle()
    assert replicas(world) == {"demo-policy": 1, "demo-reference": 1, "demo-reward": 1}

    world.kube.services_up()
    await world.settle()
    world.kube.finish_job("demo-evaluate")
    status = await world.settle()
    assert status["phase"] == "Succeeded"
    assert set(replicas(world).values()) == {0}


async def test_weights_go_through_a_folder_of_the_run_where_it_asks_for_that(world):
    run = alignment_run()
    run["spec"].setdefault("services", {})["policy"] = {"weightsFolder": "weights"}
    world.kube.put(run)
    await walk_to(world, "rl")
    policy = world.kube.find("StatefulSet", "demo-policy")
    arguments = policy["spec"]["template"]["spec"]["containers"][0]["args"]
    assert 'artifactUrls=["file:///artifacts/runs/ml/demo/weights/"]' in arguments
    manifest = yaml.safe_load(world.kube.find("ConfigMap", "demo-manifest")["data"]["manifest.yaml"])
    assert manifest["spec"]["services"]["policy"]["weightsFolder"] == "weights"


async def test_given_endpoints_are_used_and_nothing_is_started(world):
    given = {name: {"endpoints": [f"{name}.shared:1"]} for name in ("policy", "reward", "reference")}
    world.kube.put(alignment_run(services=given))
    await walk_to(world, "rl")
    assert world.kube.names("StatefulSet") == []


async def test_a_null_that_kubectl_apply_leaves_out_still_counts(world):
    """`lora: null` asks for full weights; kubectl keeps it only in its annotation."""
    written = alignment_run(stages=[{"sft": {"lora": None, "epochs": 2}}, {"rewardModel": {"lora": {"rank": 8}}}])
    run = alignment_run(stages=[{"sft": {"epochs": 2}}, {"rewardModel": {"lora": {"rank": 8}}}])
    run["metadata"]["annotations"] = {"kubectl.kubernetes.io/last-applied-configuration": json.dumps(written)}
    world.kube.put(run)
    await world.settle()
    manifest = yaml.safe_load(world.kube.find("ConfigMap", "demo-manifest")["data"]["manifest.yaml"])
    assert manifest["spec"]["stages"] == written["spec"]["stages"]


@pytest.mark.parametrize("annotation", ["", "{", "[]", "{}", '{"spec": null}', '{"spec": {"stages": [{"sft": null}]}}'])
async def test_an_annotation_that_is_not_the_manifest_changes_nothing(world, annotation):
    run = alignment_run(stages=[{"sft": {}}, {"rewardModel": {}}])
    run["metadata"]["annotations"] = {"kubectl.kubernetes.io/last-applied-configuration": annotation}
    world.kube.put(run)
    await world.settle()
    manifest = yaml.safe_load(world.kube.find("ConfigMap", "demo-manifest")["data"]["manifest.yaml"])
    assert manifest["spec"]["stages"] == run["spec"]["stages"]


async def test_progress_is_read_from_the_log(world):
    world.kube.put(alignment_run())
    await world.settle()
    lines = [
        '{"event": "progress", "stage": "sft", "step": 3, "total": 9, "reward": 0.5, "kl": 0.1, "tokens_per_s": 300}',
        '{"event": "progress", "stage": "sft", "step": 4, "total": 9, "reward": null}',
        '{"event": "note", "text": "saving"}',
        '{"torn',
    ]
    world.kube.run_pod("demo-sft", "\n".join(lines))
    status = await world.settle()
    assert (status["step"], status["totalSteps"]) == (4, 9)
    assert (status["reward"], status["kl"], status["tokensPerSecond"]) == (0.5, 0.1, 300)
    assert status["message"] == "sft: step 4 of 9"


async def test_a_pod_that_fails_is_counted_and_its_reason_shown_while_the_job_retries(world):
    world.kube.put(alignment_run())
    await world.settle()
    world.kube.fail_pod("demo-sft", 9, "policy: not reachable", final=False)
    status = await world.settle()
    assert status["phase"] == "Running"
    assert status["stages"][0]["attempts"] == 1
    assert status["stages"][0]["reason"] == "Unavailable"
    assert "StageRetried" in world.events()
    world.kube.finish_job("demo-sft")
    status = await world.settle()
    assert status["stages"][0]["phase"] == "Succeeded"
    assert "log" not in status["stages"][0]


async def test_a_failed_stage_leaves_reason_and_last_lines(world, condition):
    world.kube.put(alignment_run())
    await world.settle()
    log = "loading\ntokenizing\nsft: demos.jsonl:17: the row has no assistant message; add one"
    world.kube.fail_pod("demo-sft", 2, log, final=True)
    status = await world.settle()
    assert status["phase"] == "Failed"
    stage = status["stages"][0]
    assert (stage["phase"], stage["exitCode"], stage["reason"]) == ("Failed", 2, "InvalidArgument")
    assert stage["log"] == log
    assert "demos.jsonl:17" in status["message"]
    assert condition(status, "Complete")["status"] == "False"
    assert world.kube.find("Job", "demo-sft") is not None, "the failed Job stays for people to look at"


async def test_a_gate_that_fails_ends_the_run_before_the_release(world):
    stages = [{"sft": {}}, {"evaluate": {"gates": {"reward": 0.1}}}, {"release": {"inferenceService": "chat"}}]
    world.kube.put(alignment_run(stages=stages))
    await walk_to(world, "evaluate")
    world.kube.fail_pod("demo-evaluate", 3, "evaluate: gate reward: 0.02 is below 0.1", final=True)
    status = await world.settle()
    assert status["phase"] == "Failed"
    assert status["stages"][1]["reason"] == "FailedPrecondition"
    assert world.kube.find("Job", "demo-release") is None


async def test_exit_codes_that_a_retry_cannot_mend_end_the_job_at_once(world):
    world.kube.put(alignment_run())
    await world.settle()
    rules = world.kube.find("Job", "demo-sft")["spec"]["podFailurePolicy"]["rules"]
    exits = next(rule["onExitCodes"] for rule in rules if rule["action"] == "FailJob")
    codes = exits["values"]
    assert codes == final_exit_codes()
    assert "containerName" not in exits, "the init container that checks the data counts as well"
    assert {2, 3, 11} <= set(codes)
    assert not {1, 9, 10, 137, 143} & set(codes)
    assert rules[0]["action"] == "Ignore", "a drained node costs no retry"


async def test_the_retry_annotation_runs_the_failed_stage_again_once(world):
    world.kube.put(alignment_run())
    await world.settle()
    world.kube.fail_pod("demo-sft", 11, "disk full", final=True)
    assert (await world.settle())["phase"] == "Failed"
    first = world.kube.find("Job", "demo-sft")["metadata"]["uid"]
    run = world.kube.find("AlignmentRun", "demo")
    run["metadata"]["annotations"] = {"steersman.dev/retry": "1"}
    status = await world.settle()
    assert status["phase"] == "Running"
    assert "completionTime" not in status
    assert world.kube.find("Job", "demo-sft")["metadata"]["uid"] != first
    world.kube.fail_pod("demo-sft", 11, "disk full", final=True)
    assert (await world.settle())["phase"] == "Failed", "the same value is obeyed once"


async def test_suspend_frees_the_hardware_and_resume_goes_on_at_the_same_stage(world):
    world.kube.put(alignment_run())
    await walk_to(world, "rl")
    await world.kube.patch("AlignmentRun", "ml", "demo", {"spec": {"suspend": True}})
    status = await world.settle()
    assert status["phase"] == "Suspended"
    assert world.kube.find("Job", "demo-rl") is None
    assert set(replicas(world).values()) == {0}
    await world.kube.patch("AlignmentRun", "ml", "demo", {"spec": {"suspend": False}})
    await world.settle()
    world.kube.services_up()
    status = await world.settle()
    assert (status["phase"], status["stage"]) == ("Running", "rl")
    assert world.kube.find("Job", "demo-rl") is not None
    assert {"Suspended", "Resumed"} <= set(world.events())


async def test_cancel_ends_the_running_job_and_keeps_the_run(world):
    world.kube.put(alignment_run())
    await world.settle()
    run = world.kube.find("AlignmentRun", "demo")
    run["metadata"]["annotations"] = {"steersman.dev/cancel": "true"}
    assert (await world.settle())["phase"] == "Cancelled"
    assert world.kube.names("Job") == []


async def test_deleting_a_run_removes_everything_and_needs_no_finalizer(world):
    world.kube.put(alignment_run())
    await world.settle()
    assert not world.kube.find("AlignmentRun", "demo")["metadata"].get("finalizers")
    await world.kube.delete("AlignmentRun", "ml", "demo")
    await world.look()
    assert world.kube.names("Job") == []
    assert world.kube.names("AlignmentRun") == []


async def test_a_run_of_the_same_name_waits_for_the_jobs_of_the_deleted_one(world):
    world.kube.put(alignment_run())
    await world.settle()
    world.kube.put(alignment_run(uid="uid-2"))
    status = await world.settle()
    assert "waiting until the earlier Job" in status["message"]
    await world.kube.delete("Job", "ml", "demo-sft")
    await world.settle()
    assert world.kube.find("Job", "demo-sft")["metadata"]["ownerReferences"][0]["uid"] == "uid-2"


async def test_two_runs_at_once_do_not_touch_each_other(world):
    world.kube.put(alignment_run("first", uid="a"))
    world.kube.put(alignment_run("second", uid="b"))
    await walk_to(world, "rl", "first")
    await walk_to(world, "reward-model", "second")
    world.kube.fail_pod("second-reward-model", 2, "broken", final=True)
    assert (await world.settle("second"))["phase"] == "Failed"
    assert (await world.settle("first"))["phase"] == "Running"
    for name in ("first", "second"):
        for kind in ("Job", "StatefulSet", "Service"):
            owned = [body for (k, _, n), body in world.kube.objects.items() if k == kind and n.startswith(name)]
            assert all(body["metadata"]["ownerReferences"][0]["name"] == name for body in owned)


async def test_a_restart_at_every_point_ends_in_the_same_state(world):
    world.kube.put(alignment_run())
    for stage in ("sft", "reward-model", "rl", "evaluate"):
        for _ in range(6):
            world.restart()
            await world.look()
            world.kube.services_up()
        world.kube.finish_job(f"demo-{stage}")
    assert (await world.settle())["phase"] == "Succeeded"
    created = [name for verb, kind, name in world.kube.writes if (verb, kind) == ("create", "Job")]
    assert created == ["demo-sft", "demo-reward-model", "demo-rl", "demo-evaluate"]


async def test_a_crash_between_acting_and_writing_the_status_repeats_nothing(world):
    world.kube.put(alignment_run())
    real = world.kube.patch

    async def crash(kind, *arguments, **options):
        if kind == "AlignmentRun":
            raise RuntimeError("killed")
        return await real(kind, *arguments, **options)

    world.kube.patch = crash
    with pytest.raises(RuntimeError):
        await world.look()
    assert world.kube.names("Job") == ["demo-sft"]
    world.kube.patch = real
    world.restart()
    await world.settle()
    created = [name for verb, kind, name in world.kube.writes if (verb, kind) == ("create", "Job")]
    assert created == ["demo-sft"]


async def test_a_stale_resource_version_is_never_written_over(world):
    world.kube.put(alignment_run())
    real = world.kube.list

    async def somebody_edits(kind, *arguments, **options):
        if kind == "Job":
            world.kube.find("AlignmentRun", "demo")["metadata"]["resourceVersion"] = "edited"
        return await real(kind, *arguments, **options)

    world.kube.list = somebody_edits
    assert await world.reconciler.reconcile("ml", "demo") == 0.0, "asks for another look at once"
    assert world.status() == {}
    world.kube.list = real
    assert (await world.settle())["phase"] == "Running"


async def test_a_refused_change_is_explained_in_the_status(world, condition):
    world.kube.put(alignment_run())

    async def refuse(*_arguments, **_options):
        error = ApiException(status=403, reason="Forbidden")
        error.body = '{"kind": "Status", "message": "exceeded quota: gpus"}'
        raise error

    world.kube.create = refuse
    status = await world.look()
    progressing = condition(status, "Progressing")
    assert (progressing["status"], progressing["reason"]) == ("False", "Blocked")
    assert progressing["message"] == "the API server refuses a change (403 exceeded quota: gpus)"


async def test_a_wrong_manifest_is_explained_field_by_field(world, condition):
    run = alignment_run()
    run["spec"]["stages"][2] = {"rl": {"steps": 2, "algorithm": "grpo", "samplesPerPrompt": 1}}
    world.kube.put(run)
    status = await world.settle()
    assert status["phase"] == "Failed"
    assert "samplesPerPrompt must be at least 2" in condition(status, "Valid")["message"]
    assert world.kube.names("Job") == []


async def test_the_deadline_ends_the_run(world):
    world.kube.put(alignment_run(activeDeadlineSeconds=60))
    await world.settle()
    world.later(seconds=59)
    assert (await world.settle())["phase"] == "Running"
    world.later(seconds=2)
    status = await world.settle()
    assert (status["phase"], status["message"]) == ("Failed", "the run took longer than 60 seconds")
    assert world.kube.names("Job") == []


async def test_a_finished_run_is_deleted_after_its_time_to_live(world):
    world.kube.put(alignment_run(stages=[{"sft": {}}], ttlSecondsAfterFinished=100))
    await world.settle()
    world.kube.finish_job("demo-sft")
    assert (await world.settle())["phase"] == "Succeeded"
    assert await world.reconciler.reconcile("ml", "demo") == 100
    world.later(seconds=101)
    await world.look()
    assert world.kube.names("AlignmentRun") == []


async def test_several_workers_become_an_indexed_job_with_a_rendezvous(world):
    trainer = {
        "workers": 4,
        "queue": "gpus",
        "backoffLimit": 7,
        "resources": {"gpus": 8, "memory": "512Gi", "cpu": "16"},
    }
    world.kube.put(alignment_run(trainer=trainer))
    await world.settle()
    job = world.kube.find("Job", "demo-sft")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert spec["backoffLimit"] == 7 * 4, "a rank that is lost ends all four pods"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert pod["subdomain"] == "demo-sft"
    command = pod["containers"][0]["command"]
    assert command[:3] == ["python", "-m", "training.ranks"]
    assert {"--nnodes=4", "--nproc-per-node=8", "--rdzv-endpoint=demo-sft-0.demo-sft:29500"} <= set(command)
    assert pod["containers"][0]["resources"]["limits"] == {"memory": "512Gi", "nvidia.com/gpu": 8}
    service = world.kube.find("Service", "demo-sft")
    assert service["spec"]["clusterIP"] == "None"
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


async def test_of_several_ranks_the_one_with_the_cause_is_shown(world):
    """The others end with it; torchrun's own words stand behind the stage's in the log."""
    world.kube.put(alignment_run(trainer={"workers": 2}))
    await world.settle()
    world.kube.fail_pod(
        "demo-sft", 2, "sft: demos.jsonl:17: the row is empty\nE torch elastic exitcode: 2", final=False
    )
    world.kube.fail_pod("demo-sft", 1, "connection closed by peer", final=True, number=2)
    status = await world.settle()
    assert status["message"] == "sft: demos.jsonl:17: the row is empty"
    assert (status["stages"][0]["exitCode"], status["stages"][0]["reason"]) == (2, "InvalidArgument")


async def test_waiting_in_a_queue_is_said(world):
    world.kube.put(alignment_run(trainer={"queue": "gpus"}))
    await world.settle()
    world.kube.find("Job", "demo-sft")["spec"]["suspend"] = True
    assert (await world.settle())["message"] == "sft: waiting in the queue gpus"


async def test_waiting_for_hardware_is_said(world):
    world.kube.put(alignment_run())
    await world.settle()
    job = world.kube.find("Job", "demo-sft")
    reason = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes have a GPU"}
    world.kube.put(
        {
            "kind": "Pod",
            "metadata": {"name": "p", "namespace": "ml", "labels": job["metadata"]["labels"]},
            "status": {"phase": "Pending", "conditions": [reason]},
        }
    )
    assert (await world.settle())["message"] == "sft: Unschedulable: 0/3 nodes have a GPU"


def test_object_names_stay_inside_a_label():
    long = object_name("a" * 53, "rejection-sampling-2")
    assert len(long) <= 57
    assert long != object_name("a" * 53, "rejection-sampling-3")
    assert object_name("demo", "rl") == "demo-rl"


STEPS = st.lists(
    st.sampled_from(
        ["look", "restart", "up", "finish", "fail", "crash", "suspend", "resume", "log", "drop-status", "later"]
    ),
    max_size=25,
)


@given(steps=STEPS)
@settings(max_examples=40, deadline=None)
def test_every_event_delivered_twice_changes_nothing(steps):
    """Whatever happens in whatever order: a second look writes nothing, and at most one Job is alive."""

    async def scenario() -> None:
        world = World()
        world.kube.put(alignment_run())
        for step in steps:
            await perturb(world, step)
            await world.settle()
            before = copy.deepcopy(world.kube.objects)
            writes = len(world.kube.writes)
            await world.look(times=2)
            assert world.kube.objects == before
            assert len(world.kube.writes) == writes
            alive = [
                body
                for (kind, _, _), body in world.kube.objects.items()
                if kind == "Job" and not (body.get("status") or {}).get("conditions")
            ]
            assert len(alive) <= 1
            phases = [stage["phase"] for stage in world.status()["stages"]]
            assert phases == sorted(phases, key=["Succeeded", "Running", "Failed", "Pending"].index)

    asyncio.run(scenario())


async def perturb(world, step: str) -> None:
    stage = world.status().get("stage")
    job = f"demo-{stage}"
    there = world.kube.find("Job", job) is not None
    match step:
        case "restart":
            world.restart()
        case "up":
            world.kube.services_up()
        case "finish" if there:
            world.kube.finish_job(job)
        case "fail" if there:
            world.kube.fail_pod(job, 2, "wrong", final=True)
        case "crash" if there:
            world.kube.fail_pod(job, 137, "killed", final=False, number=1)
        case "log" if there:
            world.kube.run_pod(job, '{"event": "progress", "step": 1, "total": 2}')
        case "suspend" | "resume":
            await world.kube.patch("AlignmentRun", "ml", "demo", {"spec": {"suspend": step == "suspend"}})
        case "drop-status":
            world.kube.find("AlignmentRun", "demo").pop("status", None)
        case "later":
            world.later(hours=1)
