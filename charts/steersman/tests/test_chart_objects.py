"""What the rendered objects promise: security, scheduling, probes, drain, network, rights, storage."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from services.controller.model import ONLY_FOR_LABEL
from services.controller.objects import TLS_VOLUME

SERVICES = {"policy": 50051, "reward": 50052, "reference": 50053}
EVERYTHING = ("default", "reward.enabled=true", "reference.enabled=true")


def pods(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every pod spec that the chart makes or hands to the controller or to KServe, by name."""
    found = {}
    for document in documents:
        name = f"{document['kind']}/{document['metadata']['name']}"
        if document["kind"] == "Deployment":
            found[name] = document["spec"]["template"]["spec"]
        elif document["kind"] == "Pod":
            found[name] = document["spec"]
        elif document["kind"] == "ServingRuntime":
            service = next(item for item in documents if item["kind"] == "InferenceService")
            predictor = {key: value for key, value in service["spec"]["predictor"].items() if key != "model"}
            found[name] = {**predictor, **document["spec"]}
        elif document["kind"] == "ConfigMap" and document["metadata"]["name"].endswith("-controller"):
            for key in ("trainer", "policy", "reward", "reference"):
                found[f"template/{key}"] = yaml.safe_load(document["data"][f"{key}.yaml"])["spec"]
    return found


@pytest.mark.parametrize("profile", ["default", "cpu", "prod"])
def test_every_pod_is_restricted(helm, profile):
    """Pod Security Standard 'restricted', and a read-only root file system."""
    for name, spec in pods(helm.render(profile)).items():
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        allowed = {"emptyDir", "configMap", "secret", "persistentVolumeClaim", "projected"}
        for volume in spec.get("volumes", []):
            assert set(volume) - {"name"} <= allowed, name
        for container in spec["containers"] + spec.get("initContainers", []):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert context["readOnlyRootFilesystem"] is True, name
            assert "privileged" not in context, name
            assert container["resources"]["requests"], name
            assert container["resources"]["limits"]["memory"], name
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted <= {volume["name"] for volume in spec.get("volumes", [])}, name


@pytest.mark.parametrize("profile", ["default", "cpu", "prod"])
def test_only_the_controller_has_a_token(helm, profile):
    tokens = {name for name, spec in pods(helm.render(profile)).items() if spec.get("automountServiceAccountToken")}
    assert tokens == {"Deployment/steersman-controller"}


@pytest.mark.parametrize("service", SERVICES)
def test_model_services_have_gpus_probes_drain_and_cache(helm, find, service):
    documents = helm.render(*EVERYTHING)
    deployment = find(documents, "Deployment", service)
    spec = deployment["spec"]["template"]["spec"]
    container = spec["containers"][0]
    port = SERVICES[service]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == port
    assert container["readinessProbe"]["grpc"]["service"].endswith("Service")
    assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] == 900
    assert (
        container["resources"]["limits"]["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"] == 1
    )
    config = yaml.safe_load(find(documents, "ConfigMap", service)["data"]["config.yaml"])
    assert (
        spec["terminationGracePeriodSeconds"]
        > config["drainSeconds"] + container["lifecycle"]["preStop"]["sleep"]["seconds"]
    )
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/cache", "/tmp", "/dev/shm", "/artifacts"} <= mounts
    assert spec["tolerations"]
    assert spec["topologySpreadConstraints"]
    headless = find(documents, "Service", service)
    assert headless["spec"]["clusterIP"] == "None"
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert headless["spec"]["selector"].items() <= labels.items()
    budget = find(documents, "PodDisruptionBudget", service)
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_the_pods_of_a_run_are_outside_the_charts_services(helm, find):
    documents = helm.render(*EVERYTHING)
    for service in SERVICES:
        template = yaml.safe_load(find(documents, "ConfigMap", "controller")["data"][f"{service}.yaml"])
        selector = find(documents, "Service", service)["spec"]["selector"]
        assert not selector.items() <= template["metadata"]["labels"].items()
        policy = find(documents, "NetworkPolicy", service)["spec"]["podSelector"]["matchLabels"]
        assert policy.items() <= template["metadata"]["labels"].items(), "but inside its network policy"


def test_certificates_change_the_probes(helm, find):
    documents = helm.render(*EVERYTHING, "tls.secretName=certs")
    for service in (*SERVICES, "gateway"):
        container = find(documents, "Deployment", service)["spec"]["template"]["spec"]["containers"][0]
        assert container["readinessProbe"]["exec"]["command"][:3] == ["python", "-m", "steersman.rpc.probe"]
        config = yaml.safe_load(find(documents, "ConfigMap", service)["data"]["config.yaml"])
        assert config["tls"]["clientCa"] == "/etc/steersman/tls/ca.crt"


