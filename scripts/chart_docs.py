"""Writes the chart's README from values.yaml, as helm-docs would: `python scripts/chart_docs.py [--check]`.

A line `# -- text` above a key is its description; keys without one are listed with their default only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parent.parent / "charts/steersman"
TARGET = CHART / "README.md"

_HEAD = """\
# steersman

{description}

Version {version}, for Kubernetes {kube}. `docs/deployment.md` goes from an empty cluster to a first aligned answer;
`values-cpu.yaml` is a trial without GPUs, `values-prod.yaml` a production cluster.

    helm upgrade --install steersman charts/steersman -n steersman --create-namespace -f values.yaml

The values below are made from `values.yaml`; `values.schema.json` refuses what is not listed.

| key | default | meaning |
|---|---|---|
"""


def rows(node: yaml.MappingNode, comments: dict[int, str], prefix: str = "") -> list[tuple[str, Any, str]]:
    """(key, default, description) of every leaf, in the order of the file."""
    found: list[tuple[str, Any, str]] = []
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        text = comments.get(key.start_mark.line, "")
        if isinstance(value, yaml.MappingNode) and value.value and not text and not value.flow_style:
            found += rows(value, comments, f"{name}.")
        elif isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            found.append((name, None, text))
            found += rows(value, comments, f"{name}.")
        else:
            found.append((name, _plain(value), text))
    return found


def _plain(node: yaml.Node) -> Any:
    return yaml.safe_load(yaml.serialize(node))


def descriptions(text: str) -> dict[int, str]:
    """Description by the line number of the key that follows it."""
    found: dict[int, str] = {}
    parts: list[str] = []
    for number, line in enumerate(text.splitlines()):
        stripped = line.strip()
        if stripped.startswith("# -- "):
            parts = [stripped[5:]]
        elif stripped.startswith("# ") and parts:
            parts.append(stripped[2:])
        else:
            if parts:
                found[number] = " ".join(parts)
            parts = []
    return found


def readme() -> str:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)
    lines = []
    for key, default, meaning in rows(root, descriptions(text)):
        shown = "" if default is None else f"`{json.dumps(default)}`"
        lines.append(f"| `{key}` | {shown} | {meaning.replace('|', '/')} |")
    head = _HEAD.format(description=chart["description"], version=chart["version"], kube=chart["kubeVersion"])
    return head + "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    wanted = readme()
    if "--check" in arguments:
        return 0 if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == wanted else 1
    TARGET.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
