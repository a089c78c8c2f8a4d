"""What the chart writes is what the programs read: configuration files, pod templates, the objects of a run."""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from services.controller.config import ControllerConfig, load_templates
from services.controller.crd import PLURAL
from services.controller.model import Settings
from services.controller.objects import needs, service_objects, stage_objects
from services.controller.plan import parse_run
from services.gateway.config import GatewayConfig
from services.policy.config import PolicyConfig
from services.reference.config import ReferenceConfig
from services.reward.config import RewardConfig
from steersman.config.base import apply_overrides, load_model

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests/unit/controller"))
from fake_kube import alignment_run

MODELS = {
    "policy": PolicyConfig,
    "reward": RewardConfig,
    "reference": ReferenceConfig,
    "gateway": GatewayConfig,
    "controller": ControllerConfig,
}
SCORER = (
    "reward.enabled=true",
    "reward.config.scorers[0].name=exact-facts",
    "reward.config.scorers[0].kind=verifiable",
)


def config_of(documents: list[dict[str, Any]], find, component: str) -> dict[str, Any]:
    return yaml.safe_load(find(documents, "ConfigMap", component)["data"]["config.yaml"])


@pytest.mark.parametrize("component", MODELS)
@pytest.mark.parametrize("variant", [(), ("tls.secretName=certs",)], ids=["plain", "tls"])
@pytest.mark.parametrize("profile", ["default", "cpu", "prod"])
def test_configuration_files_are_accepted_by_the_services(helm, find, profile, variant, component):
    document = config_of(helm.render(profile, *SCORER, *variant), find, component)
    config = load_model(MODELS[component], document, f"{component}/config.yaml")
    if component != "controller":
        assert config.host == "0.0.0.0"


@pytest.mark.parametrize("component", ["policy", "gateway"])
def test_arguments_of_a_predictor_are_accepted(helm, find, component):
    documents = helm.render("prod")
    engine, gateway = find(documents, "ServingRuntime", "chat")["spec"]["containers"]
    arguments = (engine if component == "policy" else gateway)["args"]
    overrides = [value for flag, value in pairwise(arguments) if flag == "--set"]
    document = apply_overrides(config_of(documents, find, component), overrides)
    config = load_model(MODELS[component], document, component)
    assert config.tls is None


@pytest.fixture
def settings(helm, find, tmp_path) -> Settings:
    """The controller's settings, from what the chart mounts into it."""
    data = find(helm.render("default"), "ConfigMap", "controller")["data"]
    for name, text in data.items():
        (tmp_path / name).write_text(text)
    config = load_model(ControllerConfig, yaml.safe_load(data["config.yaml"]), "controller")
    return Settings(load_templates(tmp_path), config.storage)


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@pytest.mark.parametrize("workers", [1, 4])
def test_the_objects_of_a_run_are_valid_kubernetes(settings, workers, version):
    """The chart's templates, completed by the controller, for every stage."""
    run = alignment_run(trainer={"workers": workers, "queue": "gpus"}, services={"policy": {"replicas": 2}})
    manifest = parse_run(run)
    kinds = set()
    for index in range(len(manifest.spec.stages)):
        objects = stage_objects(run, manifest, index, settings)
        for service, config in needs(run, manifest, index, settings.storage).items():
            objects += service_objects(run, manifest, service, config, settings, "rl")
        for body in objects:
            kinds.add(body["kind"])
            kubernetes_validate.validate(body, version, strict=True)
    assert kinds == {"Job", "Service", "StatefulSet"}


def test_the_services_of_a_run_accept_their_arguments(helm, find, settings):
    """Configuration file and overrides together are a complete configuration of each service."""
    run = alignment_run()
    manifest = parse_run(run)
    documents = helm.render("default")
    for index, service in ((2, "policy"), (2, "reward"), (2, "reference"), (3, "policy")):
        config = needs(run, manifest, index, settings.storage)[service]
        body = service_objects(run, manifest, service, config, settings, "rl")[1]
        arguments = body["spec"]["template"]["spec"]["containers"][0]["args"]
        overrides = [value for flag, value in pairwise(arguments) if flag == "--set"]
        document = apply_overrides(config_of(documents, find, service), overrides)
        loaded = load_model(MODELS[service], document, service)
        assert loaded.host == "0.0.0.0"
        if service != "reward":
            assert loaded.model == "/artifacts/runs/ml/demo/sft/model"


def test_every_object_that_the_controller_touches_is_in_its_role(helm, find):
    """The verbs of the code, read from the calls that it makes."""
    rules = find(helm.render("default"), "Role", "controller")["rules"]
    allowed = {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    touched = {
        *((kind, "create") for kind in ("jobs", "statefulsets", "services", "configmaps", "events", "secrets")),
        *((kind, "create") for kind in ("deployments", "workloads", "networkpolicies")),
        *((kind, "list") for kind in ("jobs", "statefulsets", "pods", "events", "inferenceservices", PLURAL)),
        *((kind, "watch") for kind in ("jobs", "statefulsets", "pods", PLURAL)),
        *((kind, "get") for kind in ("configmaps", "inferenceservices", "deployments", "workloads")),
        *((kind, "get") for kind in ("pods/log", PLURAL)),
        *((kind, "get") for kind in ("jobs", "statefulsets", "services", "networkpolicies")),  # whose is it?
        *((kind, "patch") for kind in ("statefulsets", "inferenceservices", PLURAL, f"{PLURAL}/status")),
        *((kind, "patch") for kind in ("deployments", "configmaps")),
        *((kind, "delete") for kind in ("jobs", PLURAL)),
        *((kind, "delete") for kind in ("statefulsets", "services", "configmaps", "deployments", "workloads")),
        (f"{PLURAL}/finalizers", "update"),
    }
    spare = {("pods", "get")}
    assert touched <= allowed
    assert allowed - touched <= spare


def test_the_readme_names_every_value(chart):
    """README.md is made from values.yaml by scripts/chart_docs.py."""
    values = yaml.safe_load((chart / "values.yaml").read_text())
    text = (chart / "README.md").read_text()
    for key, value in values.items():
        names = [f"{key}.{child}" for child in value] if isinstance(value, dict) and value else [key]
        for name in names:
            assert f"`{name}" in text, f"{name} is missing; run python scripts/chart_docs.py"
    assert not re.search(r"\|\s*\|\s*$", text, re.M) or json.dumps(values)


@pytest.mark.parametrize("replicas", [1, 2])
def test_controllers_are_elected_by_a_lease_that_their_role_lets_them_hold(helm, find, replicas):
    """Also a single one: while the Deployment rolls, there are two for a moment."""
    documents = helm.render("default", f"controller.replicas={replicas}")
    assert find(documents, "Deployment", "controller")["spec"]["replicas"] == replicas
    election = load_model(ControllerConfig, config_of(documents, find, "controller"), "controller").leader_election
    assert election is not None
    assert election.namespace == "ml"
    create, hold = find(documents, "Role", "controller-leader")["rules"]
    assert (create["resources"], create["verbs"]) == (["leases"], ["create"])
    assert (hold["resourceNames"], hold["verbs"]) == ([election.lease], ["get", "update"])
