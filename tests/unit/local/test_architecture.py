"""A model that would be computed wrongly is found before anything is spent; `steersman validate` says so."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from loaded import Loaded
from transformers import AutoModelForCausalLM, RobertaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from steersman.config.manifest import AlignmentRun
from steersman.errors import ConfigError
from steersman.local.architecture import check_architectures
from steersman.nn.tiny import tiny_model
from steersman.testing.models import save_model_folder, tiny_llama


class Heard:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def activity(self, text: str) -> None: ...


def run_of(base: Path, *stages: dict) -> AlignmentRun:
    return AlignmentRun.model_validate(
        {
            "apiVersion": "steersman.dev/v1alpha1",
            "kind": "AlignmentRun",
            "metadata": {"name": "checked"},
            "spec": {
                "model": {"base": str(base)},
                "data": {"demonstrations": {"train": "demonstrations.jsonl"}},
                "stages": list(stages) or [{"sft": {}}],
            },
        }
    )


def test_a_plain_architecture_is_announced_and_its_verdict_is_kept(tmp_path: Path, monkeypatch) -> None:
    base = save_model_folder(tmp_path / "base", tiny_model(AutoModelForCausalLM, CONFIG_MAPPING["bloom"]()))
    heard = Heard()
    check_architectures(run_of(base), base, tmp_path, heard)  # type: ignore[arg-type]
    (note,) = heard.notes
    assert note.startswith("BloomForCausalLM runs in the plain way, which is slower (its log-probabilities differ")
    kept = json.loads((tmp_path / "architectures.json").read_text())
    assert [one["outcome"] for one in kept.values()] == ["plain"]
    monkeypatch.setattr("steersman.local.architecture.causal_verdict", lambda config: pytest.fail("computed again"))
    check_architectures(run_of(base), base, tmp_path, heard)  # type: ignore[arg-type]
    (tmp_path / "architectures.json").write_text("{")
    monkeypatch.undo()
    check_architectures(run_of(base), base, tmp_path, heard)  # type: ignore[arg-type]
    assert heard.notes == [note] * 3


def test_a_model_that_no_path_computes_is_refused(tmp_path: Path) -> None:
    RobertaConfig(vocab_size=96, is_decoder=True, architectures=["RobertaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"spec\.model\.base: RobertaForCausalLM cannot be used: .*one linear layer"):
        check_architectures(run_of(tmp_path), tmp_path, tmp_path, Heard())  # type: ignore[arg-type]


@pytest.mark.parametrize(("targets", "said"), [
    (["q_proj", "dt_proj"], "names dt_proj, whose weight JambaForCausalLM reads itself"),
    (["nothing"], r"\['nothing'\] does not fit the model"),
])  # fmt: skip
def test_an_adapter_that_would_do_nothing_is_refused_before_anything_is_spent(tmp_path: Path, targets, said) -> None:
    base = save_model_folder(tmp_path / "base", tiny_model(AutoModelForCausalLM, CONFIG_MAPPING["jamba"]()))
    run = run_of(base, {"sft": {"lora": {"targetModules": targets}}})
    with pytest.raises(ConfigError, match=rf"spec\.stages\.0\.sft\.lora\.targetModules {said}"):
        check_architectures(run, base, tmp_path, Heard())  # type: ignore[arg-type]


def test_validate_finds_what_a_run_would_find_later(tmp_path: Path, loaded: Loaded) -> None:
    def validate() -> subprocess.CompletedProcess[str]:
        return loaded.run(
            "validate", "-f", str(manifest), cwd=tmp_path, environment=os.environ | {"HOME": str(tmp_path)}
        )

    base = save_model_folder(tmp_path / "base", tiny_llama())
    manifest = tmp_path / "run.yaml"
    manifest.write_text(json.dumps(run_of(base).model_dump(mode="json", by_alias=True)))
    missing = validate()
    assert missing.returncode == ConfigError.exit_code
    assert "demonstrations.jsonl does not exist" in missing.stderr.splitlines()[-1]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "demonstrations.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    good = validate()
    assert good.returncode == 0, good.stderr
    assert good.stdout.splitlines()[-1].endswith("run.yaml: valid, 1 stages: sft")
    assert "sft: 1 step, at least " in good.stdout
    assert "LlamaForCausalLM runs without padding" in good.stdout + good.stderr
