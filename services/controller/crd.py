"""The CustomResourceDefinition of AlignmentRun, generated from the pydantic models.

`python -m services.controller.crd` writes it into the chart, `--check` compares (exit 1 when it differs). The result
is a structural OpenAPI v3 schema: no references, no `anyOf`, nullable instead of a null branch. It carries no
defaults: the stored manifest stays as sparse as it was written, and the models stay the only home of defaults.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic.alias_generators import to_camel

from services.controller.status import RunStatus
from steersman.config.algorithms import block_of, blocks
from steersman.config.manifest import AlignmentRun, RlStage

GROUP = "steersman.dev"
PLURAL = "alignmentruns"
CHART_FILE = Path(__file__).resolve().parents[2] / "charts/steersman/templates/crds/alignmentruns.yaml"

IMMUTABLE = ("seed", "model", "data", "stages", "services", "artifacts")
"""Fields of the spec that decide the result; changing them mid-run would mix two experiments."""

_MAX_STAGES = 32
_COPIED = (
    "type",
    "description",
    "enum",
    "minimum",
    "maximum",
    "pattern",
    "format",
    "minItems",
    "maxItems",
    "minLength",
    "maxLength",
)

Json = dict[str, Any]


def structural(node: Json, definitions: Json) -> Json:
    """Turns one node of a pydantic JSON schema into structural OpenAPI v3.

    Raises:
        ValueError: the schema uses a construct that has no structural form.
    """
    if "$ref" in node:
        target = definitions[node["$ref"].rpartition("/")[2]]
        node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
    if "anyOf" in node:
        return _union(node, definitions)
    if "const" in node:
        node = {**node, "enum": [node["const"]]}
    unknown = set(node) - {
        *_COPIED, "title", "default", "const", "properties", "required", "items", "additionalProperties",
        "propertyNames", "exclusiveMinimum", "exclusiveMaximum",
    }  # fmt: skip
    if unknown:
        raise ValueError(f"no structural form for {sorted(unknown)} in {node}")
    out: Json = {key: node[key] for key in _COPIED if key in node}
    for bound in ("Minimum", "Maximum"):
        if f"exclusive{bound}" in node:
            out[bound.lower()] = node[f"exclusive{bound}"]
            out[f"exclusive{bound}"] = True
    if "items" in node:
        out["items"] = structural(node["items"], definitions)
    if node.get("type") == "object":
        out.update(_object(node, definitions))
    if "description" in out:
        out["description"] = _describe(out["description"], node)
    if "type" not in out:
        out["x-kubernetes-preserve-unknown-fields"] = True
    return out


def _object(node: Json, definitions: Json) -> Json:
    if "properties" in node:
        out: Json = {"properties": {name: structural(child, definitions) for name, child in node["properties"].items()}}
        if node.get("required"):
            out["required"] = node["required"]
        return out
    value = node.get("additionalProperties", True)
    if "propertyNames" in node:  # a mapping whose keys are known
        child = structural(value, definitions)
        return {"properties": dict.fromkeys(node["propertyNames"]["enum"], child)}
    if isinstance(value, dict) and value:
        return {"additionalProperties": structural(value, definitions)}
    return {"x-kubernetes-preserve-unknown-fields": True}


def _union(node: Json, definitions: Json) -> Json:
    """`X | None` becomes nullable X; a union of several types is accepted as it comes (the controller checks it)."""
    branches = [branch for branch in node["anyOf"] if branch.get("type") != "null"]
    rest = {key: value for key, value in node.items() if key != "anyOf"}
    if len(branches) == 1:
        out = structural({**branches[0], **rest}, definitions)
    else:
        out = {"x-kubernetes-preserve-unknown-fields": True}
        if "description" in rest:
            out["description"] = _describe(rest["description"], rest)
    if len(branches) < len(node["anyOf"]):
        out["nullable"] = True
    return out


def _describe(text: str, node: Json) -> str:
    """One paragraph; a plain default is named in the text, because the schema carries none."""
    text = " ".join(text.split())
    default = node.get("default")
    if isinstance(default, (str, int, float)) and not isinstance(default, bool):
        return f"{text} Default: {default}."
    return f"{text} Default: {str(default).lower()}." if isinstance(default, bool) else text


def _schema_of(model: type[AlignmentRun] | type[RunStatus]) -> Json:
    schema = model.model_json_schema(by_alias=True, mode="validation")
    return structural({key: value for key, value in schema.items() if key != "$defs"}, schema.get("$defs", {}))


def _rule(rule: str, message: str) -> Json:
    return {"rule": rule, "message": message}


def _unchanged(field: str) -> Json:
    """A transition rule: the field may be neither added, removed nor changed."""
    return _rule(
        f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})",
        f"spec.{field} decides the result and cannot change; start another run",
    )


def _belongs_to(method: str) -> Json:
    """A method's own options belong to no other method."""
    block = to_camel(block_of(method))
    chosen = f"has(self.algorithm) && self.algorithm == '{method}'"
    if method == RlStage.model_fields["algorithm"].default:
        chosen = f"!has(self.algorithm) || self.algorithm == '{method}'"
    return _rule(f"!has(self.{block}) || {chosen}", f"{block}.* has no meaning for this algorithm; remove it")


