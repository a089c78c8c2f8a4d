"""LLM judges of `steersman eval`: which target answered better, and do the judges agree with people?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path

from pydantic import TypeAdapter

from steersman.artifacts import storage_errors
from steersman.config.base import load_model, read_yaml
from steersman.data.records import Preference, numbered_rows, plain_messages
from steersman.errors import ConfigError
from steersman.judges.comparing import JudgeOfPairs, Rivals
from steersman.judges.licence import measure, people_agreement
from steersman.judges.options import Licence, LlmJudge
from steersman.report.schema import JudgeResult, LicenceResult
from steersman.rewards.judge import Compared
from steersman.suites.asked import Asked, SuiteResult

JUDGES_FILE = "judges.json"


def read_judges(paths: Sequence[Path]) -> dict[str, JudgeOfPairs]:
    """By name; ConfigError for a wrong field, or two of one name."""
    specs = [load_model(LlmJudge, read_yaml(path), str(path)) for path in paths]
    if len({spec.name for spec in specs}) < len(specs):
        raise ConfigError("two judges have the same name; give each its own")
    return {spec.name: JudgeOfPairs(spec) for spec in specs}


def ask_judges(
    judges: Mapping[str, JudgeOfPairs], results: Sequence[SuiteResult], people: Path | None, out: Path
) -> tuple[dict[str, JudgeResult], dict[str, LicenceResult]]:
    """What every judge says of every two targets' first answers to the same case; writes `judges.json`.

    Args:
        people: comparisons that people judged; None: no licence is measured.
    """
    licences = {name: _licence(judge, people) for name, judge in judges.items()} if people is not None else {}
    found = {name: judge.result(rivals(results, judge.spec.prompts)) for name, judge in judges.items()}
    if found:
        with storage_errors(out):
            text = TypeAdapter(dict[str, JudgeResult]).dump_json(found, indent=1)
            (out / JUDGES_FILE).write_bytes(text)
    return found, licences


def rivals(results: Sequence[SuiteResult], prompts: int) -> list[Rivals]:
    """The later target first; at most `prompts` cases of a suite and decoding."""
    found = []
    for other, one in combinations(results, 2):
        if (one.suite, one.decoding) != (other.suite, other.decoding) or one.target == other.target:
            continue
        first, second = _first(one), _first(other)
        for case in islice((case for case in first if case in second), prompts):
            key = f"{one.suite}/{one.decoding}/{case}"
            conversation = [{"role": "user", "content": first[case].question}]
            answers = first[case].answers[-1], second[case].answers[-1]
            found.append(Rivals(key, conversation, one.target, other.target, *answers))
    return found


def _first(result: SuiteResult) -> dict[str, Asked]:
    """The first answered sample of every case."""
    found: dict[str, Asked] = {}
    for one in result.asked:
        if one.answers:
            found.setdefault(one.case, one)
    return found


def _licence(judge: JudgeOfPairs, people: Path) -> LicenceResult:
    rows = [row for _, row in numbered_rows(people, Preference)]
    licence = Licence()

    def text(row: Preference, side: str) -> str:
        return str(plain_messages(getattr(row, side))[-1]["content"] or "")

    asked = rows[: licence.rows]
    said = judge.compare([(plain_messages(row.prompt), text(row, "chosen"), text(row, "rejected")) for row in asked])
    verdicts = [one.score for one in said if isinstance(one, Compared)]
    return measure(verdicts, licence, people_agreement(row.soft_label for row in rows))
