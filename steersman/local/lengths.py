"""Finds rows that are too long for a later stage, before the first one has trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from steersman.config.manifest import AlignmentRun, EvaluateStage, Generation, OnlineStage, RewardModelStage
from steersman.config.stages import data_files
from steersman.data.records import at, keyed_prompts, plain_messages
from steersman.errors import DataError

if TYPE_CHECKING:
    from steersman.progress import ConsoleReporter


def check_prompts_leave_room(run: AlignmentRun, run_dir: Path, base: Path, reporter: ConsoleReporter) -> None:
    """Prompt and longest answer must fit into the policy's context and into every reward model that will score them.

    Reward models with a backbone of their own are left out: their tokenizer counts otherwise.

    Raises:
        DataError: a prompt that is too long, by `file:line`, and what to set instead.
    """
    uses = list(_uses(run))
    files = data_files(run, run_dir).get("prompts", {})
    if not uses or not files:
        return
    from transformers import AutoConfig

    from steersman.nn.load import load_tokenizer
    from steersman.nn.render import prompt_ids

    tokenizer = load_tokenizer(base, run.spec.model.template_options)
    text = AutoConfig.from_pretrained(base).get_text_config(decoder=True)
    context = run.spec.services.policy.max_context or getattr(text, "max_position_embeddings", None)
    for split, path in files.items():
        wanted = [use for use in uses if split == use[1]]
        if not wanted:
            continue
        for number, (where, _, row) in enumerate(keyed_prompts(path), start=1):
            if number % 500 == 0:
                reporter.activity(f"measuring {path.name}, row {number:,}")
            with at(where):
                length = len(prompt_ids(tokenizer, plain_messages(row.prompt), row.tools))
            for stage, _, generation, models in wanted:
                _check(where, stage, length, generation, models, context)


def _uses(run: AlignmentRun) -> Iterator[tuple[str, str, Generation, list[RewardModelStage]]]:
    """(stage, split, generation, reward models that score its answers) of every stage that answers prompts."""
    models: list[RewardModelStage] = []
    heldout = run.spec.data.demo is not None or (run.spec.data.prompts and run.spec.data.prompts.heldout)
    for name, stage in run.stages():
        if isinstance(stage, RewardModelStage) and stage.base is None:
            models.append(stage)
        if isinstance(stage, OnlineStage | EvaluateStage):
            split = "heldout" if isinstance(stage, EvaluateStage) and heldout else "train"
            yield name, split, stage.generation, list(models)


def _check(
    where: str, stage: str, length: int, generation: Generation, models: list[RewardModelStage], context: int | None
) -> None:
    answer = generation.max_new_tokens
    for model in models:
        if length + answer > model.max_length:
            raise DataError(
                f"{where}: the prompt has {length} tokens and an answer up to {answer}, which is more than the "
                f"{model.max_length} that reward model {model.name} is trained for; set its maxLength to at least "
                f"{length + answer}, or lower generation.maxNewTokens of stage {stage}, or shorten the prompt"
            )
    if context is not None and length + answer > context:
        raise DataError(
            f"{where}: the prompt has {length} tokens, stage {stage} needs {answer} more for an answer, and the policy "
            f"reads {context}; shorten the prompt or lower generation.maxNewTokens"
        )
