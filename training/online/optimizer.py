"""The optimizer of policy and critic: learning-rate schedule, clipping of each by its norm, state for checkpoints."""

from __future__ import annotations

import math
from typing import Any

import torch

from steersman.config.manifest import Optimizer
from training.online.policy_model import PolicyModel
from training.parallel import Ranks, sharded_like, whole
from training.schedule import learning_rate_factor


class PolicyOptimizer:
    """AdamW with eps 1e-5, as the Adam of lm-human-preferences; the critic has a learning rate of its own."""

    def __init__(
        self, model: PolicyModel, options: Optimizer, critic_learning_rate: float | None, ranks: Ranks
    ) -> None:
        self._options = options
        self._ranks = ranks
        self._policy, self._critic = model.policy_parameters(), model.critic_parameters()
        groups = [{"params": self._policy, "lr": options.learning_rate, "weight_decay": options.weight_decay}]
        if self._critic:
            assert critic_learning_rate is not None
            groups.append({"params": self._critic, "lr": critic_learning_rate, "weight_decay": 0.0})
        # fused: one kernel for all parameters; it takes no mixture of sharded and whole ones.
        kernel = {"fused": True} if ranks.world == 1 else {"foreach": False}
        self._adam = torch.optim.AdamW(groups, eps=1e-5, **kernel)  # type: ignore[arg-type]
        self._rates = [group["lr"] for group in self._adam.param_groups]

    def step(self, progress: float, *, only_critic: bool = False) -> dict[str, float] | None:
        """One update from the gradients, which are cleared.

        Policy and critic are clipped each by its own norm: a critic whose errors are large must not shrink the policy's
        step.

        Args:
            progress: share of the stage that is done, 0 to 1.
            only_critic: the policy stays bit for bit as it is, and so does its optimizer state.

        Returns:
            The norms before clipping, by metric name; None: one was not finite and no update was made.
        """
        if only_critic:
            for parameter in self._policy:
                parameter.grad = None
        parts = {} if only_critic else {"grad_norm": self._policy}
        if self._critic:
            parts["critic_grad_norm"] = self._critic
        factor = learning_rate_factor(self._options, progress)
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._ranks.finish_gradients([parameter for part in parts.values() for parameter in part])
        norms = {name: self._ranks.clip(part, self._options.max_grad_norm) for name, part in parts.items()}
        finite = all(map(math.isfinite, norms.values()))
        if finite:
            self._adam.step()
        self.clear()
        return norms if finite else None

    def clear(self) -> None:
        """Forgets the gradients."""
        self._adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint needs, tensors gathered from all ranks."""
        return whole(self._adam.state_dict())

    def load(self, state: dict[str, Any]) -> None:
        """Restores what `state` gave, also on another number of ranks."""
        parameters = [parameter for group in self._adam.param_groups for parameter in group["params"]]
        for index, values in state["state"].items():
            for name, value in values.items():
                if value.shape == parameters[index].shape:
                    values[name] = sharded_like(value, parameters[index])
        for saved, own in zip(state["param_groups"], self._adam.param_groups, strict=True):
            saved.update(fused=own["fused"], foreach=own["foreach"])
        self._adam.load_state_dict(state)
