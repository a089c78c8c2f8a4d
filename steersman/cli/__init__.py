"""The command line: `steersman --help`. Heavy imports happen inside the commands, so that help is fast."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from steersman.artifacts import refusal
from steersman.cli import cluster, data, doctor, evaluation, init, runs, tracking, validate
from steersman.cli.options import JsonOption

if TYPE_CHECKING:
    from steersman.config.manifest import AlignmentRun

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
model_app = typer.Typer(help="Models on this machine.", no_args_is_help=True)
app.add_typer(data.app, name="data")
app.add_typer(model_app, name="model")
app.add_typer(cluster.app)
for command in (init.init, doctor.doctor, runs.runs, tracking.track, validate.validate):
    app.command()(command)
app.command(name="eval")(evaluation.evaluate)
app.command(name="eval-live")(evaluation.evaluate_live)
app.command(name="eval-reward")(evaluation.evaluate_reward)
app.command()(evaluation.compare)

STOPPED = 130
"""Exit code of a process that was interrupted, as shells have it."""
_EXTRA_OF_LIBRARY = {
    "engine": ("torch", "transformers", "peft", "safetensors", "accelerate", "gguf"),
    "training": ("trl", "datasets"),
    "knowledge": ("lm_eval",),
    "tracking": ("mlflow", "tensorboard", "wandb"),
    "data": ("matplotlib", "py3langid", "scipy"),
    "gateway": ("fastapi", "uvicorn", "kserve", "httpx", "mcp", "jwt", "prometheus_client"),
    "controller": ("kopf", "kubernetes"),
}


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"steersman {version('steersman')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """From human feedback to a chatbot that answers the way people prefer."""


def main() -> NoReturn:
    """Entry point: an error is one sentence on standard error, and its exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        app()
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        extra = next((extra for extra, names in _EXTRA_OF_LIBRARY.items() if library in names), None)
        if extra is None:
            raise
        _fail(f"this command needs {library}; pip install 'steersman[{extra}]'", 2)
    except SystemExit as ended:
        if ended.code == STOPPED:  # what typer makes of KeyboardInterrupt
            _fail("stopped", STOPPED)
        raise
    except Exception as error:
        # Errors of the tree and failed stages carry an exit code; everything else is a defect and keeps its trace.
        told = refusal(error) or error
        code = getattr(told, "exit_code", None)
        if code is None:
            raise
        _fail(str(told), code)
    raise SystemExit(0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"steersman: {message}", file=sys.stderr)
    raise SystemExit(code)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


@app.command()
def run(
    file: Annotated[Path, typer.Option("--file", "-f", help="The manifest (kind: AlignmentRun).")],
    set_: Annotated[list[str], typer.Option("--set", metavar="spec.a.b=c", help="Override; repeatable.")] = [],  # noqa: B006
    run_dir: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show stages and resolved manifest; do nothing.")] = False,
    force_restart: Annotated[bool, typer.Option(help="Do changed stages, and those after them, again.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the aligned model afterwards.")] = False,
    check: Annotated[bool, typer.Option("--check", help="End with the numbers as one line of JSON.")] = False,
) -> None:
    """Executes a manifest on this machine; a run that was stopped continues where it was."""
    from steersman.config.manifest import load_manifest
    from steersman.errors import ConfigError
    from steersman.local import folder

    manifest = load_manifest(file, set_)
    where = (run_dir or Path("runs") / manifest.metadata.name).absolute()
    if where.exists() and not where.is_dir():
        raise ConfigError(f"--run-dir {where}: is a file; name a folder")
    resolved = folder.resolve(manifest, where, file.absolute().parent)
    if dry_run:
        _show_plan(resolved, where, force_restart=force_restart)
        return
    from steersman.local.executor import run_manifest

    run_manifest(resolved, where, force_restart=force_restart)
    if serve:
        from steersman.local.serve import serve as serve_model

        serve_model(where, where / "services")
    if check:
        print(json.dumps(_numbers(resolved, where)), flush=True)


def _numbers(run: AlignmentRun, run_dir: Path) -> dict[str, Any]:
    """The run's summary; on the demo's data also what its chat answers to fifty first questions."""
    path = run_dir / "summary.json"
    numbers: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if run.spec.data.demo is not None and numbers:
        from steersman.local.first_questions import ask_first_questions

        numbers["first_questions"] = ask_first_questions(run, run_dir)
        numbers |= _knowledge(run_dir)
        path.write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    return numbers


