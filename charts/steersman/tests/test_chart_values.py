"""Values reach what they name: every pod, every object, the controller's configuration, routes and network policies."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
import yaml
from test_chart_objects import EVERYTHING, ingress, pods

from services.controller.config import ControllerConfig
from services.gateway.config import GatewayConfig
from services.policy.config import PolicyConfig
from steersman.config.base import apply_overrides, load_model

COMPONENTS = ("policy", "reward", "reference", "gateway", "controller", "trainer")
PROFILES = pytest.mark.parametrize("profile", ["default", "cpu", "prod"])


def config_of(documents: list[dict[str, Any]], find, component: str) -> dict[str, Any]:
    return yaml.safe_load(find(documents, "ConfigMap", component)["data"]["config.yaml"])


def templates(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metadata of every pod template."""
    found = [item["spec"]["template"]["metadata"] for item in documents if item["kind"] == "Deployment"]
    controller = next(item for item in documents if item["metadata"]["name"] == "steersman-controller"
                      and item["kind"] == "ConfigMap")  # fmt: skip
    names = ("trainer", "policy", "reward", "reference")
    return found + [yaml.safe_load(controller["data"][f"{name}.yaml"])["metadata"] for name in names]


@PROFILES
def test_labels_and_annotations_are_on_every_object_and_pod(helm, profile):
    documents = helm.render(
        profile, "commonLabels.team=support", "commonAnnotations.contact=bots", "policy.podLabels.team=other"
    )
    for item in documents:
        assert item["metadata"]["labels"]["team"] == "support", item["metadata"]["name"]
        assert item["metadata"]["annotations"]["contact"] == "bots", item["metadata"]["name"]
    for meta in templates(documents):
        component = meta["labels"]["app.kubernetes.io/component"]
        assert meta["labels"]["team"] == ("other" if component == "policy" else "support")
        assert meta["annotations"]["contact"] == "bots"


@pytest.mark.parametrize("name", ["app.kubernetes.io/name", "steersman.dev/run", "helm.sh/chart"])
def test_labels_that_the_chart_needs_itself_are_refused(helm, chart, name):
    key = name.replace(".", r"\.")
    done = helm.run("template", "x", str(chart), "--set", "database.existingSecret=x", "--set", f"commonLabels.{key}=x")
    assert done.returncode != 0
    assert name in done.stderr


@PROFILES
def test_users_and_groups_are_the_clusters_where_they_are_null(helm, profile):
    """OpenShift gives every namespace a range of its own."""
    free = ("security.runAsUser=null", "security.runAsGroup=null", "security.fsGroup=null")
    for name, spec in pods(helm.render(profile, *free)).items():
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert not {"runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy"} & set(context), name
    own = ("security.runAsUser=1000710000", "security.fsGroup=2000", "security.supplementalGroups={7,8}")
    for name, spec in pods(helm.render(profile, *own)).items():
        context = spec["securityContext"]
        assert (context["runAsUser"], context["fsGroup"]) == (1000710000, 2000), name
        assert context["supplementalGroups"] == [7, 8], name


@PROFILES
def test_volumes_and_pull_secrets_reach_every_pod(helm, profile):
    """A private authority for hubs, object stores and databases; the pod of `helm test`, too."""
    volume = ("extraVolumes[0].name=ca", "extraVolumes[0].configMap.name=company-ca")
    mount = ("extraVolumeMounts[0].name=ca", "extraVolumeMounts[0].mountPath=/etc/ssl/company")
    documents = helm.render(profile, *volume, *mount, "imagePullSecrets[0].name=registry")
    for name, spec in pods(documents).items():
        assert {"name": "ca", "configMap": {"name": "company-ca"}} in spec["volumes"], name
        for container in spec["containers"]:
            assert {"name": "ca", "mountPath": "/etc/ssl/company"} in container["volumeMounts"], name
        assert spec["imagePullSecrets"] == [{"name": "registry"}], name


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_component_has_its_own_volumes_selectors_and_priority(helm, component):
    values = (
        *("extraVolumes[0].name=own", "extraVolumes[0].secret.secretName=mine"),
        *("extraVolumeMounts[0].name=own", "extraVolumeMounts[0].mountPath=/own"),
        *("nodeSelector.pool=a", "priorityClassName=high", "runtimeClassName=kata"),
    )
    found = pods(helm.render(*EVERYTHING, *(f"{component}.{value}" for value in values)))
    for name, spec in found.items():
        mine = name.endswith(f"/{component}") or name.endswith(f"-{component}")
        assert any(volume["name"] == "own" for volume in spec["volumes"]) == mine, name
        mounted = {item["mountPath"] for one in spec["containers"] for item in one["volumeMounts"]}
        assert ("/own" in mounted) == mine, name
        assert (spec.get("nodeSelector") == {"pool": "a"}) == mine, name
        assert (spec.get("priorityClassName") == "high") == mine, name
        assert (spec.get("runtimeClassName") == "kata") == mine, name


