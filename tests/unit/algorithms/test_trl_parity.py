"""Parity with TRL 1.16's real RLOO and GRPO trainers on one frozen batch, from rewards to gradients.

TRL's trainer generates the batch (a tiny random model, a rule as reward), computes KL, advantages and the loss with its
own code. Steersman takes the same token ids and rewards and does all of it again with `training.mathematics`. The
policy differs from the reference, and is moved once more before the loss is taken, so that KL is not 0, ratios are not
1 and clipping bites.

Where Steersman differs on purpose, a test says so and shows by how much.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from training.mathematics.advantages import grpo, rloo
from training.mathematics.kl import k1
from training.mathematics.logprobs import token_logprobs
from training.mathematics.losses import (
    KlTerm,
    PolicyStats,
    cispo_loss,
    grpo_loss,
    gspo_loss,
    online_preference_loss,
    rloo_loss,
)
from training.mathematics.rewards import present, sequence_rewards
from training.mathematics.segments import select

TOLERANCE = 1e-5
BETA = 0.05
WORDS = [f"w{i}" for i in range(28)]
PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10"]
GENERATIONS = 4
TEMPERATURE = 0.8


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def saved_model(folder: Path) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        tie_word_embeddings=False,
        initializer_range=0.6,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def move(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [0.3 * len(ids) - 0.1 * (sum(ids) % 17) for ids in completion_ids]


def reward_that_fails_once(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [None, *reward(completion_ids)[1:]]


class Frozen:
    """One batch made by a TRL trainer, TRL's loss on it, and the same batch as packed tensors."""

    def __init__(self, folder: Path, method: str, reward_function: Any = reward, **options: Any) -> None:
        config, trainer = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}[method]
        self.trainer = trainer(
            model=saved_model(folder / "base"),
            reward_funcs=reward_function,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer(),
            args=config(
                output_dir=str(folder),
                use_cpu=True,
                bf16=False,
                report_to=[],
                num_generations=GENERATIONS,
                per_device_train_batch_size=len(PROMPTS) * GENERATIONS,
                num_iterations=2,  # keeps the old log-probabilities in the batch
                max_completion_length=12,
                temperature=TEMPERATURE,
                beta=BETA,
                gradient_checkpointing=False,
                **options,
            ),
        )
        self.policy = self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        move(self.policy, seed=1)
        torch.manual_seed(2)
        rows = [{"prompt": prompt} for prompt in PROMPTS for _ in range(GENERATIONS)]
        self.batch = self.trainer._generate_and_score_completions(rows)

        self.mask = self.batch["completion_mask"].bool()
        self.lengths = self.mask.sum(1)
        self.group = torch.arange(len(PROMPTS)).repeat_interleave(GENERATIONS)
        ids = [row[mask].tolist() for row, mask in zip(self.batch["completion_ids"], self.mask, strict=True)]
        self.scores = torch.tensor([math.nan if x is None else x for x in reward_function(completion_ids=ids)])
        with torch.no_grad():
            self.old = self.logprobs(self.policy)
            self.ref = self.logprobs(self.trainer.ref_model)
        move(self.policy, seed=3)

    def logprobs(self, model: LlamaForCausalLM) -> Tensor:
        """fp32 [T] of the response tokens, packed, through the chunked head."""
        prompt, completion = self.batch["prompt_ids"], self.batch["completion_ids"]
        attention = torch.cat([self.batch["prompt_mask"], self.batch["completion_mask"]], 1)
        states = model.model(torch.cat([prompt, completion], 1), attention_mask=attention).last_hidden_state
        states = states[:, prompt.shape[1] - 1 : -1][self.mask]
        targets = completion[self.mask]
        return token_logprobs(states, model.lm_head.weight, targets, temperature=TEMPERATURE, chunk_tokens=7)[0]

    def trl_loss(self) -> Tensor:
        return self.trainer.compute_loss(self.policy, dict(self.batch))

    def gradient(self, loss: Tensor) -> Tensor:
        """Of all parameters, in one row."""
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.policy.parameters()))])

    def agrees(self, loss: Tensor, scale: float = 1.0) -> None:
        """`loss` and its gradient are `scale` times TRL's."""
        theirs = self.trl_loss()
        ours_gradient, theirs_gradient = self.gradient(loss), self.gradient(theirs)
        assert loss.item() == pytest.approx(scale * theirs.item(), abs=TOLERANCE)
        assert theirs_gradient.abs().max() > 1e-2
        largest = max(1.0, theirs_gradient.abs().max().item())
        assert (ours_gradient - scale * theirs_gradient).abs().max() <= TOLERANCE * largest


