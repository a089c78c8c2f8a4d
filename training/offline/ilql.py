"""Implicit language Q-learning on one page (Snell et al. 2022, arXiv 2206.11871; trlX).

    Q_i(s_t, a_t) -> r_t + gamma V(s_{t+1})              two heads on the trunk, with Polyak targets; or lambda-returns
    V(s)          -> an upper expectile of min_i Qtarget_i(s, a) over what was said
    CQL           -> other tokens' Q below the said one's
    pi            -> the language model of what was said

    served: log pi + beta (min_i Qtarget_i - V)

Equations and averages are in `training.mathematics.ilql`. All T actions of an optimizer step count the same whatever
the micro-batches and ranks. The stage writes the plain model and beside it its heads (`steersman.nn.ilql`).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from steersman.config.manifest import IlqlStage
from steersman.leaving import asked, leave, saves_between_steps
from steersman.nn.encoder_decoder import refuse_encoder_decoder
from steersman.nn.forward import predicting_states
from steersman.nn.hardware import use_fast_exact_matmul
from steersman.nn.ilql import AdvantageHeads, Head, HeadTensors
from steersman.nn.load import load_tokenizer
from steersman.nn.logprobs import token_logprobs
from steersman.nn.lora import merge_to_folder, quantization, save_adapter, save_model
from steersman.nn.packed import PackedBatch
from steersman.nn.tokens import generation_config_of, stop_ids
from training.context import StageContext
from training.mathematics.ilql import ActionValues, IlqlStats, ilql_loss, move_targets
from training.mathematics.stats import merge
from training.offline import trl_setup
from training.offline.ilql_data import Conversation, conversations_of, epoch_order, part_of, parts
from training.online.checkpoint import Checkpoints
from training.online.checks import BadUpdates, check_finite_weights
from training.online.optimizer import PolicyOptimizer
from training.online.policy_model import PolicyModel
from training.online.publication import WeightsPayload
from training.parallel import Ranks


def run_ilql(spec: IlqlStage, ctx: StageContext) -> dict[str, Path]:
    """Trains on the files of `learnFrom` from the newest policy and returns the folders `model` and `adapter`.

    Raises:
        DataError: a row is wrong or too long, or every return is the same.
        ConfigError: the policy is an encoder-decoder.
    """
    quantization(spec.lora, ctx.device)
    refuse_encoder_decoder(AutoConfig.from_pretrained(ctx.policy_model), "ilql puts its heads on a decoder")
    use_fast_exact_matmul()
    tokenizer = load_tokenizer(ctx.policy_model, ctx.spec.model.template_options)
    stops = stop_ids(tokenizer, generation_config_of(ctx.policy_model))
    rows = conversations_of(spec, ctx, "train", tokenizer, stops)
    validation = conversations_of(spec, ctx, "validation", tokenizer, stops)
    ctx.reporter.note(f"{len(rows)} conversations, {sum(len(row.rewards) for row in rows)} actions")
    ranks = Ranks.join(ctx.device)
    model = IlqlModel(spec, ctx)
    ranks.shard(model.policy)
    trainer = IlqlTrainer(spec, model, rows, ctx, ranks)
    trainer.run()
    if validation:
        found = trainer.measure(validation)
        ctx.reporter.step(trainer.steps, trainer.steps, **{f"eval_{name}": v for name, v in found.means().items()})
    if ranks.world > 1:
        state = model.trained_state()
        if ranks.is_first:
            model = IlqlModel(spec, ctx)
            model.load_trained_state(state)
    if ranks.is_first:
        ctx.reporter.activity("writing the model and its heads")
        _write(spec, ctx, model, stops)
    ranks.barrier()
    return {name: ctx.stage_dir / name for name in (("model", "adapter") if spec.lora else ("model",))}


class IlqlModel(PolicyModel):
    """The policy's language model with Q and V heads on its trunk."""

    def __init__(self, spec: IlqlStage, ctx: StageContext) -> None:
        super().__init__(
            ctx.policy_model,
            spec.lora,
            None,
            None,
            device=ctx.device,
            precision=ctx.precision,
            temperature=1.0,
            seed=ctx.seed,
            gradient_checkpointing=spec.gradient_checkpointing,
        )
        text = self.policy.config.get_text_config(decoder=True)
        self.heads = AdvantageHeads(text.hidden_size, text.vocab_size, spec.beta).to(ctx.device)
        self.targets = copy.deepcopy(self.heads.q).requires_grad_(False)

    def action_values(self, batch: PackedBatch) -> ActionValues:
        """What the model says of `batch.targets`, each said behind its predictor."""
        with self._autocast():
            hidden = predicting_states(self.policy, batch)
            logprobs = self._token_logprobs(hidden, batch)
        states, actions = hidden.float(), batch.targets
        of_q = [_of_actions(head, states, actions) for head in self.heads.q]
        with torch.no_grad():
            targets = [_of_actions(head, states, actions, value_only=True)[0] for head in self.targets]
        return ActionValues(
            logprobs=logprobs,
            q=torch.stack([value for value, _ in of_q]),
            q_logprobs=torch.stack([logprob for _, logprob in of_q]),
            target_q=torch.stack(targets),
            v=self.heads.v(states)[:, 0],
        )

    def critic_parameters(self) -> list[nn.Parameter]:
        return list(self.heads.parameters())

    def move_targets(self, rate: float) -> None:
        move_targets(list(self.targets.parameters()), list(self.heads.q.parameters()), rate)

    def served_heads(self) -> HeadTensors:
        """What the policy service needs beside the language model."""
        return self.heads.tensors(self.targets)

    def payload(self, dtype: torch.dtype) -> WeightsPayload:
        """The language model's weights, and the heads in fp32."""
        own = super().payload(dtype)
        return replace(own, tensors={**own.tensors, **self.served_heads()})

    def _trained(self) -> dict[str, nn.Parameter]:
        return super()._trained() | {f"targets.{name}": value for name, value in self.targets.named_parameters()}