def ingress(policy: dict[str, Any]) -> dict[int, list[str]]:
    """Components that may reach each port."""
    return {
        port["port"]: [
            peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/component", "outside")
            for peer in rule.get("from", [{}])
        ]
        for rule in policy["spec"]["ingress"]
        for port in rule.get("ports", [])
    }


def test_weights_are_for_trainers_only(helm, find):
    policy = find(helm.render("default"), "NetworkPolicy", "policy")
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert ingress(policy) == {
        50051: ["gateway", "trainer", "test"],
        50054: ["trainer"],
        9090: ["outside"],
    }


def test_scoring_is_for_trainers_and_the_gateway_is_for_those_who_are_named(helm, find):
    documents = helm.render("prod")
    assert ingress(find(documents, "NetworkPolicy", "reward"))[50052] == ["gateway", "trainer", "test"], "best of n"
    assert ingress(find(documents, "NetworkPolicy", "reference"))[50053] == ["trainer", "test"]
    rule = find(documents, "NetworkPolicy", "gateway")["spec"]["ingress"][0]
    *named, test = rule["from"]
    names = [peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for peer in named]
    assert names == ["ingress", "business-apps"]
    assert test["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "test", "helm test"
    assert ingress(find(documents, "NetworkPolicy", "controller")) == {8080: ["test"], 9090: ["outside"]}


def test_the_pods_of_runs_are_left_to_the_policies_of_their_runs(helm, find):
    """The controller makes one for each run; the chart's own name metrics and what pods may ask."""
    documents = helm.render("default")
    assert yaml.safe_load(find(documents, "ConfigMap", "controller")["data"]["config.yaml"])["runNetwork"] is True
    for component in (*SERVICES, "trainer"):
        private, shared = (find(documents, "NetworkPolicy", name) for name in (f"{component}-runs", component))
        for policy, operator in ((private, "Exists"), (shared, "DoesNotExist")):
            (expression,) = policy["spec"]["podSelector"]["matchExpressions"]
            assert expression == {"key": ONLY_FOR_LABEL, "operator": operator}
        assert {9090} >= set(ingress({"spec": {"ingress": [], **private["spec"]}})), "nobody calls them but the run"
    plain = helm.render("default", "networkPolicy.perRun=false")
    names = [item["metadata"]["name"] for item in plain if item["kind"] == "NetworkPolicy"]
    assert not [name for name in names if name.endswith("-runs")]
    assert "matchExpressions" not in find(plain, "NetworkPolicy", "policy")["spec"]["podSelector"]
    assert yaml.safe_load(find(plain, "ConfigMap", "controller")["data"]["config.yaml"])["runNetwork"] is False


def test_a_certificate_for_each_run_is_asked_for_by_the_controller(helm, find):
    issuer = ("tls.certManager.enabled=true", "tls.certManager.issuerRef.name=company")
    documents = helm.render(*EVERYTHING, *issuer, "tls.certManager.perRun=true")
    config = yaml.safe_load(find(documents, "ConfigMap", "controller")["data"]["config.yaml"])
    assert config["runCertificates"] == {
        "issuerRef": {"name": "company"},
        "duration": "2160h",
        "renewBefore": "720h",
    }
    rules = find(documents, "Role", "controller")["rules"]
    assert {"apiGroups": ["cert-manager.io"], "resources": ["certificates"], "verbs": ["get", "create"]} in rules
    without = find(helm.render(*EVERYTHING, *issuer), "Role", "controller")["rules"]
    assert not [rule for rule in without if "cert-manager.io" in rule["apiGroups"]]
    for name in (*SERVICES, "trainer"):
        template = yaml.safe_load(find(documents, "ConfigMap", "controller")["data"][f"{name}.yaml"])
        assert TLS_VOLUME in [volume["name"] for volume in template["spec"]["volumes"]], "where the controller puts it"


def test_the_controllers_rights_are_just_its_calls(helm, find):
    documents = helm.render("prod")
    rules = {
        (group, resource): set(rule["verbs"])
        for rule in find(documents, "Role", "controller")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert not any("*" in (*key, *verbs) for key, verbs in rules.items())
    assert rules["", "secrets"] == {"create"}, "it draws a token for each run, and reads none"
    assert rules["serving.kserve.io", "inferenceservices"] == {"get", "list", "patch"}
    assert rules["steersman.dev", "alignmentruns/status"] == {"patch"}
    assert not [item for item in documents if item["kind"] == "ClusterRoleBinding"]
    for binding in (item for item in documents if item["kind"] == "RoleBinding"):
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "steersman-controller", "namespace": "ml"}]


