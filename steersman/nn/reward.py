"""A trained reward model: one or several sequence classifiers that give a conversation one number.

    raw_m    = score of member m, or of its aspects: sum_a weight_a rating_a 4 / steps_a, steps_a from the lowest to the
               highest rating, rating_a = std_a * output_a + mean_a; or what `decided` makes of their thresholds
    z_m      = (raw_m - mean_m) / std_m
    reward   = (combine_m(z_m) - mean) / std,   combine: mean or worst case of the members

Means and standard deviations are measured on a reference set when the model is trained, so that rewards have zero mean
and unit variance there, whatever the scale that the loss left free. They are stored in `reward.json` beside the
weights; training's evaluation and the reward service run this very code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from steersman.config.aspects import AspectThreshold
from steersman.config.base import FrozenModel
from steersman.errors import InvalidArgumentError
from steersman.nn.forward import is_decoder, trunk_of
from steersman.nn.render import Messages, Tools
from steersman.nn.tokens import conversation_parts

REWARD_FILE = "reward.json"


class Member(FrozenModel):
    folder: str
    """Model folder, relative to `reward.json`."""
    mean: float = 0.0
    """Mean of the member's raw reward on the reference set."""
    std: Annotated[float, Field(gt=0)] = 1.0
    """Its standard deviation there."""


class Aspect(FrozenModel):
    weight: float
    """Weight in the reward."""
    mean: float = 0.0
    """Mean of the ratings in the training data; the head learns (rating - mean) / std."""
    std: Annotated[float, Field(gt=0)] = 1.0
    """Their standard deviation."""
    low: float = 1.0
    """Lowest rating of the scale."""
    steps: Annotated[float, Field(gt=0)] = 4.0
    """From there to the highest."""

    @property
    def scale(self) -> tuple[float, float]:
        """Lowest and highest rating."""
        return self.low, self.low + self.steps

    @property
    def step_weight(self) -> float:
        """Of one step of the ratings: a whole scale counts as much as that of 1 to 5, as in a release."""
        return self.weight * 4.0 / self.steps


class RewardSettings(FrozenModel):
    """The content of `reward.json`."""

    name: str = "preference"
    """Name of the scorer."""
    objective: Literal["pairwise", "binary", "aspects"] = "pairwise"
    """What it was trained for."""
    aspects: dict[str, Aspect] = {}
    """In the order of the head's outputs; empty where there is one output."""
    decide: Literal["sum", "threshold", "lexicographic"] = "sum"
    """How aspects become one reward; see `decided`."""
    thresholds: list[AspectThreshold] = []
    """The most important first."""
    members: Annotated[list[Member], Field(min_length=1)] = [Member(folder=".")]
    """The models of an ensemble; one member is the usual case."""
    ensemble_mode: Literal["mean", "worst"] = "mean"
    """How the members' values become one reward."""
    mean: float = 0.0
    """Mean of the combined reward on the reference set."""
    std: Annotated[float, Field(gt=0)] = 1.0
    """Its standard deviation there."""
    max_length: int = 1024
    """Longest conversation in tokens."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of N conversations by M members; fp32 on the CPU."""

    reward: Tensor
    """[N], normalised."""
    members: Tensor
    """[M, N], raw."""
    aspects: Tensor | None
    """[N, A] in the unit of the ratings, mean over the members; None without aspects."""


