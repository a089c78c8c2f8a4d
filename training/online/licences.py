"""Whether reward models and LLM judges agree with people well enough to reward and to gate (`spec.licence`)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from steersman.config.manifest import RewardMix
from steersman.config.stages import reward_model_folders
from steersman.data.records import Preference, numbered_rows, plain_messages
from steersman.judges.comparing import JudgeOfPairs
from steersman.judges.licence import enforce, measure, missing, people_agreement
from steersman.nn.tokens import prompt_and_answer_ids
from steersman.report.schema import LicenceResult
from steersman.rewards.judge import Compared
from training.context import StageContext
from training.online.connect import Services
from training.online.remote import calls
from training.online.rollout import Prompt, score_item


def check_rewards(
    context: StageContext, services: Services, mix: RewardMix, what: str = "reward"
) -> dict[str, LicenceResult]:
    """Licences of everything learned that has a weight in the reward: warns of what has none, or refuses.

    The run's own reward models were measured by their stage; LLM judges, and reward models of services that run
    already, score the rows of `data.preferences` here. Computed rewards need none: they say what they check.

    Raises:
        FailedPreconditionError: one has none, and `spec.licence.without` is `refuse`.
    """
    judges = {reward.name for reward in mix.verifiable if (reward.type or reward.name) == "judge" and reward.weight}
    own = reward_model_folders(context.run, context.name, context.run_dir)
    found: dict[str, LicenceResult] = {}
    asked: list[str] = []
    for scorer in services.reward[0].info().scorers:
        if not scorer.weight:
            continue
        if scorer.name in own:
            found[scorer.name] = _of_stage(context, own[scorer.name])
        elif scorer.kind == "model" or scorer.name in judges:
            asked.append(scorer.name)
    if asked:
        found |= _by_service(context, services, asked)
    enforce(found, context.spec.licence, context.reporter.note, what)
    return found


def check_judge(context: StageContext, judge: JudgeOfPairs) -> LicenceResult:
    """The licence of an evaluation's LLM judge."""
    rows = judged_rows(context)
    if not rows:
        return missing("it was not compared with people: add data.preferences.heldout")
    said = judge.compare([(plain_messages(row.prompt), _text(row, "chosen"), _text(row, "rejected")) for row in rows])
    verdicts = [one.score for one in said if isinstance(one, Compared)]
    return measure(verdicts, context.spec.licence, _people(context))


def judged_rows(context: StageContext) -> list[Preference]:
    """The first rows that people judged and nothing was trained on."""
    path = _file(context)
    rows = (row for _, row in numbered_rows(path, Preference)) if path is not None else iter(())
    return list(islice(rows, context.spec.licence.rows))


def _file(context: StageContext) -> Path | None:
    files = context.data.get("preferences")
    return None if files is None else files.heldout or files.validation


def _people(context: StageContext) -> float | None:
    path = _file(context)
    return None if path is None else people_agreement(row.soft_label for _, row in numbered_rows(path, Preference))


def _of_stage(context: StageContext, folder: Path) -> LicenceResult:
    path = context.run_dir / folder.relative_to(context.run_dir).parts[0] / "evaluation.json"
    measured = json.loads(path.read_text()) if path.is_file() else {}
    pairs: Sequence[dict[str, float]] = measured.get("pairs", ())
    verdicts = [_verdict(pair["chosen"], pair["rejected"]) for pair in pairs]
    return measure(verdicts, context.spec.licence, _people(context))


def _by_service(context: StageContext, services: Services, names: Sequence[str]) -> dict[str, LicenceResult]:
    rows = judged_rows(context)
    context.reporter.activity(f"comparing {', '.join(names)} with people on {len(rows)} rows")
    items = []
    for row in rows:
        messages = plain_messages(row.prompt)
        for side in ("chosen", "rejected"):
            answer = {"role": "assistant", "content": _text(row, side)}
            ids = prompt_and_answer_ids(services.tokenizer, messages, answer, services.stop_ids, row.tools)
            prompt, said = (np.asarray(part, dtype=np.int32) for part in ids)
            facts = json.dumps(row.known()) if row.known() else ""
            items.append(score_item(Prompt(prompt, messages, facts, tools=row.tools), said, answer["content"]))
    scores = calls().run(services.reward[0].score(items)) if items else []
    found = {}
    for name in names:
        values = [score.parts.get(name, math.nan) for score in scores]
        pairs = [pair for pair in zip(values[::2], values[1::2], strict=True) if all(map(math.isfinite, pair))]
        found[name] = measure([_verdict(*pair) for pair in pairs], context.spec.licence, _people(context))
    return found


def _verdict(chosen: float, rejected: float) -> float:
    return 0.5 if chosen == rejected else float(chosen > rejected)


def _text(row: Preference, side: str) -> str:
    """The last assistant turn."""
    return str(plain_messages(getattr(row, side))[-1]["content"] or "")