def rloo_of(frozen: Frozen) -> tuple[Tensor, Tensor, PolicyStats]:
    """(advantages, loss, stats) of the samples that have a reward, by Steersman."""
    keep = present(frozen.scores, frozen.lengths)
    lengths = frozen.lengths[keep]
    new, old, ref = (select(x, frozen.lengths, keep) for x in (frozen.logprobs(frozen.policy), frozen.old, frozen.ref))
    rewards = sequence_rewards(frozen.scores[keep], k1(old, ref), lengths, BETA)
    advantages = rloo(rewards, frozen.group[keep])
    loss, stats = rloo_loss(new, old, advantages, lengths, denominator=int(keep.sum()))
    return advantages, loss, stats


def test_rloo(tmp_path: Path) -> None:
    frozen = Frozen(tmp_path, "rloo")
    advantages, loss, stats = rloo_of(frozen)
    assert frozen.lengths.unique().numel() > 2
    assert k1(frozen.old, frozen.ref).abs().mean() > 0.01
    assert 0 < stats.clipped < stats.count
    assert (advantages - frozen.batch["advantages"]).abs().max() <= TOLERANCE
    frozen.agrees(loss)


def test_rloo_differs_where_a_reward_is_missing(tmp_path: Path) -> None:
    """Same advantages; TRL leaves the failed sample in the mean with advantage 0, we count it out of the denominator.

    Else a batch with failures would make a smaller step than the same batch without the failed samples.
    """
    frozen = Frozen(tmp_path, "rloo", reward_that_fails_once)
    advantages, loss, _ = rloo_of(frozen)
    assert (advantages - frozen.batch["advantages"][1:]).abs().max() <= TOLERANCE
    total = len(frozen.lengths)
    frozen.agrees(loss, scale=total / (total - 1))


@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_grpo(tmp_path: Path, loss_type: str, correction: bool) -> None:
    scale_by_std = loss_type != "dr_grpo"
    frozen = Frozen(
        tmp_path,
        "grpo",
        loss_type=loss_type,
        scale_rewards="group" if scale_by_std else "none",
        use_bias_correction_kl=correction,
    )
    advantages = grpo(frozen.scores, frozen.group, scale_by_std=scale_by_std)
    assert (advantages - frozen.batch["advantages"]).abs().max() <= TOLERANCE
    denominators = {
        "dapo": ("tokens", int(frozen.lengths.sum())),
        "grpo": ("samples", len(frozen.lengths)),
        "dr_grpo": ("tokens", len(frozen.lengths) * frozen.trainer.max_completion_length),
    }
    average, denominator = denominators[loss_type]
    loss, stats = grpo_loss(
        frozen.logprobs(frozen.policy),
        frozen.old,
        advantages,
        frozen.lengths,
        denominator=denominator,
        average=average,  # type: ignore[arg-type]
        kl=KlTerm(frozen.ref, BETA, correction=correction),
    )
    assert 0 < stats.clipped < stats.count
    frozen.agrees(loss)


def test_dapo_clips_higher(tmp_path: Path) -> None:
    frozen = Frozen(tmp_path, "grpo", loss_type="dapo", epsilon_high=0.28, use_bias_correction_kl=False)
    advantages = grpo(frozen.scores, frozen.group)
    loss, stats = grpo_loss(
        frozen.logprobs(frozen.policy),
        frozen.old,
        advantages,
        frozen.lengths,
        denominator=int(frozen.lengths.sum()),
        clip_high=0.28,
        kl=KlTerm(frozen.ref, BETA, correction=False),
    )
    assert 0 < stats.clipped < stats.count
    frozen.agrees(loss)


@pytest.mark.parametrize("correction", [True, False])
def test_gspo(tmp_path: Path, correction: bool) -> None:
    frozen = Frozen(
        tmp_path,
        "grpo",
        loss_type="grpo",
        importance_sampling_level="sequence",
        epsilon=0.02,
        epsilon_high=0.03,
        use_bias_correction_kl=correction,
    )
    loss, stats = gspo_loss(
        frozen.logprobs(frozen.policy),
        frozen.old,
        grpo(frozen.scores, frozen.group),
        frozen.lengths,
        denominator=len(frozen.lengths),
        clip_low=0.02,
        clip_high=0.03,
        kl=KlTerm(frozen.ref, BETA, correction=correction),
    )
    assert 0 < stats.clipped < stats.count
    frozen.agrees(loss)


