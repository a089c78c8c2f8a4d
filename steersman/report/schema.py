"""What an evaluation stage writes: `evaluation.json`."""

import math
import re
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steersman.errors import DataError, NotFoundError, why
from steersman.inference import paired_bootstrap
from steersman.report.overoptimisation import Look
from steersman.report.wins import Duel
from steersman.statistics import (
    CalibrationBin,
    Comparison,
    Interval,
    calibration_bins,
    cluster_means,
    compare,
    expected_calibration_error,
    mean_interval,
)
from steersman.suites.asked import SuiteResult


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class Message(_Frozen):
    """One message of a chat."""

    role: str
    content: str


def prompt_of(prompt_id: str) -> str:
    """The prompt's own id, without the number of the sample."""
    return re.sub(r"#\d+$", "", prompt_id)


class Sample(_Frozen):
    """One answer of one model to one prompt."""

    prompt_id: str
    """Of prompt and sample, `ID#NUMBER`: the same for every model, comparisons are paired by it. Answers whose ids
    differ only in the number are answers to one prompt."""
    prompt: tuple[Message, ...]
    answer: str
    reward: float | None
    """Score of the reward model; null where scoring failed."""
    rubric: dict[str, float] = Field(default_factory=dict)
    """Criteria of the exact rubric and their `total`; empty where no rubric applies."""
    scores: dict[str, float] = Field(default_factory=dict)
    """What every scorer said by itself, where there are several."""
    kl: float | None = None
    """KL to the reference policy, summed over the answer's tokens, in nats (the k1 estimate)."""
    length: int = Field(ge=0)
    """Tokens of the answer, EOS included."""
    finish_reason: str
    """`stop` when the answer ended with EOS, `length` when it was cut."""


class PairScore(_Frozen):
    """A held-out comparison as the reward model scores it."""

    chosen: float
    rejected: float
    margin: float | None = None
    """How clear the humans' preference was, if the data says."""


class RewardModelEvaluation(_Frozen):
    """The reward model on held-out comparisons, beside what length alone predicts."""

    pairs: tuple[PairScore, ...] = Field(min_length=1)
    longer_wins: float = Field(ge=0, le=1)
    """Accuracy of 'the longer answer wins' on the same pairs; equal lengths count half."""
    shorter_wins: float = Field(ge=0, le=1)

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen answer scores higher; equal scores count half."""
        return sum(self.correct) / len(self.pairs)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the more likely answer of each pair; needs two pairs."""
        return expected_calibration_error(self.calibration)

    @property
    def correct(self) -> list[float]:
        """Of each pair 1 where the chosen answer scores higher, 0.5 where both score the same, else 0."""
        return [0.5 if pair.chosen == pair.rejected else float(pair.chosen > pair.rejected) for pair in self.pairs]

    @property
    def calibration(self) -> list[CalibrationBin]:
        """How sure the model is of the more likely answer, and how often it is right; needs two pairs."""
        sure = [1.0 / (1.0 + math.exp(-min(abs(pair.chosen - pair.rejected), 700.0))) for pair in self.pairs]
        return calibration_bins(sure, self.correct)

    @property
    def length_baseline(self) -> float:
        """The better of the two length baselines."""
        return max(self.longer_wins, self.shorter_wins)


class JudgedPair(_Frozen):
    """One comparison of a judge, in both orders."""

    prompt_id: str
    one: str
    other: str
    score: float = Field(ge=0, le=1)
    """1: `one` wins in both orders; 0: `other` does; 0.5: a tie, or the order decided."""


class JudgeResult(_Frozen):
    """What a judge behind an endpoint said."""

    model: str
    pairs: tuple[JudgedPair, ...] = ()
    missing: int = 0
    """Comparisons without a verdict; they are no ties."""
    reason: str | None = None
    """Why the first of these has none."""
    calls: int = 0
    """Requests that were sent, those for the licence included."""
    failures: int = 0
    """Of these, the ones without a usable answer."""
    tokens: int = 0
    cost: float | None = None
    """By the price of a million tokens that the manifest gives."""
    swapped: int = 0
    """Comparisons that the order of the answers decided."""


