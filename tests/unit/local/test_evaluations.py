"""What an evaluate stage lacks is said before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from local_helpers import manifest

from steersman.errors import SteersmanError
from steersman.local.evaluations import check_evaluations

CASE = "cases: [{id: a, messages: [{role: user, content: Hello}], expect: {maxWords: 9}}]"


def check(tmp_path: Path, **evaluate: Any) -> None:
    (tmp_path / "shop.yaml").write_text(f"name: shop\n{CASE}\n")
    (tmp_path / "leaks.yaml").write_text(f"name: leaks\nkind: leak\n{CASE}\n")
    stages = [{"sft": {}}, {"rewardModel": {}}, {"rl": {}}, {"evaluate": evaluate}]
    check_evaluations(manifest(stages=stages), tmp_path)


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({"suites": ["nowhere.yaml"]}, "nowhere.yaml"),
        ({"suites": ["shop.yaml", "shop.yaml"]}, "two suites have the name shop"),
        ({"gates": {"leaks": 0}, "suites": ["shop.yaml"]}, "gates.leaks looks at suites of the kind leak"),
        ({"gates": {"latency": 2}}, "gates.latency looks at suites, which the stage does not have"),
        ({"gates": {"suites": {"each": {"shpo": 0.5}}}, "suites": ["shop.yaml"]}, "did you mean 'shop'"),
        ({"gates": {"criteria": 0}}, "gates.criteria looks at checks"),
        ({"gates": {"knowledge": 0.03}}, "gates.knowledge looks at knowledge"),
        ({"gates": {"reward": {"against": "champion"}}}, "gates.reward looks at champion"),
        ({"champion": "served"}, "served is no model folder"),
        ({"gates": {"winRate": {"judge": "lmm"}},
          "judges": [{"name": "llm", "url": "http://h/v1", "model": "m", "rubric": "r"}]}, "did you mean 'llm'"),
        ({"judges": [{"name": "llm", "url": "http://h/v1", "model": "m", "rubric": "r", "apiKeyEnv": "NO_SUCH_KEY"}]},
         "evaluate.judges.llm.apiKeyEnv: the environment variable NO_SUCH_KEY is not set"),
        ({"knowledge": {"folder": "questions"}}, "evaluate.knowledge: "),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(tmp_path: Path, evaluate: dict[str, Any], said: str) -> None:
    with pytest.raises(SteersmanError) as told:
        check(tmp_path, **evaluate)
    assert said in str(told.value)


def test_what_is_there_passes(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "config.json").write_text("{}")
    check(tmp_path)
    check(
        tmp_path, suites=["shop.yaml", "leaks.yaml"], champion="served", checks=[{"name": "demo-rubric"}],
        gates={"leaks": 0, "latency": 2, "suites": {"each": {"shop": 0.5}}, "winRate": {"against": "champion"},
               "criteria": 0, "reward": 0},
    )  # fmt: skip