def _knowledge(run_dir: Path) -> dict[str, Any]:
    """What the demo's models know, where the questions are on this machine; it stands in the report, too."""
    from steersman.local.executor import conclude
    from steersman.local.knowledge import ask_demo_knowledge
    from steersman.local.usage import Usage

    asked = ask_demo_knowledge(run_dir)
    if asked is None:
        return {}
    conclude(run_dir, Usage(run_dir / "usage.json"), again=asked)
    found: dict[str, Any] = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    return {name: value for name, value in found.items() if name == "knowledge"}


def _show_plan(run: AlignmentRun, run_dir: Path, *, force_restart: bool) -> None:
    """Stages with their state and services, then the manifest with all defaults."""
    from steersman.config.base import dump_yaml
    from steersman.config.stages import check_data_files, read_complete
    from steersman.local import folder
    from steersman.local.services import services_of

    check_data_files(run, run_dir)
    conflict = folder.find_conflict(run, run_dir)
    if conflict is not None and not force_restart:
        raise conflict.error(run_dir)
    names = run.stage_names()
    stale = names[names.index(conflict.stage) :] if conflict else []
    print(f"# run folder: {run_dir}")
    for name in names:
        if name in stale:
            state = "to do again"
        elif read_complete(run_dir, name):
            state = "complete"
        else:
            state = "begun, continues" if (run_dir / name / "metrics.jsonl").is_file() else "to do"
        services = ", ".join(service.name for service in services_of(run, name, run_dir, run_dir / "base"))
        print(f"# {name:<20} {state:<18} {'with ' + services if services else ''}".rstrip())
    print(dump_yaml(run), end="")


@app.command()
def serve(
    path: Annotated[Path, typer.Argument(help="A model folder, or a run's folder.")],
    port: Annotated[int, typer.Option(help="REST port; the next free one where it is taken.", min=1, max=65535)] = 8080,
    grpc_port: Annotated[
        int, typer.Option(help="gRPC port; the next free one where it is taken.", min=1, max=65535)
    ] = 8081,
    store: Annotated[
        str | None,
        typer.Option(help="SQLite file or database URL for answers and feedback; a run keeps its own, feedback.db."),
    ] = None,
    candidate: Annotated[
        Path | None, typer.Option(help="Another model folder or run, served beside it and judged against it.")
    ] = None,
    percent: Annotated[int, typer.Option(help="The candidate's share of the conversations.", min=1, max=99)] = 50,
) -> None:
    """Serves a model on 127.0.0.1: OpenAI-compatible API and a chat page."""
    import tempfile

    from steersman.local.serve import serve as serve_model

    beside: dict[str, Any] = {"store": store, "candidate": candidate, "percent": percent}
    if (path / "manifest.yaml").is_file():
        serve_model(path, path.absolute() / "services", port, grpc_port, **beside)
    else:
        with tempfile.TemporaryDirectory(prefix="steersman-serve-") as logs:
            serve_model(path, Path(logs), port, grpc_port, **beside)


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="Base model: a folder, a hub id or smollm2-135m-instruct.")],
    adapter: Annotated[Path, typer.Argument(help="Adapter folder in PEFT format.")],
    out: Annotated[Path, typer.Argument(help="New folder for the whole model.")],
) -> None:
    """Merges an adapter into its base: a plain folder that transformers and vLLM load."""
    from steersman.errors import ConflictError

    if out.exists():
        raise ConflictError(f"{out} exists already; name a new folder")
    from steersman.nn.lora import merge_to_folder

    merge_to_folder(_resolve_model(base), adapter, out)
    print(out)


@model_app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="A folder, a hub id or the embedded default.")] = "smollm2-135m-instruct",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = None,
) -> None:
    """Brings a model to this machine, checks it and prints its folder."""
    print(_resolve_model(name, revision))


def _resolve_model(name: str, revision: str | None = None) -> Path:
    from steersman.home import cache_folder
    from steersman.nn.prepare import resolve_model
    from steersman.progress import say

    return resolve_model(name, cache_folder(), revision, note=lambda text: say("prepare", text))


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder with an evaluation.")], as_json: JsonOption = False
) -> None:
    """Draws a run's report again and prints its table."""
    from steersman.errors import NotFoundError
    from steersman.local.executor import conclude
    from steersman.local.usage import Usage

    if not any(run_dir.glob("evaluate*/evaluation.json")):
        raise NotFoundError(f"{run_dir} has no evaluation.json; run a manifest with an evaluate stage first")
    conclude(run_dir, Usage(run_dir / "usage.json"), again=True, show=not as_json)
    if as_json:
        from steersman.cli.shapes import Report, print_json

        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        print_json(Report(str(run_dir / "report" / "report.html"), summary))
