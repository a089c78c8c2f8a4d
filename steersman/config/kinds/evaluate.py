"""Comparison on held-out prompts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from steersman.config.base import FrozenModel, Positive
from steersman.config.kinds.registry import StageOptions, stage
from steersman.config.kinds.sampling import ServedGeneration, VerifiableReward
from steersman.gates import Gates
from steersman.judges.options import LlmJudge


class KnowledgeTasks(FrozenModel):
    """What must not be forgotten (extra `knowledge`)."""

    folder: str
    """Folder with the authors' files of TruthfulQA, MMLU and GSM8K, relative to the manifest."""
    tasks: Annotated[list[str], Field(min_length=1)] = ["truthfulqa_mc1", "truthfulqa_mc2"]
    """`truthfulqa_mc1`, `truthfulqa_mc2`, `mmlu_SUBJECT`, `gsm8k`."""
    limit: Positive | None = None
    """Only the first questions of each; None: all."""


@stage("evaluate")
class EvaluateStage(StageOptions):
    """Base against SFT against the aligned model on held-out prompts."""

    title = "Comparison on held-out prompts."
    runner = "training.evaluate:run_evaluate"
    reads = "prompts"
    uses_services = True

    generation: ServedGeneration = ServedGeneration()
    """How answers are drawn: as they will be served. Temperature 0: the likeliest answer."""
    samples_per_prompt: Positive = 1
    """Answers to each prompt."""
    max_prompts: Positive | None = None
    """Use only the first prompts."""
    checks: list[VerifiableReward] = []
    """Exact scores beside the learned reward; training never sees them. The first one is the report's rubric."""
    scorers: dict[str, str] = {}
    """Further reward models, which training never used, by name: folders, relative to the manifest."""
    suites: list[str] = []
    """Suites that every model is asked: YAML or JSONL files, relative to the manifest."""
    knowledge: KnowledgeTasks | None = None
    """Tasks of lm-evaluation-harness that base and aligned model are asked; None: none."""
    judges: list[LlmJudge] = []
    """Language models that compare every two models' answers."""
    champion: str | None = None
    """Folder of the model that is served now, which answers the same prompts; relative to the manifest."""
    gates: Gates = Gates()
    """What the model must show; a gate that is not passed ends the stage. A bare number is the gate's limit."""

    @model_validator(mode="after")
    def _check(self) -> EvaluateStage:
        if self.generation.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError("samplesPerPrompt must be 1 at generation.temperature 0: all answers would be the same")
        names = [judge.name for judge in self.judges]
        if len(set(names)) < len(names):
            raise ValueError("judges: two have the same name; give each its own")
        return self

    def brings_scorers(self) -> list[str]:
        return list(self.scorers)
