"""The command line: help, plans, one-sentence errors with their exit codes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from steersman.cli import main

RUN = """
apiVersion: steersman.dev/v1alpha1
kind: AlignmentRun
metadata: {name: a-run}
spec:
  data: {demo: {}}
  stages: [{sft: }, {rewardModel: }, {rl: }, {evaluate: }]
"""


Steersman = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def steersman(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Steersman:
    """The command in this process."""

    def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["steersman", *arguments])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, errors = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), out, errors)

    return run


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    (tmp_path / "stage.yaml").write_text(RUN.replace("{rl: }", "{ppo: {}}"))
    (tmp_path / "twice.yaml").write_text(f"{RUN}kind: Another\n")
    return path


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from steersman.cli import app\n"
        "assert CliRunner().invoke(app, ['run', '--help']).exit_code == 0\n"
        "heavy = set('torch transformers scipy matplotlib pandas kubernetes fastapi'.split()) & set(sys.modules)\n"
        "raise SystemExit(f'imported: {heavy}' if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_dry_run_shows_stages_services_and_every_default(manifest: Path, tmp_path: Path, steersman: Steersman) -> None:
    done = steersman("run", "-f", str(manifest), "--dry-run", "--set", "spec.stages.rl.steps=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "# rl                   to do              with policy-0, reward-0, reference-0" in done.stdout
    assert "steps: 3" in done.stdout
    assert "missingEosPenalty: 1.0" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["run", "-f", "nope.yaml"], 2, "steersman: nope.yaml: there is no such file; check the path"),
        (["run", "-f", "run.yaml", "--set", "spec.seed=-1"], 2, "run.yaml: spec.seed is -1"),
        (["run", "-f", "run.yaml", "--set", "spec.stages.rl.step=3"], 2, "did you mean 'steps'?"),
        (["run", "-f", "run.yaml", "--set", "spec.stages.rl.algorithm=poo"], 2, "did you mean 'ppo'?"),
        (["run", "-f", "stage.yaml"], 2, "ppo is not a known field (it is a value of rl.algorithm"),
        (["run", "-f", "twice.yaml"], 2, "twice.yaml:8: not valid YAML (the key 'kind' stands here twice; keep one)"),
        (["run", "-f", "run.yaml", "--run-dir", "run.yaml"], 2, "run.yaml: is a file; name a folder"),
        (["serve", "."], 4, "is neither a model folder (config.json) nor a run's folder (manifest.yaml)"),
        (["report", "."], 4, "has no evaluation.json"),
        (["merge", "nobody/nothing/x", "a", "b"], 4, "is neither a folder, nor a hub id"),
        (["merge", "x", "a", "run.yaml"], 5, "run.yaml exists already"),
        (["model", "prepare", "/nope"], 4, "'/nope' is neither a folder"),
    ],
)
def test_an_error_is_one_sentence_with_its_exit_code(
    arguments: list[str], code: int, sentence: str, manifest: Path, tmp_path: Path, steersman: Steersman
) -> None:
    done = steersman(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_command_that_is_installed_says_the_same(manifest: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("steersman")), "run", "-f", "stage.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("steersman: stage.yaml: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"  # as if it were not installed
        "sys.argv = ['steersman', 'model', 'prepare']\n"
        "from steersman.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "steersman: this command needs torch; pip install 'steersman[engine]'\n"
