"""Everything that the chart renders is valid: for Helm, for three Kubernetes versions, and for the CRDs of others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from services.controller import objects
from services.controller.config import RunCertificates
from services.controller.model import Settings
from services.controller.plan import parse_run

SCHEMAS = Path(__file__).parent / "schemas"
VERSIONS = ("1.31", "1.34", "1.37")
VARIANTS = [
    ("default",),
    ("cpu",),
    ("prod",),
    ("default", "policy.autoscaling.kind=hpa", "gateway.autoscaling.kind=hpa", "controller.replicas=2"),
    ("default", "policy.autoscaling.kind=keda", "controller.prometheusUrl=http://prometheus:9090"),
    (
        "default",
        "reward.enabled=true",
        "reference.enabled=true",
        "tls.secretName=certs",
        "airGapped=true",
        "policy.modelCache.kind=claim",
        "imagePullSecrets[0].name=registry",
        "images.gpu.digest=sha256:" + "a" * 64,
    ),
    (
        "default",
        "commonLabels.team=support",
        "commonAnnotations.contact=bots",
        "gateway.ingress.enabled=true",
        "gateway.ingress.hosts={bot.example.com}",
        "networkPolicy.egress.enabled=true",
        "controller.namespaces={team-a,team-b}",
        "security.runAsUser=null",
        "policy.acceptWeights=true",
        "gpuResource=nvidia.com/mig-3g.40gb",
    ),
]
OTHERS = {
    "prod": {"InferenceService", "ServingRuntime", "ServiceMonitor", "PodMonitor", "PrometheusRule", "Certificate"},
    "keda": {"ScaledObject", "HTTPRoute"},
}
"""Kinds of other projects, by the variant that has them. Kueue's Workload is of 0.19, Certificate of cert-manager 1.21,
HTTPRoute of Gateway API 1.6."""


def crd_schema(kind: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((SCHEMAS / f"{kind}.json.gz").read_bytes()))


def test_lint_is_strict_and_silent(helm, chart):
    for arguments in (
        ["--set", "database.existingSecret=x"],
        ["-f", f"{chart}/values-cpu.yaml"],
        ["-f", f"{chart}/values-prod.yaml"],
    ):
        done = helm.run("lint", "--strict", str(chart), *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "+".join(variant)[:60])
@pytest.mark.parametrize("version", VERSIONS)
def test_rendered_objects_are_valid_kubernetes(helm, variant, version):
    for document in helm.render(*variant):
        if document["kind"] not in set().union(*OTHERS.values()):
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize(("name", "variant"), [("prod", VARIANTS[2]), ("keda", VARIANTS[4])])
def test_rendered_objects_are_valid_for_the_crds_of_others(helm, name, variant):
    seen = set()
    route = ("gateway.httpRoute.enabled=true", "gateway.httpRoute.parentRefs[0].name=edge")
    for document in helm.render(*variant, *(route if name == "keda" else ())):
        if document["kind"] in set().union(*OTHERS.values()):
            seen.add(document["kind"])
            jsonschema.Draft202012Validator(crd_schema(document["kind"])).validate(document)
    assert seen == OTHERS[name]


def test_what_the_controller_asks_of_others_is_valid_for_their_crds():
    """Kueue's Workload for the pods of a stage, cert-manager's Certificate for a run."""
    meta = {"name": "demo", "namespace": "ml", "uid": "00000000-0000-0000-0000-000000000000"}
    stages = [{"sft": {}}, {"rewardModel": {}}, {"rl": {"steps": 2}}]
    spec = {"data": {"demo": {}}, "stages": stages, "trainer": {"queue": "gpus", "resources": {"gpus": 2}}}
    run = {"apiVersion": "steersman.dev/v1alpha1", "kind": "AlignmentRun", "metadata": meta, "spec": spec}
    pod = {"spec": {"containers": [{"name": "main", "image": "registry.example/steersman:1"}]}}
    issuer = {"name": "company", "kind": "ClusterIssuer"}
    names = ("trainer", "policy", "reward", "reference")
    settings = Settings(dict.fromkeys(names, pod), certificates=RunCertificates(issuer_ref=issuer), network=True)
    manifest = parse_run(run)
    *bodies, certificate = objects.lasting_objects(run, manifest, settings)
    for body in bodies:
        kubernetes_validate.validate(body, VERSIONS[-1], strict=True)
    for body in (certificate, objects.workload(run, manifest, 2, settings)):
        jsonschema.Draft202012Validator(crd_schema(body["kind"])).validate(body)


def test_a_wrong_object_would_be_found(helm, find):
    """The schemas are strict: a field that does not exist is refused."""
    deployment = json.loads(json.dumps(find(helm.render("default"), "Deployment", "policy")))
    deployment["spec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)
    service = json.loads(json.dumps(find(helm.render("prod"), "InferenceService", "chat")))
    service["spec"]["predictor"]["model"]["storageUrl"] = "pvc://x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(crd_schema("InferenceService")).validate(service)


@pytest.mark.parametrize(
    "wrong",
    [
        "policy.replicsa=2",
        "policy.gpus=-1",
        "gateway.mode=lambda",
        "images.gpu.digest=latest",
        "artifacts.size=lots",
        "database.mode=mysql",
        "trainer.modelCache.kind=hostPath",
        "policy.autoscaling.kind=vpa",
        "monitoring.serviceMonitor.interval=soon",
    ],
)
def test_wrong_values_are_refused_by_the_schema(helm, chart, wrong):
    done = helm.run("template", "x", str(chart), "--set", "database.existingSecret=x", "--set", wrong)
    assert done.returncode != 0
    assert wrong.partition("=")[0].split(".")[-1] in done.stderr


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "database.existingSecret is needed"),
        (["--set", "database.mode=sqlite"], "gateway.replicas must be 1"),
        (["--set", "gateway.mode=kserve", "--set", "database.existingSecret=x"], "gateway.kserve.storageUri is needed"),
    ],
)
def test_what_is_missing_is_said(helm, chart, values, words):
    done = helm.run("template", "x", str(chart), *values)
    assert done.returncode != 0
    assert words in done.stderr
