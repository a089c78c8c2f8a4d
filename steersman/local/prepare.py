"""Brings base model and data to this machine, checks every row, and decides device and precision for the whole run.

A process of its own (`python -m steersman.local.prepare MANIFEST`), because it needs torch and the executor does not.
The answer is one JSON object in `prepared.json` beside the manifest: `for` (the name in the manifest), `base` (its
folder), `device`, `precision`, `data` (digests of the checked files).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from steersman.artifacts import atomic_dir
from steersman.config.manifest import AlignmentRun, load_manifest
from steersman.config.stages import data_files
from steersman.data.records import file_digest
from steersman.errors import ConfigError, SteersmanError
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
    """Writes `data/` for demo data, and `prepared.json`; a wrong row is found before any training starts."""
    if run.spec.data.demo is not None and not (run_dir / "data" / "manifest.json").is_file():
        reporter.note("generating the demo's data (synthetic)")
        _generate_demo(run, run_dir / "data")
    checked = _check_rows(run, run_dir, reporter)
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
    found = {"for": model.base, "base": str(base), "device": device, "precision": precision, "data": checked}
    partial.write_text(json.dumps(found))
    partial.replace(run_dir / "prepared.json")


def _check_rows(run: AlignmentRun, run_dir: Path, reporter: ConsoleReporter) -> dict[str, str]:
    from steersman.data import records

    kinds: dict[str, type[records.Row]] = {
        "demonstrations": records.Demonstration,
        "preferences": records.Preference,
        "prompts": records.Prompt,
        "feedback": records.Feedback,
        "aspects": records.Aspects,
    }
    for kind, splits in data_files(run, run_dir).items():
        for path in splits.values():
            for number, _ in enumerate(records.read_jsonl(path, kinds[kind]), start=1):
                if number % 1000 == 0:
                    reporter.activity(f"checking {path.name}, row {number:,}")
    return data_digests(run, run_dir)


def data_digests(run: AlignmentRun, run_dir: Path) -> dict[str, str]:
    """SHA-256 of every data file by its path; ConfigError where one is missing."""
    digests = {}
    for kind, splits in data_files(run, run_dir).items():
        for split, path in splits.items():
            if not path.is_file():
                raise ConfigError(f"spec.data.{kind}.{split}: {path} does not exist; check the path in the manifest")
            digests[str(path)] = file_digest(path)
    return digests


def _generate_demo(run: AlignmentRun, folder: Path) -> None:
    from steersman.demo import Sizes, generate

    demo = run.spec.data.demo
    assert demo is not None
    sizes = Sizes(**demo.model_dump())
    with atomic_dir(folder) as partial:
        generate(partial, run.spec.seed, sizes)


if __name__ == "__main__":
    main()