def test_the_volumes_of_both_containers_of_a_predictor_are_there(helm):
    own = ("extraVolumes[0].name=own", "extraVolumes[0].emptyDir.medium=Memory")
    mount = ("extraVolumeMounts[0].name=own", "extraVolumeMounts[0].mountPath=/own")
    spec = pods(helm.render("prod", *(f"gateway.{item}" for item in own + mount)))["ServingRuntime/steersman-chat"]
    engine, gateway = spec["containers"]
    assert "/own" not in {item["mountPath"] for item in engine["volumeMounts"]}
    assert "/own" in {item["mountPath"] for item in gateway["volumeMounts"]}
    assert [item["name"] for item in spec["volumes"]].count("own") == 1


def test_gpus_have_the_name_that_the_cluster_gives_them(helm, find):
    documents = helm.render(*EVERYTHING, "gpuResource=amd.com/gpu", "policy.gpus=2")
    for name, spec in pods(documents).items():
        assert "nvidia.com/gpu" not in json.dumps(spec["containers"]), name
    policy = find(documents, "Deployment", "policy")["spec"]["template"]["spec"]["containers"][0]
    assert policy["resources"]["limits"]["amd.com/gpu"] == policy["resources"]["requests"]["amd.com/gpu"] == 2
    config = load_model(ControllerConfig, config_of(documents, find, "controller"), "controller")
    assert config.gpu_resource == "amd.com/gpu", "for what a manifest asks for"


def test_servers_listen_where_the_values_say(helm, find):
    documents = helm.render("default", "listenAddress=::")
    for component in ("policy", "gateway", "controller"):
        assert config_of(documents, find, component)["host"] == "::"
    if socket.has_ipv6:
        socket.inet_pton(socket.AF_INET6, "::")


def test_the_controller_works_in_the_namespaces_that_are_named(helm, find):
    documents = helm.render(
        "default", "controller.namespaces={team-a,team-b}", "controller.resyncSeconds=7", "controller.leaseSeconds=40"
    )
    own = [item for item in documents if item["metadata"].get("namespace", "ml") == "ml"]
    config = load_model(ControllerConfig, config_of(own, find, "controller"), "controller")
    assert config.namespaces == ["team-a", "team-b"]
    assert config.resync_seconds == 7
    assert config.leader_election is not None
    assert (config.leader_election.namespace, config.leader_election.duration_seconds) == ("ml", 40)
    for namespace in ("team-a", "team-b"):
        mine = [item for item in documents if item["metadata"].get("namespace") == namespace]
        kinds = {(item["kind"], item["metadata"]["name"].removeprefix("steersman-")) for item in mine}
        services = ("policy", "reward", "reference")
        assert {("ServiceAccount", name) for name in (*services, "trainer")} <= kinds
        assert {("ConfigMap", name) for name in services} <= kinds
        assert {("NetworkPolicy", name) for name in (*services, "trainer")} <= kinds
        assert {("Role", "controller"), ("RoleBinding", "controller")} <= kinds
        binding = next(item for item in mine if item["kind"] == "RoleBinding")
        assert binding["subjects"][0]["namespace"] == "ml"


@pytest.mark.parametrize("profile", ["default", "prod"])
def test_routes_lead_to_what_answers(helm, find, profile):
    ingress_values = ("gateway.ingress.enabled=true", "gateway.ingress.hosts={bot.example.com}")
    route_values = ("gateway.httpRoute.enabled=true", "gateway.httpRoute.parentRefs[0].name=public")
    tls = ("gateway.ingress.tlsSecret=bot-tls", "gateway.ingress.className=nginx")
    documents = helm.render(profile, *ingress_values, *route_values, *tls)
    service, port = ("chat-predictor", 80) if profile == "prod" else ("steersman-gateway", 8080)
    spec = find(documents, "Ingress", "gateway")["spec"]
    assert (spec["ingressClassName"], spec["tls"]) == (
        "nginx",
        [{"secretName": "bot-tls", "hosts": ["bot.example.com"]}],
    )
    (rule,) = spec["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    assert (rule["host"], backend) == ("bot.example.com", {"name": service, "port": {"number": port}})
    route = find(documents, "HTTPRoute", "gateway")["spec"]
    assert route["parentRefs"] == [{"name": "public"}]
    assert route["rules"][0]["backendRefs"] == [{"name": service, "port": port}]
    plain = {item["kind"] for item in helm.render(profile)}
    assert not {"Ingress", "HTTPRoute"} & plain


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("gateway.ingress.enabled=true", "hosts"),
        ("gateway.httpRoute.enabled=true", "parentRefs is needed"),
        ("tls.certManager.enabled=true", "issuerRef.name is needed"),
    ],
)
def test_what_is_on_without_its_goal_is_refused(helm, chart, value, words):
    done = helm.run("template", "x", str(chart), "--set", "database.existingSecret=x", "--set", value)
    assert done.returncode != 0
    assert words in done.stderr


