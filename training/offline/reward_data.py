"""The rows of a reward model as token ids and labels, for one objective and one tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from steersman.config.manifest import RewardModelStage
from steersman.data.aspects import OWN_SCALE, on_scale
from steersman.data.records import Aspects, Message, Preference, Prompt, at, numbered_rows, plain_messages
from steersman.errors import DataError
from steersman.nn.reward import Aspect
from steersman.nn.tokens import IGNORE, conversation_parts
from training.offline.trl_setup import check_length


class RewardData:
    """Files of rows as tokens, for one objective and one tokenizer."""

    def __init__(self, spec: RewardModelStage, tokenizer: PreTrainedTokenizerBase) -> None:
        self._spec = spec
        self.tokenizer = tokenizer

    def tokens(self, row: Prompt, answer: Sequence[Message], where: str) -> tuple[list[int], int]:
        """Token ids of a row's prompt and an answer to it, and how many of them are the answer's."""
        with at(where):
            before, after = conversation_parts(self.tokenizer, plain_messages((*row.prompt, *answer)), row.tools)
        check_length(len(before) + len(after), self._spec.max_length, where)
        said = "\n".join(message.content for message in answer)
        return before + after, len(after) or len(self.tokenizer(said, add_special_tokens=False)["input_ids"])

    def pairs(self, path: Path) -> Dataset:
        """`chosen_ids`, `rejected_ids`, `soft_label` and, where the stage asks for it, `margin`."""
        rows = []
        for where, row in numbered_rows(path, Preference):
            pair: dict[str, Any] = {
                "chosen_ids": self.tokens(row, row.chosen, where)[0],
                "rejected_ids": self.tokens(row, row.rejected, where)[0],
                "soft_label": 1.0 if row.soft_label is None else row.soft_label,
            }
            if self._spec.margin:
                if row.margin is None:
                    raise DataError(f"{where}: margin is missing; add it, or set rewardModel.margin: false")
                pair["margin"] = row.margin
            rows.append(pair)
        return Dataset.from_list(rows)

    def judged(self, path: Path) -> Dataset:
        """`input_ids` and `labels` [1]: the share of people who preferred the answer, 1 or 0 where all agree."""
        rows = []
        for pair in self.pairs(path):
            rows.append({"input_ids": pair["chosen_ids"], "labels": [pair["soft_label"]]})
            rows.append({"input_ids": pair["rejected_ids"], "labels": [1.0 - pair["soft_label"]]})
        return Dataset.from_list(rows)

    def rated(self, path: Path, scales: dict[str, Aspect]) -> Dataset:
        """`input_ids` and `labels` [A]: standardised ratings, -100 where an aspect is not rated."""
        rows = []
        for where, row in numbered_rows(path, Aspects):
            ratings = ratings_of(row, scales, where)
            labels = [
                (ratings[name] - scale.mean) / scale.std if name in ratings else float(IGNORE)
                for name, scale in scales.items()
            ]
            if all(label == IGNORE for label in labels):
                raise DataError(f"{where}: aspects: none of {', '.join(scales)} is rated; add one or remove the row")
            rows.append({"input_ids": self.tokens(row, row.completion, where)[0], "labels": labels})
        return Dataset.from_list(rows)

    def aspect_scales(self, path: Path) -> dict[str, Aspect]:
        """Weight, mean and spread of every aspect of the stage; empty for the other objectives."""
        if self._spec.objective != "aspects":
            return {}
        rows = list(numbered_rows(path, Aspects))
        found = {}
        for name, weight in self._spec.aspects.items():
            rated = [(where, row) for where, row in rows if name in row.aspects]
            if not rated:
                known = ", ".join(sorted({key for _, row in rows for key in row.aspects}))
                raise DataError(f"{path.name}: no row rates the aspect {name!r} of the stage; the rows rate {known}")
            given = (row.scales[name] for _, row in rated if row.scales and name in row.scales)
            low, high = next(given, OWN_SCALE)
            aspect = Aspect(weight=weight, low=low, steps=high - low)
            values = np.array([ratings_of(row, {name: aspect}, where)[name] for where, row in rated])
            moments = {"mean": float(values.mean()), "std": float(values.std()) or 1.0}
            found[name] = aspect.model_copy(update=moments)
        return found


def ratings_of(row: Aspects, wanted: Mapping[str, Aspect], where: str) -> dict[str, float]:
    """A row's ratings of the wanted aspects, on their scales: two files may rate alike in other steps."""
    with at(where):
        return {
            name: on_scale(name, row.aspects[name], row.scales, aspect.scale)
            for name, aspect in wanted.items()
            if name in row.aspects
        }
