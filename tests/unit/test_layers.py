"""The shape of the code base: layers, a core without torch, stubs that match the contract."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_layers_hold(repo_root: Path) -> None:
    assert "0 broken" in run(str(BIN / "lint-imports"), "--no-cache", cwd=repo_root)


def test_the_contract_keeps_what_was_released(repo_root: Path, tmp_path: Path) -> None:
    """`make lint` compares with `proto/contract.binpb`; a field that goes is found."""
    released = str(repo_root / "proto/contract.binpb")
    run(str(BIN / "buf"), "breaking", "proto", "--against", released, cwd=repo_root)
    shutil.copytree(repo_root / "proto", tmp_path / "proto")
    chat = tmp_path / "proto/steersman/v1/chat.proto"
    chat.write_text(chat.read_text().replace("  string answer_id = 1;\n", "", 1))
    command = [str(BIN / "buf"), "breaking", "proto", "--against", released]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "answer_id" in found.stdout


WITHOUT_TORCH = [
    "steersman",
    "steersman.artifacts",
    "steersman.cli",
    "steersman.config",
    "steersman.data.records",
    "steersman.demo",
    "steersman.local.executor",
    "steersman.local.serve",
    "steersman.progress",
    "steersman.report",
    "steersman.rpc.client",
    "steersman.rpc.server",
    "services.gateway.__main__",
    "services.policy.__main__",
    "services.reference.__main__",
    "services.reward.__main__",
    "training.stage",
]


def test_imports_no_torch(repo_root: Path) -> None:
    """One interpreter imports them one after another and names the first that brings torch."""
    program = "import sys\nfor name in sys.argv[1:]:\n    __import__(name)\n    assert 'torch' not in sys.modules, name"
    run(sys.executable, "-c", program, *WITHOUT_TORCH, cwd=repo_root)


def test_a_gateway_and_a_probe_load_nothing_that_they_do_not_need(repo_root: Path) -> None:
    """MCP's SDK and JSON schemas take longer to load than a gateway without tools, and the manifest's models as long as
    a probe, which kubelets start all the time where TLS is."""
    dear = {"mcp", "jsonschema", "torch", "steersman.config.manifest"}
    program = f"import sys, steersman.rpc.probe, services.gateway.server; assert not {dear} & set(sys.modules)"
    run(sys.executable, "-c", program, cwd=repo_root)


def test_no_two_test_modules_share_a_name(repo_root: Path) -> None:
    """pytest imports them by their base name, and the second of a name ends the whole run."""
    named: dict[str, list[Path]] = {}
    for folder in ("tests", "charts"):
        for path in (repo_root / folder).rglob("*.py"):
            if path.name != "conftest.py" and not (path.parent / "__init__.py").exists():
                named.setdefault(path.name, []).append(path.relative_to(repo_root))
    assert len(named) > 100
    assert not [paths for paths in named.values() if len(paths) > 1]


def test_stubs_are_what_the_contract_generates(repo_root: Path, tmp_path: Path) -> None:
    protos = sorted(path.relative_to(repo_root / "proto").as_posix() for path in repo_root.glob("proto/**/*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    run(sys.executable, "-m", "grpc_tools.protoc", "-Iproto", *outputs, *protos, cwd=repo_root)
    generated = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*_pb2*")}
    committed = {
        path.relative_to(repo_root): path.read_bytes()
        for path in (repo_root / "steersman" / "v1").iterdir()
        if "_pb2" in path.name
    }
    assert sorted(generated) == sorted(committed), "run make proto"
    assert [name for name in generated if generated[name] != committed[name]] == [], "run make proto"


def test_the_contract_is_clean(repo_root: Path) -> None:
    run(str(BIN / "buf"), "lint", "proto", cwd=repo_root)
