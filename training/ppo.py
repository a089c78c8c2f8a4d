"""Online reinforcement learning: PPO and its critic-free relatives on one page.

    maximize  E[ r(x, y) ] - beta * KL(policy || reference)

    generate -> score -> reference log-probabilities -> advantages -> update -> checkpoint -> publish weights

    policy service  ~~ samples ~~>  reward service, reference service  ~~ scores, log-probabilities ~~>  trainer
          ^                                                                                                 |
          `----------------------------- weights as one transaction ----------------------------------------'

PPO (Schulman et al. 2017; Ziegler et al. 2019): per-token reward -beta * (logp - ref) with the score on
the last token, GAE, clipped losses. RLOO, GRPO, Dr. GRPO and REINFORCE (training.algorithms.advantages)
share everything but the advantage and need no critic.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from steersman.config.manifest import PpoSpec, RlStage
from steersman.nn.packed import pack
from training.algorithms import advantages as estimators
from training.algorithms import kl as kl_estimators
from training.algorithms import losses, mismatch, rewards, segments, stats
from training.algorithms.kl import AdaptiveKL, FixedKL
from training.algorithms.moments import Moments, whiten
from training.batch import MicroBatch, SampleBatch, micro_batches
from training.checkpoint import Checkpoints
from training.clients import PolicyPool
from training.policy_model import Forward, PolicyModel
from training.rollout import Prompt, Rollouts, exclude_failed, to_batch


@dataclass(frozen=True, eq=False)
class Estimates:
    """What one batch teaches, from the policy that sampled it."""

    old_logprobs: Tensor
    """fp32 [T], of the trainer's own forward pass."""
    old_values: Tensor | None
    """fp32 [T]; None without a critic."""
    advantages: Tensor
    """fp32 [T]"""
    returns: Tensor | None
    """fp32 [T]; None without a critic."""
    kl: Tensor
    """fp32 [T], k1 to the reference."""


@dataclass(frozen=True)
class Totals:
    """Response tokens and samples of a whole optimizer step, over all micro-batches."""

    tokens: int
    samples: int


