"""The CRD: made from the models, structural, with rules that hold and refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cel_expr_python import cel
from pydantic.alias_generators import to_camel

from services.controller.crd import IMMUTABLE, chart_template, crd, main, structural
from steersman.gates import GATES

EXAMPLES = sorted((Path(__file__).resolve().parents[3] / "examples").glob("*/run*.yaml"))
ALLOWED = {
    "type", "description", "properties", "required", "items", "additionalProperties", "enum", "minimum", "maximum",
    "exclusiveMinimum", "exclusiveMaximum", "pattern", "format", "minItems", "maxItems", "minProperties",
    "maxProperties", "minLength", "maxLength", "nullable", "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-validations",
}  # fmt: skip


def schema() -> dict[str, Any]:
    return crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def walk(node: dict[str, Any], path: str = ""):
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from walk(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            yield from walk(node[key], f"{path}[]")


def test_the_chart_holds_what_the_models_say(chart):
    assert main(["--check"]) == 0, "run python -m services.controller.crd"
    assert chart_template() == (chart / "templates/crds/alignmentruns.yaml").read_text()


def test_the_schema_is_structural():
    """https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema"""
    for path, node in walk(schema()):
        assert set(node) <= ALLOWED, f"{path}: {set(node) - ALLOWED}"
        assert "type" in node or node.get("x-kubernetes-preserve-unknown-fields"), path
        assert not ("properties" in node and "additionalProperties" in node), path
        if "exclusiveMinimum" in node:
            assert node["exclusiveMinimum"] is True, path
    free = {path.rpartition(".")[2] for path, node in walk(schema()) if "x-kubernetes-preserve-unknown-fields" in node}
    gates = {to_camel(name) for name in GATES}  # a bare number or options, as targetModules is a text or a list
    assert free <= {"options", "targetModules", "templateOptions"} | gates, "free-form only where the models are"
    kubernetes_validate.validate(crd(), "1.37", strict=True)


def test_unknown_constructs_are_refused():
    with pytest.raises(ValueError, match="no structural form"):
        structural({"type": "object", "patternProperties": {}}, {})


def as_json_schema(node: dict[str, Any]) -> dict[str, Any]:
    """The structural schema as JSON Schema that refuses unknown fields, as `kubectl --validate=strict` does."""
    out = {key: value for key, value in node.items() if not key.startswith(("x-", "exclusive")) and key != "nullable"}
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if node.get(exclusive):
            out[exclusive] = out.pop(bound)
    if "properties" in node:
        out["properties"] = {name: as_json_schema(child) for name, child in node["properties"].items()}
        out["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            out[key] = as_json_schema(node[key])
    if node.get("type") == "object" and not {"properties", "additionalProperties"} & set(node):
        out.pop("additionalProperties", None)
    return {"anyOf": [out, {"type": "null"}]} if node.get("nullable") else out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_every_example_is_accepted_by_the_schema(path):
    document = yaml.safe_load(path.read_text())
    if document.get("kind") == "AlignmentRun":
        jsonschema.Draft202012Validator(as_json_schema(schema())).validate(document)
        assert problems(document) == []


def test_a_wrong_field_is_refused_by_the_schema():
    document = {"spec": {"data": {"demo": {}}, "stages": [{"sft": {"epochz": 1}}]}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(as_json_schema(schema())).validate(document)


def evaluate(rule: str, **values: Any) -> bool:
    environment = cel.NewEnv(variables=dict.fromkeys(values, cel.Type.DYN))
    return bool(environment.compile(rule).eval(data=values).value())


def as_cel_sees(value: Any) -> Any:
    """To the API server's CEL a null field of an object is absent (k8s.io/apiserver/pkg/cel/common, `lookup`)."""
    if isinstance(value, dict):
        return {key: as_cel_sees(child) for key, child in value.items() if child is not None}
    return [as_cel_sees(child) for child in value] if isinstance(value, list) else value