class LicenceResult(_Frozen):
    """Whether a reward model or a judge agrees with people on rows that they judged."""

    granted: bool
    text: str
    """The figures in a sentence."""
    rows: int = 0
    accuracy: Interval | None = None
    """Share of people's preferences that it shares, ties half; None: not measured."""
    kappa: Interval | None = None
    """Cohen's, with people's preferences; None: not defined."""
    people: float | None = None
    """How often one person agrees with the majority; None: the rows do not say."""


class Watched(_Frozen):
    """What `rl.watch` saw."""

    looks: tuple[Look, ...]
    planned: int
    """Looks of the whole training."""
    false_alarms: float


class Evaluation(_Frozen):
    """All models of a run on the same prompts."""

    name: str
    """Name of the run."""
    seed: int
    models: dict[str, tuple[Sample, ...]]
    """Model name to samples, from before to after, e.g. base, sft, rlhf. The last is the aligned model."""
    heldout: bool = True
    """False: the run has no held-out prompts, and these were trained on."""
    reward_model: RewardModelEvaluation | None = None
    logprob_mismatch: float | None = None
    """Mean absolute difference of per-token log-probabilities between engine and trainer."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Duration of each phase."""
    peak_memory_gib: float | None = None
    """Peak over all processes."""
    base_model: str = ""
    hardware: str = ""
    suites: tuple[SuiteResult, ...] = ()
    """Suites, asked of every model; `target` is its name here."""
    knowledge: dict[str, dict[str, tuple[float, ...]]] = Field(default_factory=dict)
    """Task to model to the score of every question, in the same order for all models."""
    judges: dict[str, JudgeResult] = Field(default_factory=dict)
    """Comparisons of judges behind endpoints, by the judge's name."""
    licences: dict[str, LicenceResult] = Field(default_factory=dict)
    """Of every reward model and judge that rewards or gates, by name."""
    watched: Watched | None = None
    """Looks at the checkpoints of the newest online stage; None: it had no `watch`."""
    date: str = ""
    """UTC, ISO 8601."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The stage's configuration."""
    data: dict[str, str] = Field(default_factory=dict)
    """Name of every data file to its SHA-256."""

    @model_validator(mode="after")
    def _same_prompts(self) -> "Evaluation":
        if not self.models:
            raise ValueError("models is empty; an evaluation needs at least one model")
        ids = {name: [sample.prompt_id for sample in samples] for name, samples in self.models.items()}
        first, *others = ids
        if len(set(ids[first])) < max(2, len(ids[first])):
            raise ValueError(f"models.{first} needs at least two samples, each with its own prompt_id")
        for name in others:
            if sorted(ids[name]) != sorted(ids[first]):
                raise ValueError(f"models.{name} and models.{first} have different prompts; evaluate both on the same")
        return self

    def interval(self, model: str, criterion: str | None = None) -> Interval:
        """Mean reward (or rubric criterion) of one model with its interval over prompts."""
        scores = self.scores(model, criterion)
        return mean_interval(list(scores.values()), clusters=list(map(prompt_of, scores)))

    def change(self, before: str, after: str, criterion: str | None = None) -> Comparison:
        """Paired comparison of two models over prompts."""
        first, second, prompts = self.paired(before, after, criterion)
        return compare(first, second, clusters=prompts)

    def bootstrap(self, before: str, after: str, criterion: str | None = None) -> Interval:
        """The paired difference with the interval of a bootstrap over prompts, which assumes no distribution."""
        first, second, prompts = self.paired(before, after, criterion)
        return paired_bootstrap(first, second, clusters=prompts)

    def changes(self, before: str, after: str) -> list[float]:
        """Difference of reward on every prompt, the mean of its answers where there are several."""
        first, second, prompts = self.paired(before, after)
        differences = [later - earlier for earlier, later in zip(first, second, strict=True)]
        return list(cluster_means(differences, prompts, "changes"))

    def duels(self, judge: str = "reward") -> list[Duel]:
        """Comparisons of every two models on the same prompt: by reward, or by one of the judges."""
        if judge != "reward":
            found = self.judges.get(judge, JudgeResult(model=""))
            return [Duel(prompt_of(pair.prompt_id), pair.one, pair.other, pair.score) for pair in found.pairs]
        scores = {name: self.scores(name) for name in self.models}
        return [
            Duel(prompt_of(key), one, other, 0.5 if value == scores[other][key] else float(value > scores[other][key]))
            for other, one in combinations(self.models, 2)
            for key, value in scores[one].items()
            if key in scores[other]
        ]

    @property
    def scorers(self) -> list[str]:
        """Scorers that spoke of the answers, where there are several."""
        return list(dict.fromkeys(name for sample in self.models[self.aligned] for name in sample.scores))

    @property
    def kind(self) -> str:
        """What the prompts are, as titles call them."""
        return "held-out prompts" if self.heldout else "training prompts"

    @property
    def prompts(self) -> int:
        """Different prompts; each model may have answered each of them several times."""
        return len({prompt_of(sample.prompt_id) for sample in next(iter(self.models.values()))})

    @property
    def aligned(self) -> str:
        """Name of the model after alignment."""
        return list(self.models)[-1]

    @property
    def start(self) -> str:
        """Name of the model that alignment started from: the one before the aligned model."""
        return list(self.models)[-2 if len(self.models) > 1 else -1]

    def paired(
        self, before: str, after: str, criterion: str | None = None
    ) -> tuple[list[float], list[float], list[str]]:
        """Rewards (or a rubric criterion) of two models where both have one, and the prompt of each, in one order."""
        first, second = self.scores(before, criterion), self.scores(after, criterion)
        common = [key for key in first if key in second]
        return [first[key] for key in common], [second[key] for key in common], list(map(prompt_of, common))

    def scores(self, model: str, criterion: str | None = None) -> dict[str, float]:
        """Prompt id to reward (or rubric criterion, or `scores.NAME` of one scorer) of one model; missing scores are
        left out."""
        kind, _, scorer = (criterion or "").partition(".")
        values = {
            sample.prompt_id: sample.reward
            if criterion is None
            else sample.scores.get(scorer)
            if kind == "scores" and scorer
            else sample.rubric.get(criterion)
            for sample in self.models[model]
        }
        return {key: value for key, value in values.items() if value is not None}


def read_evaluation(path: Path) -> Evaluation:
    """Read `evaluation.json`; a `DataError` names the file and the first wrong field."""
    try:
        return Evaluation.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run the evaluate stage first.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({why(error)}); write it again with the evaluate stage.") from None
    except ValidationError as error:
        problem: Mapping[str, object] = dict(error.errors()[0])
        location = problem["loc"]
        field = ".".join(map(str, location)) if isinstance(location, tuple) and location else "evaluation"
        raise DataError(f"{path}: {field}: {problem['msg']}; write it again with the evaluate stage.") from None


def newest_evaluation(run_dir: Path) -> Path | None:
    """The file of a run's newest evaluation; None where there is none yet."""
    return max(run_dir.glob("evaluate*/evaluation.json"), key=lambda path: path.stat().st_mtime, default=None)


def read_evaluation_of(run_dir: Path) -> Evaluation:
    """A run's newest evaluation; NotFoundError where there is none yet."""
    path = newest_evaluation(run_dir)
    if path is None:
        raise NotFoundError(f"{run_dir} has no evaluation.json; run a manifest with an evaluate stage first")
    return read_evaluation(path)