class Trainer:
    """The loop and the update; services, prompts and checkpoints come from outside."""

    def __init__(
        self,
        spec: RlStage,
        model: PolicyModel,
        rollouts: Rollouts,
        policy: PolicyPool,
        prompts: Sequence[Prompt],
        checkpoints: Checkpoints,
        reporter: Any,
        *,
        seed: int,
        demonstrations: Sequence[tuple[Any, Any]] = (),
    ) -> None:
        """Args:
        demonstrations: (prompt ids, answer ids) for PPO-ptx.
        """
        self.spec = spec
        self.ppo = spec.ppo or PpoSpec()
        self.model = model
        self.rollouts = rollouts
        self.policy = policy
        self.prompts = prompts
        self.checkpoints = checkpoints
        self.reporter = reporter
        self.seed = seed
        self.demonstrations = demonstrations
        # lm-human-preferences uses Adam with eps 1e-5; fused: one kernel for all parameters.
        decay = spec.optimizer.weight_decay
        rate = spec.optimizer.learning_rate
        groups: list[dict[str, Any]] = [{"params": model.policy_parameters(), "lr": rate, "weight_decay": decay}]
        if model.critic_parameters():
            groups.append(
                {"params": model.critic_parameters(), "lr": self.ppo.critic.learning_rate, "weight_decay": 0.0}
            )
        self.optimizer = torch.optim.AdamW(groups, eps=1e-5, fused=True)
        self.base_rates = [group["lr"] for group in groups]
        self.kl_controller: FixedKL | AdaptiveKL = FixedKL(spec.kl_coefficient)
        if spec.adaptive_kl is not None:
            adaptive = spec.adaptive_kl
            self.kl_controller = AdaptiveKL(spec.kl_coefficient, adaptive.target, adaptive.horizon)
        self.dtype = torch.bfloat16 if policy.info().model.dtype == "bf16" else torch.float32

    def run(self) -> None:
        """All steps that are not done yet."""
        done = self.restore()
        self.publish()
        for step in range(done, self.spec.steps):
            started = time.monotonic()
            prompts = self.prompts_of(step)
            scored, timing = self.rollouts.collect(prompts, self.spec.samples_per_prompt, self.step_seed(step))
            batch, failed = exclude_failed(to_batch(prompts, scored), scored, self.spec.max_failed_share)
            collected = time.monotonic()
            metrics = self.update(batch, step)
            updated = time.monotonic()
            if (step + 1) % self.spec.checkpoint_every == 0 or step + 1 == self.spec.steps:
                self.save(step + 1)
            timing["seconds_publish"] = self.publish()
            timing |= {"seconds_update": updated - collected, "seconds": time.monotonic() - started}
            self.reporter.step(step + 1, self.spec.steps, **self.report(batch, failed, metrics, timing))

    def prompts_of(self, step: int) -> list[Prompt]:
        """The prompts of a step: a function of the seed and the step alone, so that a resumed run repeats it."""
        count = self.spec.prompts_per_step
        picked = []
        for position in range(step * count, (step + 1) * count):
            epoch, index = divmod(position, len(self.prompts))
            generator = torch.Generator().manual_seed(self.seed * 7919 + epoch)
            picked.append(self.prompts[int(torch.randperm(len(self.prompts), generator=generator)[index])])
        return picked

    def step_seed(self, step: int) -> int:
        return (self.seed << 32) + step

    # -- advantages ------------------------------------------------------------------------------

    def estimate(self, batch: SampleBatch, old: Tensor, values: Tensor | None) -> Estimates:
        """Advantages from scores, KL and values; all statistics are those of the whole batch."""
        spec = self.spec
        kl = kl_estimators.k1(old, batch.ref_logprobs)
        scores = batch.scores
        if spec.score_clip is not None:
            scores = rewards.clip_scores(scores, -spec.score_clip, spec.score_clip)
        scores = rewards.penalize_missing_eos(scores, batch.ended, spec.missing_eos_penalty)
        if spec.whiten_scores:
            scores = whiten(scores)
        beta = self.kl_controller.value
        if spec.algorithm != "ppo":
            outcome = rewards.sequence_rewards(scores, kl, batch.lengths, beta)
            if spec.algorithm == "rloo":
                per_sample = estimators.rloo(outcome, batch.group)
            elif spec.algorithm == "reinforce":
                per_sample = estimators.reinforce(outcome)
                per_sample = whiten(per_sample) if spec.whiten_advantages else per_sample
            else:
                per_sample = estimators.grpo(outcome, batch.group, scale_by_std=spec.algorithm == "grpo")
            return Estimates(old, None, estimators.to_tokens(per_sample, batch.lengths), None, kl)
        assert values is not None
        token_rewards = rewards.token_rewards(scores, kl, batch.lengths, beta)
        if self.ppo.whiten_rewards:
            token_rewards = whiten(token_rewards, shift_mean=False)
        advantage, returns = estimators.gae(
            token_rewards, values, batch.lengths, gamma=self.ppo.gamma, lam=self.ppo.lam
        )
        if spec.whiten_advantages:
            advantage = whiten(advantage)
        return Estimates(old, values, advantage, returns, kl)

    # -- update ----------------------------------------------------------------------------------

    def update(self, batch: SampleBatch, step: int) -> dict[str, float]:
        """Optimizer steps on one batch; returns metrics."""
        spec = self.spec
        self.model.train()
        plan = self.plan(batch, step)
        estimates: Estimates | None = None
        policy_stats: list[losses.PolicyStats] = []
        value_stats: list[losses.ValueStats] = []
        norms: list[float] = []
        only_critic = step < self.ppo.critic.warmup_steps and spec.algorithm == "ppo"
        for number, minibatch in enumerate(plan):
            self.set_learning_rate(step + number / len(plan))
            totals = Totals(sum(len(m.tokens) for m in minibatch), sum(len(m.samples) for m in minibatch))
            if estimates is None and len(plan) == 1 and len(minibatch) == 1:
                # Strictly on-policy and in one piece: the update's own forward pass gives old values, too.
                forward = self.forward(minibatch[0])
                estimates = self.estimate(batch, *self.in_batch_order(batch, minibatch, [forward]))
                forwards: list[Forward | None] = [forward]
            else:
                if estimates is None:
                    whole = micro_batches(batch, self.groups(batch), spec.micro_batch_tokens)
                    estimates = self.estimate(batch, *self.in_batch_order(batch, whole))
                forwards = [None] * len(minibatch)
            for micro, forward_ in zip(minibatch, forwards, strict=True):
                loss, policy_stat, value_stat = self.loss(
                    batch, estimates, micro, forward_ or self.forward(micro), totals, only_critic
                )
                loss.backward()
                policy_stats.append(policy_stat)
                if value_stat is not None:
                    value_stats.append(value_stat)
                self.reporter.activity(f"updating {number + 1}/{len(plan)}")
            if self.ppo.ptx_coefficient and not only_critic:
                self.ptx_loss(step, number).backward()
            norms.append(self.optimizer_step())
            if spec.stop_kl is not None and stats.merge(policy_stats).means()["approx_kl"] > spec.stop_kl:
                break
        assert estimates is not None
        sequence_kl = segments.segment_sum(estimates.kl, batch.lengths).mean().item()
        beta = self.kl_controller.value
        self.kl_controller = self.kl_controller.update(sequence_kl, len(batch))
        drift = mismatch.mismatch_stats(estimates.old_logprobs, batch.engine_logprobs, spec.mismatch_cap)
        return {
            "kl_coefficient": beta,
            "entropy": -batch.engine_logprobs.mean().item(),
            "grad_norm": sum(norms) / len(norms),
            **{name: value for name, value in stats.merge(policy_stats).means().items() if name != "entropy"},
            **(stats.merge(value_stats).means() if value_stats else {}),
            **{f"mismatch_{name}": value for name, value in drift.means().items()},
        } | {"kl": sequence_kl}

    def groups(self, batch: SampleBatch) -> list[int]:
        return sorted(set(batch.group.tolist()))

    def plan(self, batch: SampleBatch, step: int) -> list[list[MicroBatch]]:
        """Micro-batches of every optimizer step: epochs x minibatches, prompts shuffled anew each epoch."""
        groups = self.groups(batch)
        plan = []
        for epoch in range(self.spec.epochs):
            order = groups
            if self.spec.minibatches > 1:
                generator = torch.Generator().manual_seed(self.step_seed(step) * 31 + epoch)
                order = [groups[index] for index in torch.randperm(len(groups), generator=generator).tolist()]
            for part in range(self.spec.minibatches):
                members = order[part :: self.spec.minibatches]
                plan.append(micro_batches(batch, members, self.spec.micro_batch_tokens))
        return [minibatch for minibatch in plan if minibatch]

    def forward(self, micro: MicroBatch) -> Forward:
        return self.model(pack(micro.groups, self.model.head_weight.device))

    def in_batch_order(
        self, batch: SampleBatch, minibatch: Sequence[MicroBatch], forwards: Sequence[Forward] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and values [T] of the whole batch, without a graph."""
        total = int(batch.lengths.sum())
        old, values = torch.zeros(total), torch.zeros(total)
        has_values = False
        for number, micro in enumerate(minibatch):
            if forwards is not None:
                forward = forwards[number]
            else:
                with torch.no_grad():
                    forward = self.forward(micro)
                self.reporter.activity(f"old log-probabilities {number + 1}/{len(minibatch)}")
            old[micro.tokens] = forward.logprobs.detach().cpu()
            if forward.values is not None:
                has_values = True
                values[micro.tokens] = forward.values.detach().cpu()
        return old, values if has_values else None

    def loss(
        self,
        batch: SampleBatch,
        estimates: Estimates,
        micro: MicroBatch,
        forward: Forward,
        totals: Totals,
        only_critic: bool,
    ) -> tuple[Tensor, losses.PolicyStats, losses.ValueStats | None]:
        """The micro-batch's share of the loss; shares add up to the loss of the optimizer step."""
        spec, device = self.spec, forward.logprobs.device
        old = estimates.old_logprobs[micro.tokens].to(device)
        engine = batch.engine_logprobs[micro.tokens].to(device)
        loss, policy_stat = self.policy_loss(
            forward,
            old,
            estimates.advantages[micro.tokens].to(device),
            mismatch.truncated_importance_weights(old, engine, spec.mismatch_cap),
            batch.lengths[micro.samples].to(device),
            totals,
        )
        if only_critic:
            loss = loss * 0.0
        if forward.values is None:
            return loss, policy_stat, None
        assert estimates.old_values is not None
        assert estimates.returns is not None
        value_loss, value_stat = losses.value_loss(
            forward.values,
            estimates.old_values[micro.tokens].to(device),
            estimates.returns[micro.tokens].to(device),
            denominator=totals.tokens,
            clip=self.ppo.critic.clip or None,
        )
        weight = self.ppo.critic.coefficient if self.model.shared_trunk else 1.0
        return loss + weight * value_loss, policy_stat, value_stat

    def policy_loss(
        self,
        forward: Forward,
        old: Tensor,
        advantages: Tensor,
        weights: Tensor,
        lengths: Tensor,
        totals: Totals,
    ) -> tuple[Tensor, losses.PolicyStats]:
        """The clipped surrogate with each algorithm's normalisation; see docs/algorithms.md."""
        spec, limit = self.spec, self.spec.generation.max_new_tokens
        clipping: dict[str, Any] = {"clip_low": spec.clip, "dual_clip": spec.dual_clip, "weights": weights}
        if spec.algorithm in ("ppo", "reinforce"):
            return losses.ppo_policy_loss(forward.logprobs, old, advantages, denominator=totals.tokens, **clipping)
        per_sample = segments.segment_mean(advantages, lengths)
        if spec.algorithm == "rloo":
            # The ratio is that of the whole sequence, so its correction for the engine is, too.
            per_sample = per_sample * segments.segment_sum(weights.log(), lengths).exp().clamp(max=spec.mismatch_cap)
            return losses.rloo_loss(
                forward.logprobs,
                old,
                per_sample,
                lengths,
                denominator=totals.samples,
                clip_low=spec.clip,
            )
        return losses.grpo_loss(
            forward.logprobs,
            old,
            per_sample,
            lengths,
            average="samples" if spec.algorithm == "grpo" else "tokens",
            denominator=totals.samples if spec.algorithm == "grpo" else totals.samples * limit,
            **clipping,
        )

    def ptx_loss(self, step: int, number: int) -> Tensor:
        """PPO-ptx (InstructGPT, equation 2): language-model loss on demonstrations."""
        generator = torch.Generator().manual_seed(self.step_seed(step) * 17 + number)
        picked = torch.randint(len(self.demonstrations), (self.spec.prompts_per_step,), generator=generator).tolist()
        batch = pack(
            [(self.demonstrations[i][0], [self.demonstrations[i][1]]) for i in picked], self.model.head_weight.device
        )
        return self.ppo.ptx_coefficient * losses.nll_loss(
            self.model.logprobs(batch), denominator=int(batch.lengths.sum())
        )

    def set_learning_rate(self, progress: float) -> None:
        """Warm-up and decay over the steps of the stage."""
        options, share = self.spec.optimizer, progress / self.spec.steps
        factor = 1.0
        if options.warmup_ratio and share < options.warmup_ratio:
            factor = (progress + 1) / (options.warmup_ratio * self.spec.steps + 1)
        elif options.schedule == "linear":
            factor = 1.0 - share
        elif options.schedule == "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * share))
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor

    def optimizer_step(self) -> float:
        """Clips policy and critic together, steps, and returns the gradient norm."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.spec.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    # -- weights, state, metrics -----------------------------------------------------------------

    def publish(self) -> float:
        self.reporter.activity("publishing weights")
        return self.policy.publish(self.model.payload(self.dtype))

    def save(self, step: int) -> None:
        self.reporter.activity("saving a checkpoint")
        self.checkpoints.save(
            step,
            {
                "model": self.model.trained_state(),
                "optimizer": self.optimizer.state_dict(),
                "kl_controller": asdict(self.kl_controller),
            },
        )

    def restore(self) -> int:
        """Loads the newest checkpoint; returns the steps that are done."""
        found = self.checkpoints.load()
        if found is None:
            return 0
        step, state = found
        self.model.load_trained_state(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.kl_controller = type(self.kl_controller)(**state["kl_controller"])
        self.reporter.note(f"continues after step {step}")
        return step

    def report(
        self, batch: SampleBatch, failed: int, metrics: dict[str, float], timing: dict[str, float]
    ) -> dict[str, float]:
        """Metrics of a step by name."""
        scores = Moments.of(batch.scores)
        return {
            "reward": scores.mean,
            "reward_std": scores.std,
            **{f"reward_{name}": Moments.of(values).mean for name, values in batch.parts.items()},
            "length": batch.lengths.float().mean().item(),
            "no_eos": 1.0 - batch.ended.float().mean().item(),
            "failed": float(failed),
            "weights_version": float(self.policy.version or 0),
            **metrics,
            **timing,
            "tokens_per_s": timing["generated_tokens"] / timing["seconds"],
        }