def _add_rules(spec: Json) -> None:
    """One key a stage; CEL: what must not change, and what a canary needs."""
    stages = spec["properties"]["stages"]
    stages["maxItems"] = _MAX_STAGES  # bounds the estimated cost of the rules below
    stage = stages["items"]
    # Not by CEL, to which a null is an absent field (`- evaluate:` means the defaults).
    stage["minProperties"] = stage["maxProperties"] = 1
    stage["properties"]["release"]["x-kubernetes-validations"] = [
        _rule(
            "!has(self.canary) || has(self.inferenceService) || has(self.deployment)",
            "canary needs inferenceService or deployment: what serves the bot, and whose traffic is split",
        ),
        _rule(
            "!(has(self.inferenceService) && has(self.deployment))",
            "a release has an inferenceService or a deployment, not both",
        ),
    ]
    stage["properties"]["rl"]["x-kubernetes-validations"] = [_belongs_to(name) for name in blocks()]
    spec["x-kubernetes-validations"] = [_unchanged(field) for field in IMMUTABLE]


def _empty_stages(stage: Json) -> None:
    """`- evaluate:` without a value means the defaults, in a cluster as in a file."""
    for child in stage["properties"].values():
        child["nullable"] = True


def crd() -> Json:
    """The complete CustomResourceDefinition."""
    run = _schema_of(AlignmentRun)
    spec = run["properties"]["spec"]
    _empty_stages(spec["properties"]["stages"]["items"])
    _add_rules(spec)
    root: Json = {
        "type": "object",
        "description": run["description"],
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": _schema_of(RunStatus),
        },
        "x-kubernetes-validations": [
            _rule("self.metadata.name.size() <= 53", "metadata.name must have at most 53 characters"),
            _rule(
                "self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
                "metadata.name must be a DNS label: lower-case letters, digits and '-'",
            ),
        ],
    }
    columns = [
        ("Phase", "string", ".status.phase", 0),
        ("Stage", "string", ".status.stage", 0),
        ("Step", "integer", ".status.step", 0),
        ("Steps", "integer", ".status.totalSteps", 1),
        ("Reward", "number", ".status.reward", 0),
        ("KL", "number", ".status.kl", 0),
        ("Traffic", "integer", ".status.release.percent", 1),
        ("Message", "string", ".status.message", 1),
        ("Age", "date", ".metadata.creationTimestamp", 0),
    ]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": "AlignmentRun",
                "listKind": "AlignmentRunList",
                "plural": PLURAL,
                "singular": "alignmentrun",
                "shortNames": ["arun"],
                "categories": ["steersman"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": "v1alpha1",
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {"name": name, "type": kind, "jsonPath": path, "priority": priority}
                        for name, kind, path, priority in columns
                    ],
                    "schema": {"openAPIV3Schema": root},
                }
            ],
        },
    }


_HEAD = """\
{{- /* Generated by `python -m services.controller.crd`; do not edit. */ -}}
{{- if .Values.crds.install }}
"""
_ANNOTATIONS = """\
  annotations:
    {{- if .Values.crds.keep }}
    helm.sh/resource-policy: keep
    {{- end }}
    steersman.dev/chart: {{ .Chart.Name }}
    {{- with .Values.commonAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  labels:
    {{- include "steersman.labels" (dict "root" . "component" "crd") | nindent 4 }}
"""


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def chart_template() -> str:
    """The CRD as a chart template: braces of Go templates escaped, the keep switch added."""
    body = yaml.dump(crd(), Dumper=_NoAliases, sort_keys=False, width=120, allow_unicode=True)
    if "{{" in body:
        raise ValueError("a description contains '{{', which Helm would execute")
    name = f"  name: {PLURAL}.{GROUP}\n"
    return _HEAD + body.replace(name, name + _ANNOTATIONS, 1) + "{{- end }}\n"


def main(arguments: list[str]) -> int:
    wanted = chart_template()
    if "--check" in arguments:
        same = CHART_FILE.is_file() and CHART_FILE.read_text(encoding="utf-8") == wanted
        if not same:
            print(f"{CHART_FILE.name} differs from the models; run python -m services.controller.crd", file=sys.stderr)
        return 0 if same else 1
    CHART_FILE.parent.mkdir(parents=True, exist_ok=True)
    CHART_FILE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
