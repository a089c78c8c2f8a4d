"""`steersman run` with real processes: whole runs, kills and continuation, bad input.

One unbroken run of a tiny model is made once; the others start from copies of its folder. Commands begin by fork of a
process that has the libraries loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from judge_endpoint import judging
from loaded import Loaded

from steersman.local.serve import find_model
from steersman.report.schema import read_evaluation
from steersman.testing.models import save_model_folder, tiny_llama, tiny_tokenizer

STEPS = 6
GENERATION = {"maxNewTokens": 8}
OWN_REWARD = '''
def likes_length(prompts, completions, record, **kwargs):
    """`record` is one of the facts of the rows."""
    assert len(prompts) == len(completions) == len(record)
    assert all(isinstance(facts, dict) for facts in record)
    return [float(len(completion[0]["content"])) for completion in completions]
'''
MANIFEST: dict[str, Any] = {
    "apiVersion": "steersman.dev/v1alpha1",
    "kind": "AlignmentRun",
    "metadata": {"name": "tiny"},
    "spec": {
        "model": {"base": "base", "precision": "fp32", "threads": 1},
        "services": {"startTimeoutSeconds": 1800},
        "data": {"demo": {"demonstrations": 16, "preferences": 16, "prompts": 12, "heldoutPrompts": 8}},
        "stages": [
            {"sft": {"maxSteps": 2, "batchSize": 4, "microBatchSize": 4}},
            {"rewardModel": {"maxSteps": 2, "batchSize": 4, "microBatchSize": 4}},
            {
                "rl": {
                    "steps": STEPS,
                    "promptsPerStep": 2,
                    "samplesPerPrompt": 2,
                    "generation": GENERATION,
                    "deterministic": True,
                    "reward": {"verifiable": [{"python": "mine:likes_length"}]},
                }
            },
            {
                "evaluate": {
                    "generation": GENERATION | {"temperature": 0},
                    "checks": [{"name": "demo-rubric"}],
                    "suites": ["short.jsonl"],
                    "gates": {"noEos": 1, "suites": 0.1, "kl": 1000},
                }
            },
            {"release": {}},
        ],
    },
}
KEYS = {
    *("seconds", "peak_memory_gib", "reward", "rlhf_minus_sft", "rubric", "rm_accuracy", "length_baseline"),
    *("kl", "no_eos", "logprob_mismatch", "seed"),
}

pytestmark = pytest.mark.timeout(1800)


def write(folder: Path, manifest: dict[str, Any]) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(manifest))
    case = {"messages": [{"role": "user", "content": "Hello"}], "expect": {"maxWords": 50}}
    (folder / "short.jsonl").write_text("".join(json.dumps({"id": name} | case) + "\n" for name in "ab"))
    return path


def arguments(folder: Path) -> list[str]:
    return ["run", "-f", str(folder / "run.yaml"), "--run-dir", str(folder / "run")]


def weights(folder: Path) -> str:
    """Hash of the aligned model."""
    return json.loads((folder / "run" / "rl" / "complete.json").read_text())["files"]["model/model.safetensors"]


def no_process_of(folder: Path) -> bool:
    """Whether nothing is left that was started for this folder."""
    return not [p.pid for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]


def nothing_is_left(folder: Path) -> None:
    """Neither a process of the run nor the folder in memory through which weights went."""
    assert no_process_of(folder / "run")
    url = yaml.safe_load((folder / "run" / "services" / "policy-0.yaml").read_text())["artifactUrls"][0]
    assert not Path(url.removeprefix("file://")).exists()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, loaded: Loaded) -> Path:
    """A folder with a base model, a manifest, and the complete run of it."""
    folder = tmp_path_factory.mktemp("unbroken")
    save_model_folder(folder / "base", tiny_llama())
    (folder / "mine.py").write_text(OWN_REWARD)
    manifest = json.loads(json.dumps(MANIFEST))
    with judging() as endpoint:
        judge = {"name": "llm", "url": endpoint.url, "model": "m", "rubric": "Be long.", "prompts": 3}
        manifest["spec"]["stages"][-2]["evaluate"]["judges"] = [judge]
        write(folder, manifest)
        done = loaded.run(*arguments(folder), "--check", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


@pytest.fixture
def before_rl(unbroken: Path, tmp_path: Path) -> Path:
    """The same with the reward model complete and reinforcement learning to come, in the same place of the disk."""
    folder = tmp_path / "copy"
    later = ("rl", "evaluate", "release", "report", "services", "logs")
    shutil.copytree(unbroken, folder, ignore=shutil.ignore_patterns(*later))
    manifest = json.loads(json.dumps(MANIFEST))
    # The folder is another one, the model and so the digest are not.
    manifest["spec"]["model"]["base"] = str(unbroken / "base")
    del manifest["spec"]["stages"][-2:]
    write(folder, manifest)
    return folder


def steps(folder: Path) -> list[dict[str, Any]]:
    """The rows of reinforcement learning, which are those of all steps, once each."""
    rows = [json.loads(line) for line in (folder / "run" / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return rows


def test_a_run_ends_with_all_numbers_and_artifacts(unbroken: Path) -> None:
    lines = (unbroken / "stdout").read_text().splitlines()
    numbers = json.loads(lines[-1])
    assert set(numbers) >= KEYS
    assert set(numbers["reward"]) == {"base", "sft", "rlhf"}
    assert numbers["logprob_mismatch"] < 1e-4
    assert {"prepare", "services", "sft", "reward-model", "rl", "evaluate", "total"} <= set(numbers["seconds"])
    assert numbers["peak_memory_gib"] > 0.1
    run = unbroken / "run"
    for stage in ("sft", "reward-model", "rl", "evaluate"):
        assert (run / stage / "config.yaml").is_file()
        assert (run / stage / "complete.json").is_file()
    assert any(row["reward_likes_length"] > 0 for row in steps(unbroken))
    assert (run / "rl" / "adapter" / "adapter_config.json").is_file()
    assert (run / "report" / "report.html").is_file()
    assert any(line.startswith(f"rl  [##########] step {STEPS}/{STEPS}  reward ") for line in lines)
    assert "file:///dev/shm/" in (run / "services" / "policy-0.yaml").read_text()
    evaluation = read_evaluation(run / "evaluate" / "evaluation.json")
    assert [(result.target, result.decoding) for result in evaluation.suites] == [
        ("base", "greedy"),
        ("sft", "greedy"),
        ("rlhf", "greedy"),
    ]
    assert all(one.answers and one.tokens for result in evaluation.suites for one in result.asked)
    assert evaluation.data
    assert evaluation.date
    # Of three models every two, on three prompts; the judge's licence was measured on the held-out comparisons.
    judged = evaluation.judges["llm"]
    assert len(judged.pairs) == 9
    assert judged.failures == 0
    assert set(evaluation.licences) == {"preference", "llm"}
    assert all(licence.accuracy is not None for licence in evaluation.licences.values())
    assert {found["gate"]: found["passed"] for found in json.loads((run / "evaluate" / "gates.json").read_text())} == {
        "noEos": True,
        "suites.short": True,
        "kl": True,
    }
    assert no_process_of(run)


def test_a_run_with_a_release_stage_ends_with_a_model_to_serve(unbroken: Path) -> None:
    release = unbroken / "run" / "release"
    pointer = json.loads((release / "release.json").read_text())
    assert pointer["model"] == str(release / "model")
    assert (release / "model" / "README.md").is_file()
    assert not (release / "model" / "adapter_config.json").exists()
    served, name, _ = find_model(unbroken / "run")
    assert name == "tiny"
    assert (served / "model.safetensors").read_bytes() == (release / "model" / "model.safetensors").read_bytes()


def test_a_complete_run_is_not_run_again(unbroken: Path, loaded: Loaded) -> None:
    written = (unbroken / "run" / "rl" / "complete.json").stat().st_mtime_ns
    done = loaded.run(*arguments(unbroken), "--check", cwd=unbroken)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("sft", "reward-model", "rl", "evaluate"):
        assert f"{stage}  is complete" in done.stdout
    assert (unbroken / "run" / "rl" / "complete.json").stat().st_mtime_ns == written
    assert "services  " not in done.stdout


class Watched:
    """A run in progress that tells its events."""

    def __init__(self, folder: Path, loaded: Loaded) -> None:
        environment = os.environ | {"STEERSMAN_PROGRESS": "json"}
        self.process = loaded.start(*arguments(folder), cwd=folder, environment=environment)

    def events(self) -> Iterator[dict[str, Any]]:
        for line in self.process.stdout:
            if line.startswith("{"):
                yield json.loads(line)

    def child(self, module: str) -> psutil.Process:
        def runs_it(child: psutil.Process) -> bool:
            with contextlib.suppress(psutil.Error):  # one that has just ended has no command line
                return module in child.cmdline()
            return False

        return next(filter(runs_it, psutil.Process(self.process.pid).children(recursive=True)))

    def wait(self) -> tuple[int, str]:
        _, errors = self.process.communicate()
        return self.process.wait(), errors


@pytest.fixture
def watch(loaded: Loaded) -> Iterator[Callable[[Path], Watched]]:
    started: list[Watched] = []

    def start(folder: Path) -> Watched:
        started.append(Watched(folder, loaded))
        return started[-1]

    yield start
    for watched in started:
        watched.process.kill()
        watched.process.communicate()


def test_killed_services_a_stopped_run_and_a_killed_trainer_end_with_the_same_weights(
    unbroken: Path, before_rl: Path, watch: Callable[[Path], Watched], loaded: Loaded
) -> None:
    """Services die and come back; then the run is stopped, goes on, and its trainer dies. Nothing is left behind."""
    victims = {1: ["services.policy"], 2: ["services.reward", "services.reference"]}
    broken = watch(before_rl)
    notes = []
    for event in broken.events():
        if event["event"] == "progress" and event["stage"] == "rl":
            for victim in victims.pop(event["step"], []):
                broken.child(victim).kill()
            if event["step"] == 3:
                broken.process.send_signal(signal.SIGTERM)
        if event["event"] == "note" and event["stage"] == "services":
            notes.append(event["text"])
    code, errors = broken.wait()
    assert (code, errors) == (130, "steersman: stopped\n")
    assert not victims
    for name in ("policy-0", "reward-0", "reference-0"):
        assert any(note.startswith(f"{name} ended (killed by signal 9") for note in notes)
    nothing_is_left(before_rl)

    broken = watch(before_rl)
    for event in broken.events():
        if event["event"] == "progress" and event["stage"] == "rl":
            broken.child("training.stage").kill()
            break
    code, errors = broken.wait()
    assert code == 128 + signal.SIGKILL
    assert errors.startswith("steersman: rl was killed by signal 9")
    assert "start the run again, it continues there" in errors
    nothing_is_left(before_rl)

    done = loaded.run(*arguments(before_rl), cwd=before_rl)
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps(before_rl)
    assert weights(before_rl) == weights(unbroken)


def test_two_workers_train_as_one_also_after_a_kill_that_nobody_hears_of(
    unbroken: Path, before_rl: Path, watch: Callable[[Path], Watched], loaded: Loaded
) -> None:
    """`trainer.workers: 2` runs the stage under torchrun with FSDP2; kill -9 of the run takes everything with it."""
    manifest = yaml.safe_load((before_rl / "run.yaml").read_text())
    manifest["spec"]["trainer"] = {"workers": 2}
    write(before_rl, manifest)
    broken = watch(before_rl)
    for event in broken.events():
        if event["event"] == "progress" and event["stage"] == "rl" and event["step"] == 2:
            broken.process.kill()
            break
    assert broken.wait()[0] == -signal.SIGKILL
    # Nobody is left to wait for those whom the kernel ends, so it may take a moment.
    end = time.monotonic() + 60
    while not no_process_of(before_rl / "run") and time.monotonic() < end:
        time.sleep(0.1)
    assert no_process_of(before_rl / "run")

    done = loaded.run(*arguments(before_rl), cwd=before_rl)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 0 of 2" in done.stdout
    for expected, found in zip(steps(unbroken), steps(before_rl), strict=True):
        for name in ("policy_loss", "value_loss", "reward", "kl", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], abs=1e-4, rel=1e-4), (found["step"], name)


def test_an_interrupt_while_services_load_leaves_nothing_behind(
    before_rl: Path, watch: Callable[[Path], Watched]
) -> None:
    stopped = watch(before_rl)
    for event in stopped.events():
        if event["stage"] == "services":
            break
    assert not no_process_of(before_rl / "run")
    stopped.process.send_signal(signal.SIGINT)
    assert stopped.wait() == (130, "steersman: stopped\n")
    nothing_is_left(before_rl)


def changed(**spec: Any) -> dict[str, Any]:
    manifest = json.loads(json.dumps(MANIFEST))
    manifest["spec"] |= spec
    return manifest


class TestBadInput:
    """Each ends with one sentence and a code, and leaves no half-written artifact under its final name."""

    @pytest.fixture(autouse=True)
    def _forked(self, loaded: Loaded) -> None:
        self.loaded = loaded

    @pytest.fixture
    def folder(self, unbroken: Path, tmp_path: Path) -> Path:
        (tmp_path / "base").symlink_to(unbroken / "base")
        (tmp_path / "mine.py").write_text(OWN_REWARD)
        return tmp_path

    def refused(self, folder: Path, code: int, *words: str, file_kib: int = 0) -> None:
        done = self.loaded.run(*arguments(folder), cwd=folder, file_kib=file_kib)
        assert done.returncode == code, done.stdout + done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        for word in words:
            assert word in done.stderr
        for stage in ("sft", "reward-model", "rl"):
            assert not (folder / "run" / stage / "model").exists()
            assert not (folder / "run" / stage / "complete.json").exists()
        assert no_process_of(folder / "run")

    def test_wrong_field(self, folder: Path) -> None:
        write(folder, changed(stages=[{"sft": {"maxstep": 2}}]))
        self.refused(folder, 2, "spec.stages.0.sft.maxstep is not a known field", "did you mean 'maxSteps'?")

    def test_an_own_reward_that_is_not_there(self, folder: Path) -> None:
        stage = {"rl": {"algorithm": "rloo", "reward": {"verifiable": [{"python": "mine:likes_odd"}]}}}
        write(folder, changed(stages=[stage]))
        words = ("stage rl: reward.verifiable: python:", "mine.py has no function likes_odd")
        self.refused(folder, 2, *words)
        assert not (folder / "run" / "services").exists()

    def test_missing_data_file(self, folder: Path) -> None:
        write(folder, changed(data={"demonstrations": {"train": "nope.jsonl"}}, stages=[{"sft": {}}]))
        self.refused(folder, 2, "spec.data.demonstrations.train:", "nope.jsonl does not exist")

    def test_row_without_an_answer(self, folder: Path) -> None:
        good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        bad = {"messages": [{"role": "user", "content": "a"}]}
        (folder / "rows.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
        write(folder, changed(data={"demonstrations": {"train": "rows.jsonl"}}, stages=[{"sft": {}}]))
        self.refused(folder, 2, "rows.jsonl:2: messages:")

    def test_tokenizer_that_does_not_match_the_weights(self, folder: Path) -> None:
        (folder / "base").unlink()
        save_model_folder(folder / "base", tiny_llama(vocab_size=100), tiny_tokenizer())
        write(folder, changed())
        self.refused(folder, 2, "the tokenizer does not match the weights")

    def test_prompt_longer_than_the_context(self, folder: Path) -> None:
        row = {"prompt": [{"role": "user", "content": "long " * 200}]}
        (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
        reward = {"verifiable": [{"name": "regex", "options": {"pattern": "a"}}]}
        stage = {"rl": {"algorithm": "rloo", "generation": GENERATION, "reward": reward}}
        write(folder, changed(data={"prompts": {"train": "rows.jsonl"}}, stages=[stage]))
        self.refused(folder, 2, "rows.jsonl:1:", "tokens")

    def test_reward_service_down(self, folder: Path) -> None:
        services = {"reward": {"endpoints": ["127.0.0.1:9"]}, "startTimeoutSeconds": 2}
        stage = {"rl": {"algorithm": "rloo", "generation": GENERATION}}
        write(folder, changed(stages=[stage], services=services))
        self.refused(folder, 9, "RewardService", "127.0.0.1:9")

    def test_full_disk_while_saving(self, folder: Path) -> None:
        # A limit on the size of a file is refused like a full disk; logs and data stay below it, weights do not.
        write(folder, changed(stages=[MANIFEST["spec"]["stages"][0]]))
        self.refused(folder, 11, "disk full while saving", "free at least", file_kib=80)
