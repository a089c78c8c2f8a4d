"""Online reinforcement learning: PPO and its critic-free relatives on one page.

    maximize  E[ r(x, y) ] - beta * KL(policy || reference)

    generate -> score -> reference log-probabilities -> advantages -> update -> checkpoint -> publish weights

    policy service  ~~ samples ~~>  reward service, reference service  ~~ scores, log-probabilities ~~>  trainer
          ^                                                                                                 |
          `----------------------------- weights as one transaction ----------------------------------------'

PPO (Schulman et al. 2017; Ziegler et al. 2019): per-token reward -beta * (logp - ref) with the score on
the last token, GAE, clipped losses. RLOO, GRPO, Dr. GRPO and REINFORCE (training.mathematics.advantages)
share everything but the advantage and need no critic.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.config.manifest import PpoSpec, RlStage
from steersman.errors import FailedPreconditionError
from steersman.nn.packed import pack
from training.mathematics import advantages as estimators
from training.mathematics import kl as kl_estimators
from training.mathematics import losses, mismatch, rewards, segments, stats
from training.mathematics.kl import AdaptiveKL, FixedKL
from training.mathematics.moments import Moments, whiten
from training.online.ahead import Ahead
from training.online.batch import MicroBatch, SampleBatch, micro_batches, token_chunks
from training.online.checkpoint import Checkpoints
from training.online.clients import PolicyPool
from training.online.optimizer import PolicyOptimizer
from training.online.policy_model import Forward, PolicyModel
from training.online.rollout import Prompt, Rollouts, exclude_failed, exclude_stale, to_batch
from training.parallel import Ranks

Pair = tuple[np.ndarray, np.ndarray]
"""(prompt ids, answer ids)"""
OTHER_MODEL = 0.5
"""Nats a token between engine and trainer that no rounding explains; bf16 differs by 0.04 at most."""


@dataclass(frozen=True, eq=False)
class Estimates:
    """What one batch teaches, from the policy that is about to be updated."""

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
    """Response tokens and samples of a whole optimizer step, over all micro-batches and ranks."""

    tokens: int
    samples: int


@dataclass(frozen=True)
class Experience:
    """Everything rank 0 has collected for one step."""

    batch: SampleBatch
    metrics: dict[str, float]


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
        demonstrations: Sequence[Pair] = (),
        ranks: Ranks = Ranks(),
    ) -> None:
        """Args:
        rollouts, policy: only rank 0 uses them.
        demonstrations: for PPO-ptx.
        ranks: this process among those that train together; the model is sharded already.
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
        self.ranks = ranks
        self.optimizer = PolicyOptimizer(model, spec.optimizer, self.ppo.critic.learning_rate, ranks)
        self.kl_controller: FixedKL | AdaptiveKL = FixedKL(spec.kl_coefficient)
        if spec.adaptive_kl is not None:
            adaptive = spec.adaptive_kl
            self.kl_controller = AdaptiveKL(spec.kl_coefficient, adaptive.target, adaptive.horizon)
        self.steps_of_version: dict[int, int] = {}
        """Steps that were done when a weights version was published."""

    def run(self) -> None:
        """All steps that are not done yet."""
        done = self.restore()
        self.publish(done)
        with Ahead(self.collect, range(done, self.spec.steps), self.spec.max_staleness) as ahead:
            for step in range(done, self.spec.steps):
                started = time.monotonic()
                experience = self.ranks.from_first(ahead.take)
                collected = time.monotonic()
                metrics = self.update(experience.batch, step)
                if step == done:
                    check_same_model(metrics["mismatch_mean_abs"])
                updated = time.monotonic()
                if (step + 1) % self.spec.checkpoint_every == 0 or step + 1 == self.spec.steps:
                    self.save(step + 1)
                publishing = self.publish(step + 1)
                if self.ranks.is_first:
                    timing = {
                        "weights_version": float(self.policy.version or 0),
                        "seconds_update": updated - collected,
                        "seconds_publish": publishing,
                        "seconds": time.monotonic() - started,
                    }
                    self.report(step + 1, {**experience.metrics, **metrics, **timing})

    # -- experience ------------------------------------------------------------------------------

    def collect(self, step: int) -> Experience:
        """Generates and scores the samples of a step."""
        spec = self.spec
        prompts = self.prompts_of(step)
        scored, timing = self.rollouts.collect(
            prompts, spec.samples_per_prompt, self.step_seed(step), in_flight=spec.max_staleness > 0
        )
        batch, failed = exclude_failed(to_batch(prompts, scored), scored, spec.max_failed_share)
        metrics = {"failed": float(failed), **timing}
        if spec.max_staleness:
            ages = step - torch.tensor([self.steps_of_version.get(v, step) for v in batch.versions.tolist()])
            batch, stale = exclude_stale(batch, ages, spec.max_staleness)
            metrics |= {"staleness": ages.float().mean().item(), "stale": float(stale)}
        scores = Moments.of(batch.scores)
        return Experience(
            batch,
            {
                "reward": scores.mean,
                "reward_std": scores.std,
                **{f"reward_{name}": Moments.of(values).mean for name, values in batch.parts.items()},
                "length": batch.lengths.float().mean().item(),
                "no_eos": 1.0 - batch.ended.float().mean().item(),
                **metrics,
            },
        )

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
        only_critic = spec.algorithm == "ppo" and step < self.ppo.critic.warmup_steps
        plan = self.plan(batch, step)
        first: list[Forward] = []
        if len(plan) == 1 and len(plan[0]) == 1 and self.ranks.world == 1:
            # Strictly on-policy and in one piece: the update's own forward pass gives the old values, too.
            first = [self.forward(plan[0][0], only_critic)]
            estimates = self.estimate(batch, *self.in_batch_order(batch, plan[0], first))
        else:
            whole = micro_batches(batch, self.groups(batch), spec.micro_batch_tokens)
            estimates = self.estimate(batch, *self.in_batch_order(batch, whole))
        collected: list[Gathered] = []
        norms: list[float] = []
        for number, minibatch in enumerate(plan):
            self.reporter.activity(f"updating {number + 1}/{len(plan)}")
            gathered = self.backward(batch, estimates, minibatch, only_critic, first)
            collected.append(gathered)
            if spec.stop_kl is not None and gathered.policy.means()["approx_kl"] > spec.stop_kl:
                self.optimizer.clear()
                break
            if self.ppo.ptx_coefficient and not only_critic:
                self.ptx_backward(step, number)
            progress = (step + (number + 0.5) / len(plan)) / spec.steps
            norms.append(self.optimizer.step(progress, only_critic=only_critic))
        return self.metrics_of(batch, estimates, collected, norms)

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

    def forward(self, micro: MicroBatch, only_critic: bool = False) -> Forward:
        return self.model(pack(micro.groups, self.model.head_weight.device), detach_values=only_critic)

    def in_batch_order(
        self, batch: SampleBatch, minibatch: Sequence[MicroBatch], forwards: Sequence[Forward] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and values [T] of the whole batch, without a graph."""
        total = int(batch.lengths.sum())
        old, values = torch.zeros(total), torch.zeros(total)
        for number, (micro, counts) in enumerate(self.ranks.share(minibatch)):
            if forwards:
                forward = forwards[number]
            else:
                self.reporter.activity(f"old log-probabilities {number + 1}")
                with torch.no_grad():
                    forward = self.forward(micro)
            if counts:
                old[micro.tokens] = forward.logprobs.detach().cpu()
                if forward.values is not None:
                    values[micro.tokens] = forward.values.detach().cpu()
        has_values = self.model.value_head is not None
        return self.ranks.add(old), self.ranks.add(values) if has_values else None

    def backward(
        self,
        batch: SampleBatch,
        estimates: Estimates,
        minibatch: Sequence[MicroBatch],
        only_critic: bool,
        forwards: list[Forward],
    ) -> Gathered:
        """Gradients of one optimizer step; the micro-batches' shares add up to its loss.

        Args:
            forwards: forward passes that were made already, used up here.
        """
        totals = Totals(sum(len(m.tokens) for m in minibatch), sum(len(m.samples) for m in minibatch))
        parts: list[Gathered] = []
        for micro, counts in self.ranks.share(minibatch):
            forward = forwards.pop(0) if forwards else self.forward(micro, only_critic)
            loss, part = self.loss(batch, estimates, micro, forward, totals, only_critic)
            (loss * (self.ranks.scale if counts else 0.0)).backward()
            if counts:
                parts.append(part)
        policy = stats.merge([losses.PolicyStats(), *(part.policy for part in parts)])
        value = stats.merge([losses.ValueStats(), *(part.value for part in parts)])
        return Gathered(self.ranks.merge(policy), self.ranks.merge(value))

    def loss(
        self,
        batch: SampleBatch,
        estimates: Estimates,
        micro: MicroBatch,
        forward: Forward,
        totals: Totals,
        only_critic: bool,
    ) -> tuple[Tensor, Gathered]:
        """The micro-batch's share of the loss."""
        device = forward.logprobs.device
        old = estimates.old_logprobs[micro.tokens].to(device)
        engine = batch.engine_logprobs[micro.tokens].to(device)
        loss, policy_stats = self.policy_loss(
            forward,
            old,
            estimates.advantages[micro.tokens].to(device),
            mismatch.truncated_importance_weights(old, engine, self.spec.mismatch_cap),
            batch.lengths[micro.samples].to(device),
            totals,
        )
        if forward.values is None:
            return loss, Gathered(policy_stats, losses.ValueStats())
        assert estimates.old_values is not None
        assert estimates.returns is not None
        value_loss, value_stats = losses.value_loss(
            forward.values,
            estimates.old_values[micro.tokens].to(device),
            estimates.returns[micro.tokens].to(device),
            denominator=totals.tokens,
            clip=self.ppo.critic.clip or None,
        )
        value_loss = value_loss * (self.ppo.critic.coefficient if self.model.shared_trunk else 1.0)
        return value_loss if only_critic else loss + value_loss, Gathered(policy_stats, value_stats)

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
                forward.logprobs, old, per_sample, lengths, denominator=totals.samples, clip_low=spec.clip
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

    def ptx_backward(self, step: int, number: int) -> None:
        """PPO-ptx (InstructGPT, equation 2): adds the gradient of the language-model loss on demonstrations."""
        generator = torch.Generator().manual_seed(self.step_seed(step) * 17 + number)
        picked = torch.randint(len(self.demonstrations), (self.spec.prompts_per_step,), generator=generator).tolist()
        pairs = [self.demonstrations[index] for index in picked]
        tokens = sum(len(answer) for _, answer in pairs)
        for chunk, counts in self.ranks.share(token_chunks(pairs, self.spec.micro_batch_tokens)):
            packed = pack([(prompt, [answer]) for prompt, answer in chunk], self.model.head_weight.device)
            loss = losses.nll_loss(self.model.logprobs(packed), denominator=tokens)
            (loss * (self.ppo.ptx_coefficient * self.ranks.scale if counts else 0.0)).backward()

    def metrics_of(
        self, batch: SampleBatch, estimates: Estimates, collected: Sequence[Gathered], norms: Sequence[float]
    ) -> dict[str, float]:
        """Metrics of an update; the KL coefficient follows."""
        sequence_kl = segments.segment_sum(estimates.kl, batch.lengths).mean().item()
        beta = self.kl_controller.value
        self.kl_controller = self.kl_controller.update(sequence_kl, len(batch))
        policy = stats.merge([gathered.policy for gathered in collected])
        value = stats.merge([gathered.value for gathered in collected])
        drift = mismatch.mismatch_stats(estimates.old_logprobs, batch.engine_logprobs, self.spec.mismatch_cap)
        metrics = {
            "kl_coefficient": beta,
            "entropy": -batch.engine_logprobs.mean().item(),
            "policy_loss": policy.loss / max(policy.count, 1.0),
            "grad_norm": sum(norms) / max(len(norms), 1),
            "updates": float(len(norms)),
            **{name: number for name, number in policy.means().items() if name != "entropy"},
            **(value.means() if value.count else {}),
            **{f"mismatch_{name}": number for name, number in drift.means().items()},
        }
        return metrics | {"kl": sequence_kl}

    # -- weights, state, metrics -----------------------------------------------------------------

    def publish(self, steps: int) -> float:
        """Loads the weights after `steps` steps on every policy replica; returns the seconds it took."""
        self.reporter.activity("publishing weights")
        dtype = self.ranks.from_first(lambda: _dtype(self.policy.info().model.dtype))
        payload = self.model.payload(dtype)
        if not self.ranks.is_first:
            return 0.0
        seconds = self.policy.publish(payload)
        assert self.policy.version is not None
        self.steps_of_version[self.policy.version] = steps
        return seconds

    def save(self, step: int) -> None:
        self.reporter.activity("saving a checkpoint")
        state = {
            "model": self.model.trained_state(),
            "optimizer": self.optimizer.state(),
            "kl_controller": asdict(self.kl_controller),
        }
        if self.ranks.is_first:
            self.checkpoints.save(step, state)

    def restore(self) -> int:
        """Loads the newest checkpoint; returns the steps that are done."""
        found = self.checkpoints.load()
        self.ranks.barrier()
        if found is None:
            return 0
        step, state = found
        self.model.load_trained_state(state["model"])
        self.optimizer.load(state["optimizer"])
        self.kl_controller = type(self.kl_controller)(**state["kl_controller"])
        self.reporter.note(f"continues after step {step}")
        return step

    def report(self, step: int, metrics: dict[str, float]) -> None:
        metrics["tokens_per_s"] = metrics["generated_tokens"] / metrics["seconds"]
        self.reporter.step(step, self.spec.steps, **metrics)


@dataclass(frozen=True)
class Gathered:
    """Statistics of an optimizer step; those of values are empty without a critic."""

    policy: losses.PolicyStats
    value: losses.ValueStats


def check_same_model(difference: float) -> None:
    """Raises FailedPreconditionError unless the policy service samples from the trainer's model.

    Args:
        difference: mean absolute difference of a token's log-probability in the first batch, for which the weights of
            both are the same, in nats.
    """
    if not difference <= OTHER_MODEL:  # also where it is no number
        raise FailedPreconditionError(
            f"the policy service's log-probabilities differ from the trainer's by {difference:.2f} nats a token "
            f"(rounding explains 0.04), so it serves another model; start it with the model that this stage trains"
        )


def _dtype(name: str) -> torch.dtype:
    return torch.bfloat16 if name in ("bf16", "bfloat16") else torch.float32