def test_what_pods_may_ask_is_closed_by_a_value(helm, find):
    extra = (
        "networkPolicy.egress.extra.trainer[0].ports[0].port=9000",
        "networkPolicy.egress.extra.trainer[0].to[0].ipBlock.cidr=10.1.0.0/16",
    )
    documents = helm.render(*EVERYTHING, "networkPolicy.egress.enabled=true", *extra)

    def goals(component: str) -> set[tuple[int | None, str]]:
        spec = find(documents, "NetworkPolicy", component)["spec"]
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        return {
            (port, peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/component", "outside"))
            for rule in spec["egress"]
            for port in ([item["port"] for item in rule["ports"]] if "ports" in rule else [None])
            for peer in rule.get("to", [{}])
        }

    names = {(53, "outside")}
    for model in ("policy", "reward", "reference"):
        assert goals(model) == names
    own = {(None, name) for name in ("trainer", "policy", "reward", "reference")}
    assert goals("trainer") == names | own | {(9000, "outside")}
    assert goals("gateway") == names | {(port, name) for port in (50051, 50052) for name in ("policy", "reward")}
    assert goals("controller") == names | {(443, "outside"), (6443, "outside")}
    assert all(item["spec"]["policyTypes"] == ["Ingress"] for item in helm.render("default")
               if item["kind"] == "NetworkPolicy")  # fmt: skip


def test_settings_of_the_policy_backend_join_those_of_the_chart(helm, find):
    """One `policy:` in the file, with the chart's endpoints."""
    documents = helm.render("default", "gateway.config.policy.probeSeconds=9", "gateway.config.model=helper")
    text = find(documents, "ConfigMap", "gateway")["data"]["config.yaml"]
    assert text.count("policy:") == 1
    config = load_model(GatewayConfig, yaml.safe_load(text), "gateway")
    assert config.policy.probe_seconds == 9
    assert config.policy.endpoints == ["dns:///steersman-policy.ml.svc:50051"]
    assert config.model == "helper"


def test_further_models_and_embeddings_are_values(helm, find):
    """Beside the chart's own policy service, which may serve embeddings, too."""
    documents = helm.render(
        "default",
        "policy.config.embeddings.pooling=mean",
        "gateway.config.fallback[0]=general",
        "gateway.config.models[0].name=general",
        "gateway.config.models[0].policy.kind=openai",
        "gateway.config.models[0].policy.endpoints[0]=http://vllm.ml.svc:8000",
        "gateway.config.routes[0].name=auto",
        "gateway.config.routes[0].weights.steersman=9",
        "gateway.config.routes[0].weights.general=1",
        "gateway.config.embeddings[0].name=vectors",
        "gateway.config.embeddings[0].endpoints[0]=dns:///steersman-policy.ml.svc:50051",
    )
    config = load_model(GatewayConfig, config_of(documents, find, "gateway"), "gateway")
    assert config.policy.endpoints == ["dns:///steersman-policy.ml.svc:50051"]
    assert (config.models[0].name, config.models[0].policy.kind, config.fallback) == ("general", "openai", ["general"])
    assert config.routes[0].weights == {"steersman": 9, "general": 1}
    assert config.embeddings[0].endpoints == config.policy.endpoints
    policy = load_model(PolicyConfig, config_of(documents, find, "policy"), "policy")
    assert policy.embeddings is not None


def test_ticket_systems_are_values_and_their_secrets_environment(helm, find):
    documents = helm.render(
        "default",
        "gateway.config.inboxes[0].name=desk",
        "gateway.config.inboxes[0].type=zammad",
        "gateway.config.inboxes[0].url=https://desk.example.com",
        "gateway.config.inboxes[0].tokenEnv=ZAMMAD_TOKEN",
        "gateway.config.inboxes[0].secretEnv=ZAMMAD_SECRET",
        "gateway.envFrom[0].secretRef.name=desk",
    )
    config = load_model(GatewayConfig, config_of(documents, find, "gateway"), "gateway")
    assert [(inbox.name, inbox.reply) for inbox in config.inboxes] == [("desk", "note")]
    (container,) = find(documents, "Deployment", "gateway")["spec"]["template"]["spec"]["containers"]
    assert {"secretRef": {"name": "desk"}} in container["envFrom"]


@PROFILES
def test_the_databases_password_is_in_no_argument(helm, find, monkeypatch, profile):
    documents = helm.render(profile)
    for name, spec in pods(documents).items():
        for container in spec["containers"]:
            assert "DATABASE" not in json.dumps([container.get("command"), container.get("args")]), name
    config = load_model(GatewayConfig, config_of(documents, find, "gateway"), "gateway")
    monkeypatch.setenv("STEERSMAN_DATABASE", "postgresql+psycopg://u:pass-word@db/s")
    assert config.database_url == "postgresql+psycopg://u:pass-word@db/s"
    assert "pass-word" not in str(config)


@pytest.mark.parametrize("profile", ["default", "prod"])
def test_what_signs_sessions_may_lie_in_a_secret_of_its_own(helm, find, profile):
    documents = helm.render(profile, "gateway.signingSecret.name=signing")
    name = load_model(GatewayConfig, config_of(documents, find, "gateway"), "gateway").secret_env
    found = [
        variable["valueFrom"]["secretKeyRef"]
        for spec in pods(documents).values()
        for container in spec["containers"]
        for variable in container.get("env", [])
        if variable["name"] == name
    ]
    assert found == [{"name": "signing", "key": "secret"}]


def test_production_gateways_do_not_share_what_signs_sessions_through_the_database(helm, find):
    documents = helm.render("prod")
    assert load_model(GatewayConfig, config_of(documents, find, "gateway"), "gateway").secret_env
    spec = pods(documents)["ServingRuntime/steersman-chat"]
    variables = {v["name"]: v["valueFrom"] for c in spec["containers"] for v in c.get("env", []) if "valueFrom" in v}
    assert variables["STEERSMAN_SIGNING_SECRET"]["secretKeyRef"] == {"name": "steersman-signing", "key": "secret"}


@pytest.mark.parametrize("accept", [False, True])
def test_the_shared_policy_takes_weights_only_where_the_values_say(helm, find, accept):
    """Those of a run take them always: its token keeps other runs out."""
    documents = helm.render("default", f"policy.acceptWeights={str(accept).lower()}")
    config = load_model(PolicyConfig, config_of(documents, find, "policy"), "policy")
    assert config.weights_port == (50054 if accept else None)
    names = {port["name"] for port in find(documents, "Service", "policy")["spec"]["ports"]}
    assert ("grpc-weights" in names) == accept
    template = yaml.safe_load(find(documents, "ConfigMap", "controller")["data"]["policy.yaml"])
    container = template["spec"]["containers"][0]
    overrides = [word for word in container["args"] if "=" in word]
    assert (
        load_model(PolicyConfig, apply_overrides(config_of(documents, find, "policy"), overrides), "run").weights_port
        == 50054
    )
    assert 50054 in {port["containerPort"] for port in container["ports"]}


def test_cert_manager_makes_the_certificate_that_all_pods_show(helm, find):
    documents = helm.render("prod")
    spec = find(documents, "Certificate", "tls")["spec"]
    assert set(spec["dnsNames"]) >= {"localhost", "*.ml.svc"}
    assert set(spec["usages"]) == {"server auth", "client auth"}
    assert spec["issuerRef"] == {"name": "steersman", "kind": "ClusterIssuer"}
    mounted = {
        volume["secret"]["secretName"]
        for spec in pods(documents).values()
        for volume in spec["volumes"]
        if volume["name"] == "tls"
    }
    assert mounted == {spec["secretName"]} == {"steersman-tls"}
    config = load_model(ControllerConfig, config_of(documents, find, "controller"), "controller")
    assert config.run_tls is not None
    assert str(config.run_tls.ca) == "/etc/steersman/tls/ca.crt"
    several = helm.render("prod", "controller.namespaces={team-a}")
    assert {item["metadata"]["namespace"] for item in several if item["kind"] == "Certificate"} == {"ml", "team-a"}


def test_the_controller_is_ready_when_it_watches_and_the_test_may_ask_it(helm, find):
    documents = helm.render("default")
    container = find(documents, "Deployment", "controller")["spec"]["template"]["spec"]["containers"][0]
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "health"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "health"}
    assert ingress(find(documents, "NetworkPolicy", "controller"))[8080] == ["test"]
    ports = {port["name"]: port["port"] for port in find(documents, "Service", "controller")["spec"]["ports"]}
    assert ports == {"health": 8080, "metrics": 9090}