def problems(new: dict[str, Any], old: dict[str, Any] | None = None) -> list[str]:
    """Messages of the rules and bounds that a document breaks, as the API server would collect them."""
    found: list[str] = []

    def check(node: dict[str, Any], value: Any, before: Any) -> None:
        if value is None:
            return
        if isinstance(value, dict) and len(value) < node.get("minProperties", 0):
            found.append(f"must have at least {node['minProperties']} properties")
        if isinstance(value, dict) and len(value) > node.get("maxProperties", len(value)):
            found.append(f"must have at most {node['maxProperties']} properties")
        seen, seen_before = as_cel_sees(value), as_cel_sees(before)
        for rule in node.get("x-kubernetes-validations", []):
            if "oldSelf" in rule["rule"]:
                if before is not None and not evaluate(rule["rule"], self=seen, oldSelf=seen_before):
                    found.append(rule["message"])
            elif not evaluate(rule["rule"], self=seen):
                found.append(rule["message"])
        for name, child in node.get("properties", {}).items():
            if isinstance(value, dict) and name in value:
                check(child, value[name], (before or {}).get(name))
        for item in value if isinstance(value, list) else []:
            check(node.get("items", {}), item, None)

    check(schema(), new, old)
    return found


RUN = {
    "metadata": {"name": "demo"},
    "spec": {"seed": 1, "data": {"demo": {}}, "stages": [{"sft": {}}, {"rl": {"steps": 2}}]},
}


def changed(**spec: Any) -> dict[str, Any]:
    return {**RUN, "spec": {**RUN["spec"], **spec}}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (changed(stages=[{"sft": {}, "rl": {}}]), "at most 1 properties"),
        (changed(stages=[{}]), "at least 1 properties"),
        (changed(stages=[{"sft": None, "rl": {}}]), "at most 1 properties"),
        (changed(stages=[{"release": {"canary": {}}}]), "canary needs inferenceService or deployment"),
        (changed(stages=[{"rl": {"algorithm": "grpo", "ppo": {}}}]), "no meaning for this algorithm"),
        ({**RUN, "metadata": {"name": "x" * 54}}, "at most 53 characters"),
        ({**RUN, "metadata": {"name": "a.b"}}, "DNS label"),
    ],
)
def test_rules_refuse(document, words):
    assert problems(RUN) == []
    assert any(words in message for message in problems(document))


def test_an_empty_stage_means_its_defaults():
    assert problems(changed(stages=[{"sft": None}, {"evaluate": None}])) == []


@pytest.mark.parametrize("field", IMMUTABLE)
def test_what_decides_the_result_cannot_change(field):
    values = {
        "seed": 2,
        "model": {"base": "other"},
        "data": {"demo": {"prompts": 3}},
        "stages": [{"sft": {}}],
        "services": {"policy": {"replicas": 2}},
        "artifacts": "s3://elsewhere",
    }
    assert any(f"spec.{field}" in message for message in problems(changed(**{field: values[field]}), RUN))
    if field not in ("data", "stages"):
        removed = copy.deepcopy(changed(**{field: values[field]}))
        removed["spec"].pop(field)
        assert any(f"spec.{field}" in message for message in problems(removed, changed(**{field: values[field]})))


@pytest.mark.parametrize("field", ["suspend", "activeDeadlineSeconds", "ttlSecondsAfterFinished", "trainer"])
def test_what_only_decides_where_and_when_may_change(field):
    values = {"suspend": True, "activeDeadlineSeconds": 5, "ttlSecondsAfterFinished": 5, "trainer": {"backoffLimit": 9}}
    assert problems(changed(**{field: values[field]}), RUN) == []


def test_printer_columns_show_the_state():
    columns = {item["name"]: item["jsonPath"] for item in crd()["spec"]["versions"][0]["additionalPrinterColumns"]}
    assert {"Phase", "Stage", "Step", "Reward", "KL", "Age"} <= set(columns)
    status = schema()["properties"]["status"]["properties"]
    for path in columns.values():
        parts = path.removeprefix(".").split(".")
        if parts[0] == "status":
            assert parts[1] in status
    assert crd()["spec"]["versions"][0]["subresources"] == {"status": {}}
