"""The controller's own process on a real API server, with no rights but those of its ServiceAccount.

What a kubelet would do to the pods of a stage, the tests do: they set the pods' status. Where no
kube-controller-manager runs, they also make the Job's pod, end the Job, and let go what is deleted in the foreground.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_lab import ROOT, Lab, run_of, until

from services.controller.objects import final_exit_codes, reason_of_exit
from steersman.errors import UnavailableError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

PATIENCE = 180
"""Seconds to wait for a state."""


class Controller:
    """`python -m services.controller` as the chart starts it, with the chart's templates and leader election."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self._name = f"{lab.release}-steersman-controller"
        data = lab.get("configmap", self._name)["data"]
        for name, text in data.items():
            (folder / name).write_text(text)
        config = {**yaml.safe_load(data["config.yaml"]), "templates": str(folder), "resyncSeconds": 2}
        for port in ("metricsPort", "healthPort"):
            config.pop(port)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "kubeconfig").write_text(yaml.safe_dump(self._kubeconfig(lab)))
        self.lease: str = config["leaderElection"]["lease"]
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def _kubeconfig(self, lab: Lab) -> dict[str, Any]:
        """The cluster of the test's kubeconfig, entered as the controller's ServiceAccount."""
        mine = yaml.safe_load(lab.kubectl("config", "view", "--minify", "--flatten", "--raw").stdout)
        context = mine["contexts"][0]
        token = lab.kubectl("create", "token", self._name, "--duration=1h").stdout.strip()
        return {
            **mine,
            "users": [{"name": self._name, "user": {"token": token}}],
            "contexts": [{"name": context["name"], "context": {**context["context"], "user": self._name}}],
        }

    def start(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "KUBERNETES_SERVICE_HOST"}
        environment["KUBECONFIG"] = str(self._folder / "kubeconfig")
        command = [sys.executable, "-m", "services.controller", "--config", str(self._folder / "config.yaml")]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=log, stdout=log)

    def end(self, how: signal.Signals) -> int:
        process = self._process
        if process is None:
            return 0
        process.send_signal(how)
        self._process = None
        return process.wait(PATIENCE)

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text()

    def until(self, what: Callable[[], Any], why: str) -> Any:
        """Waits for a state; what the controller said is part of the failure."""

        def look() -> Any:
            process = self._process
            if process is not None and process.poll() is not None:
                # As the kubelet does, but only after the end that the election asks for, as on a slow API server.
                assert process.returncode == UnavailableError.exit_code, "the controller ended"
                self.start()
            return what()

        try:
            return until(look, PATIENCE, why)
        except AssertionError as error:
            raise AssertionError(f"{error}; the controller's log ends: {self.log[-3000:]}") from None


@pytest.fixture
def controller(installed: Lab, tmp_path: Path) -> Iterator[Controller]:
    if installed.full:
        pytest.skip("pods run here: the release test shows the same with real ones")
    controller = Controller(installed, tmp_path)
    controller.start()
    yield controller
    controller.end(signal.SIGKILL)


def status_of(lab: Lab, run: str) -> dict[str, Any]:
    return lab.get("alignmentrun", run).get("status", {})


def phase(lab: Lab, run: str, wanted: str) -> Callable[[], bool]:
    return lambda: status_of(lab, run).get("phase") == wanted


def living_job(lab: Lab, name: str) -> dict[str, Any]:
    job = lab.get("job", name)
    return job if job and "deletionTimestamp" not in job["metadata"] else {}


def pod_of(lab: Lab, controller: Controller, name: str) -> dict[str, Any]:
    """The pod of a living Job."""
    job = controller.until(lambda: living_job(lab, name), f"there is no Job {name}")
    uid = job["metadata"]["uid"]
    if not lab.controllers:
        template = job["spec"]["template"]
        labels = {**template["metadata"]["labels"], "batch.kubernetes.io/controller-uid": uid}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"{name}-{uid[:5]}", "labels": labels}}
        lab.apply({**pod, "spec": template["spec"]})
    found = until(
        lambda: lab.list("pods", f"batch.kubernetes.io/controller-uid={uid}"), PATIENCE, f"the Job {name} has no pod"
    )
    return found[0]


