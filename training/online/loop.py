"""Online reinforcement learning on one page.

    maximize  E[ r(x, y) ] - beta * KL(policy || reference)

    generate -> score -> reference log-probabilities -> advantages -> update -> publish weights -> checkpoint

    policy service  ~~ samples ~~>  reward service, reference service  ~~ scores, log-probabilities ~~>  trainer
          ^                                                                                                 |
          `----------------------------- weights as one transaction ----------------------------------------'

What a method makes of a batch, its advantages and its loss, is in `training/algorithms/NAME.py`; the loop knows no
method's name. Nothing that is not finite passes: samples, losses and gradients are left out and counted, and too many
of them, or a weight that is not finite, end the stage before it writes or publishes anything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from steersman.config.manifest import RlStage
from steersman.leaving import asked, leave, saves_between_steps
from training.algorithms import build
from training.algorithms.method import LossStats
from training.batch import SampleBatch
from training.context import Reporter
from training.mathematics.kl import AdaptiveKL, FixedKL
from training.online.ahead import Ahead
from training.online.checkpoint import Checkpoints
from training.online.checks import BadUpdates, check_finite_weights, check_same_model
from training.online.experience import Collector, Experience
from training.online.mask_policy import MaskPolicy
from training.online.metrics import sequence_kl, update_metrics
from training.online.optimizer import PolicyOptimizer
from training.online.passes import Pair, Passes
from training.online.policy_model import PolicyModel
from training.online.pool import PolicyPool
from training.online.rollout import Prompt, Rollouts, warn_of_cut_answers
from training.online.watch import Found, Watcher
from training.parallel import Ranks


class RlLoop:
    """The loop and the update; services, prompts and checkpoints come from outside."""

    def __init__(
        self,
        spec: RlStage,
        model: PolicyModel,
        rollouts: Rollouts,
        policy: PolicyPool,
        prompts: Sequence[Prompt],
        checkpoints: Checkpoints,
        reporter: Reporter,
        *,
        seed: int,
        demonstrations: Sequence[Pair] = (),
        ranks: Ranks = Ranks(),
        watcher: Watcher | None = None,
    ) -> None:
        """Args:
        rollouts, policy: only rank 0 uses them.
        demonstrations: for PPO-ptx.
        ranks: this process among those that train together; the model is sharded already.
        watcher: of rank 0, where `spec.watch` asks for one.
        """
        self.spec = spec
        self.method = build(spec)
        self.model = model
        self.policy = policy
        self.checkpoints = checkpoints
        self.reporter = reporter
        self.demonstrations = demonstrations
        self.ranks = ranks
        self.watcher = watcher
        if self.method.mask is not None:
            model.mask = MaskPolicy(model.policy, self.method.mask.top_p, self.method.mask.refresh_every)
        critic = self.method.critic
        self.optimizer = PolicyOptimizer(model, spec.optimizer, critic.learning_rate if critic else None, ranks)
        self.passes = Passes(spec, self.method, model, ranks, reporter, seed)
        self.kl_controller: FixedKL | AdaptiveKL = FixedKL(spec.kl_coefficient)
        if spec.adaptive_kl is not None:
            self.kl_controller = AdaptiveKL(spec.kl_coefficient, spec.adaptive_kl.target, spec.adaptive_kl.horizon)
        self.steps_of_version: dict[int, int] = {}
        """Steps that were done when a weights version was published."""
        self.collector = Collector(
            spec, self.method, rollouts, prompts, seed, lambda version: self.steps_of_version.get(version, 0)
        )
        self._bad = BadUpdates()

    def run(self) -> None:
        """All steps that are not done yet."""
        done, ready = self.restore()
        self.publish(done)
        self.watch(done, begins=True)
        steps = range(done, done if self._stopped() else self.spec.steps)
        with saves_between_steps(), Ahead(self.collector.collect, steps, self.spec.max_staleness, ready) as ahead:
            for step in steps:
                started = time.monotonic()
                experience = self.ranks.from_first(ahead.take)
                collected = time.monotonic()
                metrics = self.update(experience.batch, step)
                if step == done and not ready:
                    check_same_model(metrics["mismatch_mean_abs"], exact=self._exact())
                check_finite_weights(self.ranks.all(self.model.is_finite()), step + 1)
                updated = time.monotonic()
                going = not self.ranks.all(not asked())
                keep = going or (step + 1) % self.spec.checkpoint_every == 0 or step + 1 == self.spec.steps
                begun = ahead.finished() if keep and self.ranks.is_first else []
                publishing = 0.0 if going else self.publish(step + 1)
                looked = self.watch(step + 1) if not going else None
                stops = looked is not None and looked.stop
                row = {
                    **experience.metrics,
                    **metrics,
                    **(looked.metrics if looked is not None else {}),
                    "weights_version": float(self.policy.version or 0) if self.ranks.is_first else 0.0,
                    "seconds_update": updated - collected,
                    "seconds_publish": publishing,
                    "seconds": time.monotonic() - started,
                }
                row["tokens_per_s"] = row["generated_tokens"] / row["seconds"]
                if keep or looked is not None:
                    self.save(step + 1, row, begun)
                self.reporter.step(step + 1, self.spec.steps, **row)
                if step == 0:
                    warn_of_cut_answers(row.get("no_eos", 0.0), self.spec.generation, self.reporter)
                if going:
                    leave()
                if stops:
                    self.reporter.note(f"rl.watch ends the training after step {step + 1}")
                    break

    # -- update ----------------------------------------------------------------------------------

    def update(self, batch: SampleBatch, step: int) -> dict[str, float]:
        """Optimizer steps on one batch; returns metrics."""
        spec, method = self.spec, self.method
        self.model.train()
        only_critic = method.critic is not None and step < method.critic.warmup_steps
        plan = self.passes.plan(batch, step)
        made = self.passes.first(plan, only_critic)
        estimates = method.estimate(batch, *self.passes.old(batch, plan, made), self.kl_controller.value)
        collected: list[LossStats] = []
        norms: list[dict[str, float]] = []
        bad = 0.0
        for number, minibatch in enumerate(plan):
            self.reporter.activity(f"updating {number + 1}/{len(plan)}")
            found = self.passes.backward(batch, estimates, minibatch, only_critic, None if number else made)
            if not found.policy.count:
                continue  # nothing to learn: not even the optimizer's momentum may move the weights
            if spec.stop_kl is not None and found.policy.means()["approx_kl"] > spec.stop_kl:
                collected.append(found)
                self.optimizer.clear()
                break
            if method.ptx_coefficient and not only_critic:
                self.passes.demonstrations_backward(self.demonstrations, method.ptx_coefficient, step, number)
            progress = (step + (number + 0.5) / len(plan)) / spec.steps
            norm = None
            if math.isfinite(found.policy.loss + found.value.loss):
                norm = self.optimizer.step(progress, only_critic=only_critic)
            self._bad.saw(norm is not None, step)
            if norm is None:
                self.optimizer.clear()
                bad += 1
            else:
                collected.append(found)
                norms.append(norm)
        if self.model.mask is not None:
            self.model.mask.after(step + 1)
        beta = self.kl_controller.value
        self.kl_controller = self.kl_controller.update(sequence_kl(batch, estimates), len(batch))
        metrics = update_metrics(batch, estimates, collected, norms, spec.mismatch_cap)
        return {"kl_coefficient": beta, "bad_updates": bad, **metrics}

    # -- over-optimisation -----------------------------------------------------------------------

    def watch(self, step: int, *, begins: bool = False) -> Found | None:
        """Looks at the published policy where one is due; every rank must call it.

        Args:
            begins: what a killed run has looked at and does again is forgotten first.
        """
        if self.spec.watch is None:
            return None

        def look() -> Found | None:
            assert self.watcher is not None
            if begins:
                self.watcher.restart(step)
            return self.watcher.look(step) if self.watcher.due(step) else None

        found = self.ranks.from_first(look)
        if found is not None and found.keep:
            state = self.model.trained_state()
            if self.watcher is not None:
                self.watcher.keep(state)
        return found

    def _stopped(self) -> bool:
        """Whether a look had ended the training when the process was stopped."""
        return self.spec.watch is not None and self.ranks.from_first(
            lambda: self.watcher is not None and self.watcher.stopped
        )

    # -- weights and state -----------------------------------------------------------------------

    def _exact(self) -> bool:
        """Whether trainer and engine compute in fp32."""
        served = self.ranks.from_first(lambda: _dtype(self.policy.info().model.dtype))
        return self.model.precision == "fp32" and served == torch.float32

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

    def save(self, step: int, row: dict[str, float], begun: Sequence[Experience] = ()) -> None:
        """Writes everything that the run needs to go on as if it had not stopped.

        Args:
            row: the step's metrics; a process that is killed before it reports them does it when it continues.
            begun: batches of the next steps, made ahead.
        """
        self.reporter.activity("saving a checkpoint")
        state = {
            "model": self.model.trained_state(),
            "optimizer": self.optimizer.state(),
            "kl_controller": asdict(self.kl_controller),
            "row": row,
            "begun": [experience.state() for experience in begun],
            "mask": None if self.model.mask is None else self.model.mask.state(),
        }
        if self.ranks.is_first:
            self.checkpoints.save(step, state)

    def restore(self) -> tuple[int, list[Experience]]:
        """Loads the newest good checkpoint; returns the steps that are done and the batches made ahead."""
        found = self.checkpoints.load(self.reporter.note)
        self.ranks.barrier()
        if found is None:
            return 0, []
        step, state = found
        self.model.load_trained_state(state["model"])
        if self.model.mask is not None:
            self.model.mask.load(state["mask"])
        self.optimizer.load(state["optimizer"])
        self.kl_controller = type(self.kl_controller)(**state["kl_controller"])
        self.reporter.step(step, self.spec.steps, **state["row"])
        self.reporter.note(f"continues after step {step}")
        return step, [Experience.of(one) for one in state["begun"]]


def _dtype(name: str) -> Any:
    return torch.bfloat16 if name in ("bf16", "bfloat16") else torch.float32