def test_the_crd_is_kept_and_can_be_left_out(helm, find):
    crd = find(helm.render("default"), "CustomResourceDefinition", "alignmentruns.steersman.dev")
    assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    loose = find(helm.render("default", "crds.keep=false"), "CustomResourceDefinition", "alignmentruns.steersman.dev")
    assert "helm.sh/resource-policy" not in loose["metadata"]["annotations"]
    kinds = {item["kind"] for item in helm.render("default", "crds.install=false")}
    assert not {"CustomResourceDefinition", "ClusterRole"} & kinds


def test_scaling_leaves_the_replicas_to_the_autoscaler(helm, find):
    assert find(helm.render("default"), "Deployment", "policy")["spec"]["replicas"] == 1
    documents = helm.render("default", "policy.autoscaling.kind=keda", "controller.prometheusUrl=http://p:9090")
    assert "replicas" not in find(documents, "Deployment", "policy")["spec"]
    trigger = find(documents, "ScaledObject", "policy")["spec"]["triggers"][0]["metadata"]
    assert trigger["query"] == 'sum(steersman_generation_waiting{namespace="ml",pod=~"steersman-policy-.*"})'


def test_a_kserve_predictor_holds_engine_and_gateway(helm, find):
    documents = helm.render("prod")
    service = find(documents, "InferenceService", "chat")
    assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Standard"
    assert service["spec"]["predictor"]["model"]["storageUri"].startswith("pvc://steersman-artifacts/")
    engine, gateway = find(documents, "ServingRuntime", "chat")["spec"]["containers"]
    assert engine["name"] == "kserve-container"
    assert "ports" not in engine
    assert "host=127.0.0.1" in engine["args"], "nobody outside the pod may load other weights"
    assert "model=/mnt/models" in engine["args"]
    assert gateway["name"] == "transformer-container"
    assert gateway["ports"][0] == {"name": "http", "containerPort": 8080, "protocol": "TCP"}, "KServe routes to it"
    assert "deployment=$(STEERSMAN_DEPLOYMENT)" in gateway["args"]
    names = {mount["mountPath"]: mount["name"] for mount in gateway["volumeMounts"]}
    assert names["/etc/steersman/config.yaml"] == "gateway-config"
    assert names["/tmp"] == "tmp"
    assert not [
        item for item in documents if item["kind"] == "Deployment" and item["metadata"]["name"].endswith("gateway")
    ]
    # Told to stop together: the engine ends after the gateway takes no more requests, and waits for its answers.
    stop = {one["name"]: one["lifecycle"]["preStop"]["sleep"]["seconds"] for one in (engine, gateway)}
    assert stop["kserve-container"] > stop["transformer-container"]
    assert "drainSeconds=120" in engine["args"]
    assert service["spec"]["predictor"]["terminationGracePeriodSeconds"] > stop["kserve-container"] + 120
    probe = find(documents, "Pod", "test")["spec"]["containers"][0]
    assert probe["args"][-1] == "http://chat-predictor/readyz"


def test_helm_test_asks_every_shared_service(helm, find):
    probe, ready, look = find(helm.render(*EVERYTHING), "Pod", "test")["spec"]["containers"]
    targets = [word for word in probe["args"] if word.startswith("steersman-")]
    ports = {**SERVICES, "gateway": 8081}
    assert sorted(targets) == sorted(f"steersman-{name}.ml.svc:{port}" for name, port in ports.items())
    assert ready["args"][-1] == "http://steersman-controller:8080/readyz"
    assert look["args"][-1] == "http://steersman-controller:8080/dry-look"
    for program in (ready, look):
        compile(program["args"][0], "test", "exec")


def test_the_small_profile_fits_four_cores(helm):
    """What runs at the same time during the reinforcement learning of a run, on one node with 4 cores and 12 GiB."""
    units = {"Mi": 1, "Gi": 1024}
    cores, memory = 0.0, 0
    running = pods(helm.render("cpu"))
    for name, spec in running.items():
        if name.startswith("Pod/"):
            continue
        requests = spec["containers"][0]["resources"]["requests"]
        cores += float(requests["cpu"].removesuffix("m")) / (1000 if requests["cpu"].endswith("m") else 1)
        memory += int(requests["memory"][:-2]) * units[requests["memory"][-2:]]
        assert "nvidia.com/gpu" not in requests
    assert cores <= 3.5
    assert memory <= 10 * 1024
