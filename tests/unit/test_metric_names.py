"""The reference of training's metrics knows no name that nobody writes; `stage_context.Recorder` sees to the rest."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from steersman.metric_names import EVALUATE, EVERY_STAGE, FROM_FILES, ILQL, ONLINE, REJECTION_SAMPLING, is_known

ROOT = Path(__file__).resolve().parents[2]


def sources(*packages: str) -> str:
    """The text of what writes metrics; of libraries their trainers, without importing them."""
    files = [*(ROOT / "training").rglob("*.py"), ROOT / "steersman/progress.py"]
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        folder = Path(spec.origin).parent
        files += [*folder.glob("trainer*.py"), *folder.glob("trainer/*_trainer.py")]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


OURS = sources()
WITH_LIBRARIES = sources("trl", "transformers")


@pytest.mark.parametrize("name", [*EVERY_STAGE, *ILQL, *ONLINE, *REJECTION_SAMPLING, *EVALUATE])
def test_our_own_code_writes_it(name: str) -> None:
    if name.endswith("_NAME"):
        assert f'f"{name.removesuffix("NAME")}{{' in OURS
    elif name.startswith("mismatch_"):
        assert f'"{name.removeprefix("mismatch_")}"' in OURS
        assert 'f"mismatch_{' in OURS
    else:
        assert f'"{name}"' in OURS or f" {name}=" in OURS, name


@pytest.mark.parametrize("name", FROM_FILES)
def test_a_trainer_writes_it(name: str) -> None:
    assert f'"{name}"' in WITH_LIBRARIES, name


def test_a_name_that_is_not_listed_is_not_known() -> None:
    assert all(is_known(name) for name in ("reward", "reward_regex", "eval_loss", "eval_runtime", "watch_second"))
    assert not any(is_known(name) for name in ("rewards", "eval_nothing", "kl_", ""))