def _of_actions(head: Any, states: Tensor, actions: Tensor, *, value_only: bool = False) -> tuple[Tensor, Tensor]:
    """(Q(s, a), log softmax(Q(s, .))[a]), both [T], without [T, V] in memory; the second is empty for `value_only`."""
    assert isinstance(head, Head)
    features, weight, bias = head.features(states), head.last.weight, head.last.bias
    values = (features * weight[actions]).sum(-1) + bias[actions]
    if value_only:
        return values, values.new_empty(0)
    return values, token_logprobs(features, weight, actions, bias=bias)[0]


class IlqlTrainer:
    """Optimizer steps over the conversations, a checkpoint from time to time."""

    def __init__(
        self, spec: IlqlStage, model: IlqlModel, rows: Sequence[Conversation], ctx: StageContext, ranks: Ranks
    ) -> None:
        self._spec, self._model, self._rows, self._ctx, self._ranks = spec, model, rows, ctx, ranks
        self._optimizer = PolicyOptimizer(model, spec.optimizer, spec.heads_learning_rate, ranks)
        self._checkpoints = Checkpoints(ctx.checkpoints)
        self._a_pass = -(-len(rows) // spec.batch_size)
        self.steps = spec.max_steps or max(1, math.ceil(spec.epochs * self._a_pass))
        self._losses: list[float] = []
        self._bad = BadUpdates()
        self._saved, self._cost = time.monotonic(), 0.0

    def run(self) -> None:
        """All steps that are not done yet."""
        done, reporter = self._restore(), self._ctx.reporter
        self._model.train()
        with saves_between_steps():
            for step in range(done, self.steps):
                reporter.activity(f"working on step {step + 1} of {self.steps}")
                started = time.monotonic()
                metrics = self._step(step)
                check_finite_weights(self._ranks.all(self._model.is_finite()), step + 1)
                metrics["tokens_per_second"] = metrics["tokens"] / (time.monotonic() - started)
                going = not self._ranks.all(not asked())
                if going or (step + 1 < self.steps and self._is_time()):
                    self._save(step + 1)
                reporter.step(step + 1, self.steps, **metrics)
                if going:
                    leave()
        log = [{"loss": loss} for loss in self._losses]
        for warning in trl_setup.what_was_not_learned(log, len(self._rows)):
            reporter.note(f"warning: {warning}")

    def _batch(self, step: int) -> list[Conversation]:
        epoch, number = divmod(step, self._a_pass)
        order = epoch_order(self._rows, self._ctx.seed * 1009 + epoch)
        size = self._spec.batch_size
        return [self._rows[index] for index in order[number * size : (number + 1) * size]]

    def _step(self, step: int) -> dict[str, float]:
        batch = self._batch(step)
        total = sum(len(row.rewards) for row in batch)
        found = self._pass(batch, total, learn=True)
        norms = None
        if math.isfinite(found.loss):
            norms = self._optimizer.step((step + 0.5) / self.steps)
        else:
            self._optimizer.clear()
        self._bad.saw(norms is not None, step)
        if norms is not None:
            self._model.move_targets(self._spec.polyak)
            self._losses.append(found.means()["loss"])
        return {**found.means(), **(norms or {}), "tokens": float(total), "bad_updates": float(norms is None)}

    def _pass(self, batch: Sequence[Conversation], total: int, *, learn: bool) -> IlqlStats:
        """Forward passes over the conversations, and gradients of their mean loss; sums over all ranks."""
        spec, stats = self._spec, [IlqlStats()]
        for rows, counts in self._ranks.share(list(parts(batch, spec.micro_batch_size))):
            part = part_of(rows, self._model.device)
            loss, found = ilql_loss(
                self._model.action_values(part.packed),
                part.rewards,
                part.lengths,
                gamma=spec.gamma,
                lam=spec.lam,
                tau=spec.expectile,
                cql=spec.cql,
                lm=spec.lm,
                lm_beta=spec.lm_beta,
                denominator=float(total),
            )
            if learn:
                (loss * (self._ranks.scale if counts else 0.0)).backward()
            if counts:
                stats.append(found)
        return self._ranks.merge(merge(stats))

    @torch.no_grad()
    def measure(self, rows: Sequence[Conversation]) -> IlqlStats:
        """The loss on conversations that are not learned from."""
        self._ctx.reporter.activity("measuring the validation loss")
        self._model.eval()
        return self._pass(rows, sum(len(row.rewards) for row in rows), learn=False)

    def _is_time(self) -> bool:
        pause = max(trl_setup.CHECKPOINT_SECONDS, self._cost / trl_setup.CHECKPOINT_SHARE)
        return self._ranks.from_first(lambda: time.monotonic() - self._saved >= pause)

    def _save(self, step: int) -> None:
        began = time.monotonic()
        state = {
            "model": self._model.trained_state(),
            "optimizer": self._optimizer.state(),
            "losses": self._losses,
        }
        if self._ranks.is_first:
            self._checkpoints.save(step, state)
        self._saved = time.monotonic()
        self._cost = self._saved - began

    def _restore(self) -> int:
        found = self._checkpoints.load(self._ctx.reporter.note)
        self._ranks.barrier()
        if found is None:
            return 0
        step, state = found
        self._model.load_trained_state(state["model"])
        self._optimizer.load(state["optimizer"])
        self._losses = state["losses"]
        self._ctx.reporter.note(f"continues after step {step}")
        return step


def _write(spec: IlqlStage, ctx: StageContext, model: IlqlModel, stops: Sequence[int]) -> None:
    policy, heads = model.policy, model.served_heads()
    folder, adapter = ctx.stage_dir / "model", ctx.stage_dir / "adapter"
    if spec.lora is not None:
        save_adapter(policy, adapter, heads=heads)
        merge_to_folder(ctx.policy_model, adapter, folder, stop_ids=stops)
    else:
        save_model(policy, load_tokenizer(ctx.policy_model), folder, stops, heads)