def test_cispo(tmp_path: Path) -> None:
    frozen = Frozen(tmp_path, "grpo", loss_type="cispo", epsilon_high=1.05, use_bias_correction_kl=False)
    loss, stats = cispo_loss(
        frozen.logprobs(frozen.policy),
        frozen.old,
        grpo(frozen.scores, frozen.group).repeat_interleave(frozen.lengths),
        denominator=int(frozen.lengths.sum()),
        weight_cap=1.05,
        kl=KlTerm(frozen.ref, BETA, correction=False),
    )
    assert 0 < stats.clipped < stats.count
    frozen.agrees(loss)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_online_dpo(tmp_path: Path, loss_type: str) -> None:
    """TRL's step on two answers a prompt: its loss, and the gradient that it leaves in the parameters."""
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    trainer = OnlineDPOTrainer(
        model=saved_model(tmp_path / "base"),
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer(),
        args=OnlineDPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            beta=0.2,
            loss_type=loss_type,
            max_new_tokens=12,
            per_device_train_batch_size=len(PROMPTS),
            gradient_checkpointing=False,
        ),
    )
    policy = trainer.model.train()
    move(policy, seed=1)
    made: list[tuple[Tensor, ...]] = []
    generate = trainer._generate

    def remembered(*arguments: Any) -> Any:
        found = generate(*arguments)
        made.append(found[:4])
        return found

    trainer._generate = remembered
    torch.manual_seed(2)
    theirs = trainer.training_step(policy, {"prompt": PROMPTS}).item()
    (prompt_ids, prompt_mask, completion_ids, completion_mask) = made[0]
    mask = completion_mask.bool()
    attention = torch.cat([prompt_mask, completion_mask], 1)

    def answers(model: LlamaForCausalLM) -> Tensor:
        ids = torch.cat([prompt_ids, completion_ids], 1)
        logits = model(ids, attention_mask=attention).logits[:, prompt_ids.shape[1] - 1 : -1]
        found = logits.log_softmax(-1).gather(2, completion_ids[:, :, None])[:, :, 0]
        return (found * mask).sum(1)

    with torch.no_grad():
        ref = answers(trainer.ref_model)
    ratio = answers(policy) - ref
    ids = [row.tolist() for row in completion_ids]
    scores = torch.tensor(reward(completion_ids=ids)).view(2, -1)
    better = (scores[0] >= scores[1]).long()
    first, second = ratio.view(2, -1)
    chosen, rejected = torch.where(better == 1, first, second), torch.where(better == 1, second, first)
    loss = online_preference_loss(chosen, rejected, denominator=len(PROMPTS), beta=0.2, kind=loss_type)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(theirs, abs=TOLERANCE * max(1.0, abs(theirs)))
    ours = torch.autograd.grad(loss, list(policy.parameters()))
    for gradient, parameter in zip(ours, policy.parameters(), strict=True):
        largest = max(1.0, float(parameter.grad.abs().max()))
        assert (gradient - parameter.grad).abs().max() <= 2 * TOLERANCE * largest


def test_grpo_differs_in_micro_batches(tmp_path: Path) -> None:
    """TRL's `grpo` and `dr_grpo` losses average each micro-batch and then the micro-batches; ours add up exactly.

    With micro-batches of 1 and 15 samples TRL's mean of means is not the mean; the sum of ours is.
    """
    frozen = Frozen(tmp_path, "grpo", loss_type="grpo")
    total = len(frozen.lengths)
    advantages = grpo(frozen.scores, frozen.group)

    def ours(rows: slice) -> Tensor:
        keep = torch.zeros(total, dtype=torch.bool)
        keep[rows] = True
        new, old, ref = (
            select(x, frozen.lengths, keep) for x in (frozen.logprobs(frozen.policy), frozen.old, frozen.ref)
        )
        lengths = frozen.lengths[keep]
        return grpo_loss(
            new,
            old,
            advantages[keep],
            lengths,
            denominator=total,
            average="samples",
            kl=KlTerm(ref, BETA),
        )[0]

    def theirs(rows: slice) -> float:
        part = {name: x[rows] if isinstance(x, Tensor) and x.dim() else x for name, x in frozen.batch.items()}
        return frozen.trainer.compute_loss(frozen.policy, part).item()

    whole = frozen.trl_loss().item()
    first, rest = slice(0, 1), slice(1, None)
    assert (ours(first) + ours(rest)).item() == pytest.approx(whole, abs=TOLERANCE)
    assert abs((theirs(first) + theirs(rest)) / 2 - whole) > 1e-3
