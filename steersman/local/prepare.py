"""Brings base model and demo data to this machine, and decides device and precision once for the whole run.

A process of its own (`python -m steersman.local.prepare MANIFEST`), because it needs torch and the executor does not.
The answer is one JSON object in `prepared.json` beside the manifest: `for` (the name in the manifest), `base` (its
folder), `device`, `precision`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from steersman.artifacts import atomic_dir
from steersman.config.manifest import AlignmentRun, load_manifest
from steersman.errors import SteersmanError
from steersman.progress import ConsoleReporter


def main() -> None:
    manifest = Path(sys.argv[1])
    try:
        with ConsoleReporter("prepare") as reporter:
            prepare(load_manifest(manifest), manifest.parent, reporter)
    except SteersmanError as error:
        print(f"prepare: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def prepare(run: AlignmentRun, run_dir: Path, reporter: ConsoleReporter) -> None:
    """Writes `data/` for demo data, and `prepared.json` with base, device and precision."""
    if run.spec.data.demo is not None and not (run_dir / "data" / "manifest.json").is_file():
        reporter.note("generating the demo's data (synthetic)")
        _generate_demo(run, run_dir / "data")
    reporter.activity("loading libraries")
    from steersman.nn.hardware import pick_device, pick_precision
    from steersman.nn.prepare import resolve_model
    from steersman.rpc.server import ServerConfig

    model = run.spec.model
    base = resolve_model(model.base, ServerConfig().cache_dir, model.revision, note=reporter.note)
    device = pick_device(model.device)
    precision = pick_precision(model.precision, device)
    reporter.note(f"{model.base} in {precision} on {device}")
    partial = run_dir / ".prepared.json"
    partial.write_text(json.dumps({"for": model.base, "base": str(base), "device": device, "precision": precision}))
    partial.replace(run_dir / "prepared.json")


def _generate_demo(run: AlignmentRun, folder: Path) -> None:
    from steersman.demo import Sizes, generate

    demo = run.spec.data.demo
    assert demo is not None
    sizes = Sizes(**demo.model_dump())
    with atomic_dir(folder) as partial:
        generate(partial, run.spec.seed, sizes)


if __name__ == "__main__":
    main()
