"""Opens what a stage needs of the services, and checks that they fit the model before any GPU time is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from steersman.config.manifest import Generation
from steersman.config.stages import weights_folder
from steersman.errors import ConfigError, FailedPreconditionError
from steersman.nn.load import load_tokenizer
from steersman.nn.tokens import generation_config_of, stop_ids, tokenizer_fingerprint
from steersman.rpc.client import Access
from training.context import StageContext
from training.online.clients import PolicyReplica, ReferenceClient, RewardClient
from training.online.pool import PolicyPool
from training.online.prompts import Limit, load_prompts
from training.online.rollout import Prompt, Rollouts


class Services:
    """The three services as one stage sees them, and the tokenizer that they share; a context manager."""

    def __init__(self, context: StageContext, model: Path, *, reference: bool) -> None:
        """Args:
        model: folder of the model whose tokenizer everything uses.
        reference: connect to the reference service.

        Raises:
            ConfigError: endpoints are missing.
            UnavailableError: a service does not answer.
            FailedPreconditionError: a service has another vocabulary.
        """
        spec = context.spec.services
        self.context = context
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(model, context.spec.model.template_options)
        self.stop_ids = stop_ids(self.tokenizer, generation_config_of(model))
        self._fingerprint = fingerprint = tokenizer_fingerprint(self.tokenizer)
        note, patience = context.reporter.note, spec.start_timeout_seconds
        needed = {"policy": spec.policy, "reward": spec.reward} | ({"reference": spec.reference} if reference else {})
        for name, service in needed.items():
            if not service.endpoints:
                raise ConfigError(f"services.{name}.endpoints is empty; give host:port of the running service")
        if len(spec.policy.weights_endpoints) != len(spec.policy.endpoints):
            raise ConfigError("services.policy.weightsEndpoints needs an address for each policy endpoint")
        access = {name: Access.to(service, f"services.{name}") for name, service in needed.items()}
        replicas = [
            PolicyReplica(target, weights, patience, note, access["policy"])
            for target, weights in zip(spec.policy.endpoints, spec.policy.weights_endpoints, strict=True)
        ]
        self.policy = PolicyPool(replicas, fingerprint, weights_folder(context.run, context.run_dir))
        self.reward = [
            RewardClient(target, fingerprint, patience, note, access["reward"]) for target in spec.reward.endpoints
        ]
        self.reference = [
            ReferenceClient(target, fingerprint, patience, note, access["reference"])
            for target in spec.reference.endpoints
            if reference
        ]
        info = self.policy.info()
        self.max_context = info.model.max_context
        if info.model.tokenizer_fingerprint != fingerprint:
            raise FailedPreconditionError(
                f"the policy service at {spec.policy.endpoints[0]} has another tokenizer than {model}; "
                "start it with the model of this run"
            )

    def __enter__(self) -> Services:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends running calls, so that a process that failed does not wait for them."""
        clients: list[Any] = [self.policy, *self.reward, *self.reference]
        for client in clients:
            client.close()

    def prompts(self, kind: str, generation: Generation) -> list[Prompt]:
        """Prompts of a split (`train` or `heldout`) that leave room for an answer."""
        path = getattr(self.context.files("prompts"), kind)
        if path is None:
            raise ConfigError(f"data.prompts.{kind} is missing; add the file")
        room = self.max_context - generation.max_new_tokens
        return load_prompts(path, self.tokenizer, room, self.limits_of_rewards(generation.max_new_tokens))

    def limits_of_rewards(self, room: int) -> list[Limit]:
        """Of every reward model that reads the policy's tokens; `room` is what an answer may take."""
        found = []
        for scorer in self.reward[0].info().scorers:
            model = scorer.model
            if model.max_context and model.tokenizer_fingerprint == self._fingerprint:
                of = f"reward model {scorer.name}, which takes {model.max_context} tokens with the answer,"
                mend = f"or lower generation.maxNewTokens ({room}), or train the reward model with a larger maxLength"
                found.append(Limit(model.max_context - room, of, mend))
        return found

    def ids_of_stops(self, generation: Generation) -> list[int]:
        """Token ids of `generation.stop`; ConfigError where a text is not one token."""
        found = []
        for text in generation.stop:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise ConfigError(
                    f"generation.stop: {text!r} is {len(ids)} tokens of this model; give texts of one token"
                )
            found += ids
        return found

    def decode(self, token_ids: np.ndarray) -> str:
        """Text of an answer without special tokens and without its end."""
        said = [token for token in token_ids.tolist() if token not in self.stop_ids]
        return str(self.tokenizer.decode(said, skip_special_tokens=True)).strip()

    def rollouts(
        self, generation: Generation, *, deterministic: bool = False, mask_top_p: float | None = None
    ) -> Rollouts:
        return Rollouts(
            self.policy,
            self.reward,
            self.reference,
            self.decode,
            generation,
            [*self.stop_ids, *self.ids_of_stops(generation)],
            self.context.reporter.activity,
            standardised=self.reward[0].standardised(),
            deterministic=deterministic,
            mask_top_p=mask_top_p,
        )