class RewardModel:
    """Scores conversations. Not thread-safe.

    Args:
        settings: of `reward.json`.
        members: classifiers in evaluation mode, decoders with `skip_padding` where they can.
        tokenizer: of all members.
        precision: `bf16` runs matrix products under autocast; the head stays in fp32.
    """

    def __init__(
        self,
        settings: RewardSettings,
        members: Sequence[nn.Module],
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.settings = settings
        self.members = list(members)
        self.tokenizer = tokenizer
        self.device = device
        self._precision = precision

    def encode(self, messages: Messages, tools: Tools = None) -> list[int]:
        """Token ids of a conversation, prompt and answer.

        Raises:
            InvalidArgumentError: longer than the model was trained for.
        """
        prompt, answer = conversation_parts(self.tokenizer, messages, tools)
        return self.check_length(prompt + answer)

    def check_length(self, token_ids: list[int]) -> list[int]:
        """Returns the ids; InvalidArgumentError when they are more than the model was trained for."""
        if len(token_ids) > self.settings.max_length:
            raise InvalidArgumentError(
                f"the conversation has {len(token_ids)} tokens, reward model {self.settings.name} takes "
                f"{self.settings.max_length}; shorten it"
            )
        return token_ids

    @torch.inference_mode()
    def score(
        self,
        rows: Sequence[Sequence[int]],
        *,
        max_batch_tokens: int = 4096,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> Scores:
        """Scores rows of token ids.

        The result does not depend on the order of the rows or on the batches, beyond floating-point noise.

        Args:
            max_batch_tokens: padded tokens of a forward pass.
            on_batch: is told how many rows are done.
        """
        raw = torch.zeros(len(self.members), len(rows), max(1, len(self.settings.aspects)))
        done = 0
        for batch in batches_of(rows, max_batch_tokens, decoder=is_decoder(self.members[0])):
            inputs = pad_rows([rows[index] for index in batch], self.tokenizer.pad_token_id, self.device)
            for number, member in enumerate(self.members):
                with self._autocast():
                    raw[number, batch] = head_outputs(member, *inputs).float().cpu()
            done += len(batch)
            on_batch(done)
        return self.combine(raw)

    def combine(self, raw: Tensor) -> Scores:
        """Scores from the heads' outputs, fp32 [M, N, A or 1]."""
        settings = self.settings
        aspects = list(settings.aspects.values()) or [Aspect(weight=1.0)]
        ratings = raw * torch.tensor([a.std for a in aspects]) + torch.tensor([a.mean for a in aspects])
        weights = torch.tensor([a.step_weight for a in aspects])
        values = decided(settings, ratings) if settings.thresholds else ratings @ weights
        return Scores(
            reward=(combined(settings, values) - settings.mean) / settings.std,
            members=values,
            aspects=ratings.mean(0) if settings.aspects else None,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device, dtype=torch.bfloat16)


def decided(settings: RewardSettings, ratings: Tensor) -> Tensor:
    """One value [...] of the aspects' ratings [..., A] by thresholds, so that no sum outweighs one that is missed.

        s_a   = what the rating lacks to its limit (of a weight below 0: has beyond it), in spreads of the aspect
        last  = sigmoid(sum_a w_a (rating_a - mean_a) / sum_a |w_a| std_a),  w_a = weight_a 4 / steps_a   in (0, 1)
        value = exp(-s) where s > 0, else 1 + the value of what comes next

    with one s for all thresholds together (`threshold`: their sum) or each in its turn (`lexicographic`), as in the
    thresholded lexicographic ordering of Gabor, Kalmar and Szepesvari 1998: whatever misses an earlier threshold is
    worth less than what misses only later ones, and that less than what misses none.
    """
    names = list(settings.aspects)
    weights, means, stds = (
        torch.tensor(values, dtype=ratings.dtype)
        for values in zip(*((a.step_weight, a.mean, a.std) for a in settings.aspects.values()), strict=True)
    )
    value = ((ratings - means) @ weights / (weights.abs() * stds).sum()).sigmoid()
    lacks = []
    for threshold in settings.thresholds:
        place = names.index(threshold.aspect)
        sign = -1.0 if weights[place] < 0 else 1.0
        lacks.append((sign * (threshold.limit - ratings[..., place]) / stds[place]).clamp(min=0))
    for lack in reversed(lacks if settings.decide == "lexicographic" else [torch.stack(lacks).sum(0)]):
        value = torch.where(lack > 0, (-lack).exp(), 1 + value)
    return value


def combined(settings: RewardSettings, raw: Tensor) -> Tensor:
    """One value [N] from the members' raw rewards [M, N], each in units of its own spread."""
    means = torch.tensor([member.mean for member in settings.members])[:, None]
    stds = torch.tensor([member.std for member in settings.members])[:, None]
    scaled = (raw - means) / stds
    return scaled.amin(0) if settings.ensemble_mode == "worst" else scaled.mean(0)


def head_outputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Outputs [B, labels] of a classifier; a decoder is read at the last real token, found by length, never by id."""
    if not is_decoder(model):
        return model(input_ids=input_ids, attention_mask=attention_mask).logits
    hidden = trunk_of(model)(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    last = attention_mask.sum(1) - 1
    return model.score(hidden[torch.arange(len(last), device=last.device), last])  # type: ignore[operator]


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, device: str) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both int64 [B, L], padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids.to(device), mask.to(device)


def batches_of(rows: Sequence[Sequence[int]], max_tokens: int, *, decoder: bool) -> Iterator[list[int]]:
    """Indices of rows in batches whose padded size stays below `max_tokens`.

    Neighbours in a batch are answers to the same prompt for decoders, which run a common beginning once and skip
    padding; for encoders they are rows of similar length.
    """
    batch: list[int] = []
    width = 0
    for index in sorted(range(len(rows)), key=lambda index: list(rows[index]) if decoder else len(rows[index])):
        if not rows[index]:
            raise InvalidArgumentError(f"row {index} has no tokens; there is nothing to score")
        width = max(width, len(rows[index]))
        if batch and width * (len(batch) + 1) > max_tokens:
            yield batch
            batch, width = [], len(rows[index])
        batch.append(index)
    if batch:
        yield batch


def read_settings(folder: Path) -> RewardSettings:
    """Settings of a folder; the defaults where it is a plain classifier without `reward.json`."""
    path = folder / REWARD_FILE
    return RewardSettings.model_validate_json(path.read_bytes()) if path.is_file() else RewardSettings()


def write_settings(folder: Path, settings: RewardSettings) -> None:
    (folder / REWARD_FILE).write_text(settings.model_dump_json(indent=2, by_alias=False) + "\n")