def end_pod(lab: Lab, pod: dict[str, Any], job: str, exit_code: int, log: str = "") -> None:
    """Ends a pod as the kubelet would, and its Job as the Job controller would where there is none."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    ended = {"exitCode": exit_code, "message": log, "startedAt": now, "finishedAt": now}
    container = pod["spec"]["containers"][0]
    state = {"name": container["name"], "image": container["image"], "imageID": "", "ready": False, "restartCount": 0}
    status = {"phase": "Failed" if exit_code else "Succeeded", "startTime": now}
    status |= {"containerStatuses": [{**state, "state": {"terminated": ended}}]}
    lab.set_status("pod", pod["metadata"]["name"], status)
    if not lab.controllers:
        kinds = ("FailureTarget", "Failed") if exit_code else ("SuccessCriteriaMet", "Complete")
        conditions = [{"type": kind, "status": "True", "lastTransitionTime": now, "reason": "Test"} for kind in kinds]
        counts = {"failed": 1} if exit_code else {"succeeded": 1, "completionTime": now}
        lab.set_status("job", job, {"conditions": conditions, "startTime": now, **counts})


def let_go(lab: Lab, kind: str, name: str) -> bool:
    """Whether something is deleted; what is held in the foreground goes by the garbage collector, if there is one."""
    found = lab.get(kind, name)
    if found and not lab.controllers and "deletionTimestamp" in found["metadata"]:
        assert found["metadata"]["finalizers"] == ["foregroundDeletion"]
        lab.patch(kind, name, {"metadata": {"finalizers": None}})
    return not lab.get(kind, name)


def another_job(lab: Lab, name: str, before: dict[str, Any]) -> dict[str, Any]:
    """The Job that takes the place of one that is deleted."""
    let_go(lab, "job", name)
    job = living_job(lab, name)
    return job if job and job["metadata"]["uid"] != before["metadata"]["uid"] else {}


def test_a_run_goes_through_suspension_a_lost_controller_failure_and_retry(installed, controller):
    lab = installed
    lab.apply(run_of("react", stages=[{"sft": {}}, {"rewardModel": {}}]))
    pod = pod_of(lab, controller, "react-sft")
    assert lab.get("job", "react-sft")["metadata"]["ownerReferences"][0]["kind"] == "AlignmentRun"
    lab.set_status("pod", pod["metadata"]["name"], {"phase": "Running"})
    end_pod(lab, pod, "react-sft", 0)
    first = controller.until(lambda: living_job(lab, "react-reward-model"), "the second stage did not begin")

    lab.patch("alignmentrun", "react", {"spec": {"suspend": True}})
    controller.until(phase(lab, "react", "Suspended"), "the run was not suspended")
    controller.until(lambda: let_go(lab, "job", "react-reward-model"), "the Job of a suspended run stays")
    lab.patch("alignmentrun", "react", {"spec": {"suspend": False}})
    job = controller.until(lambda: another_job(lab, "react-reward-model", first), "the run did not go on")

    held = lab.get("lease", controller.lease)["spec"]["holderIdentity"]
    controller.end(signal.SIGKILL)
    code = final_exit_codes()[0]
    end_pod(
        lab, pod_of(lab, controller, "react-reward-model"), "react-reward-model", code, "step 1\nreward-model: no pairs"
    )
    controller.start()
    controller.until(phase(lab, "react", "Failed"), "the next controller did not see the failure")
    assert lab.get("lease", controller.lease)["spec"]["holderIdentity"] != held
    run = lab.get("alignmentrun", "react")
    done, failed = run["status"]["stages"]
    assert (done["phase"], failed["phase"]) == ("Succeeded", "Failed")
    assert (failed["exitCode"], failed["reason"]) == (code, reason_of_exit(code))
    assert (failed["message"], failed["log"]) == ("reward-model: no pairs", "step 1\nreward-model: no pairs")
    assert run["status"]["observedGeneration"] == run["metadata"]["generation"]

    lab.kubectl("annotate", "alignmentrun", "react", "steersman.dev/retry=1")
    controller.until(lambda: another_job(lab, "react-reward-model", job), "the failed stage did not run again")
    end_pod(lab, pod_of(lab, controller, "react-reward-model"), "react-reward-model", 0)
    controller.until(phase(lab, "react", "Succeeded"), "the retried run did not succeed")
    events = lab.kubectl(
        "get", "events", "--field-selector", "involvedObject.name=react", "-o", "jsonpath={.items[*].reason}"
    ).stdout.split()
    for reason in ("Started", "Suspended", "Resumed", "Failed", "Retried", "Succeeded"):
        assert events.count(reason) == 1, events
    assert events.count("StageSucceeded") == 2
    assert controller.end(signal.SIGTERM) == 0, controller.log
    lab.kubectl("delete", "alignmentrun", "react", "--wait=false")
    if lab.controllers:
        until(lambda: not lab.get("job", "react-sft"), PATIENCE, "what the run owned stays")
        assert not lab.get("configmap", "react-manifest")


def test_two_runs_go_on_beside_each_other_and_an_old_one_leaves(installed, controller):
    lab = installed
    full_weights = [{"sft": {"lora": None}}]  # a null that `kubectl apply` leaves out of the object
    lab.apply(run_of("brief", stages=full_weights, ttlSecondsAfterFinished=1))
    lab.apply(run_of("stopped", stages=[{"sft": {}}]))
    pods = {run: pod_of(lab, controller, f"{run}-sft") for run in ("brief", "stopped")}
    manifest = yaml.safe_load(lab.get("configmap", "brief-manifest")["data"]["manifest.yaml"])
    assert manifest["spec"]["stages"] == full_weights
    end_pod(lab, pods["brief"], "brief-sft", 0)
    lab.kubectl("annotate", "alignmentrun", "stopped", "steersman.dev/cancel=true")
    controller.until(phase(lab, "stopped", "Cancelled"), "the run was not cancelled")
    controller.until(lambda: let_go(lab, "job", "stopped-sft"), "the Job of a cancelled run stays")
    controller.until(lambda: let_go(lab, "alignmentrun", "brief"), "the run outlives its time")
    lab.kubectl("delete", "alignmentrun", "stopped", "--wait=false")


def test_the_services_of_a_stage_start_and_stop(installed, controller):
    lab = installed
    lab.apply(run_of("served", stages=[{"evaluate": {}}]))
    sets = [f"served-{service}" for service in ("policy", "reward", "reference")]
    controller.until(lambda: all(lab.get("statefulset", name) for name in sets), "the services did not start")
    assert not lab.get("job", "served-evaluate")
    for name in sets:
        if lab.controllers:
            until(lambda name=name: lab.get("pod", f"{name}-0"), PATIENCE, f"{name} has no pod")
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            ready = [{"type": kind, "status": "True", "lastTransitionTime": now} for kind in ("Ready", "PodScheduled")]
            lab.set_status("pod", f"{name}-0", {"phase": "Running", "conditions": ready})
        else:
            generation = lab.get("statefulset", name)["metadata"]["generation"]
            counts = dict.fromkeys(("replicas", "readyReplicas", "updatedReplicas", "currentReplicas"), 1)
            lab.set_status("statefulset", name, {**counts, "observedGeneration": generation})
    end_pod(lab, pod_of(lab, controller, "served-evaluate"), "served-evaluate", 0)
    controller.until(phase(lab, "served", "Succeeded"), "the run did not succeed")
    controller.until(
        lambda: all(lab.get("statefulset", name)["spec"]["replicas"] == 0 for name in sets), "services go on running"
    )
    lab.kubectl("delete", "alignmentrun", "served", "--wait=false")
