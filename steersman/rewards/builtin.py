"""The rewards that come along."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from steersman.errors import ConfigError, UnavailableError
from steersman.rewards.registry import Messages, Reward, Verdict, register


@register("exact-facts")
def exact_facts(field: str = "needed") -> Reward:
    """Share of the values in `facts[field]` that the answer states, word by word, case ignored."""

    def reward(prompt: Messages, answer: str, facts: Mapping[str, Any]) -> Verdict:
        needed = facts.get(field)
        if not isinstance(needed, list) or not needed:
            raise ValueError(f"facts.{field} must be a list with at least one value")
        found = [re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", answer, re.IGNORECASE) for value in needed]
        return Verdict(sum(match is not None for match in found) / len(needed))

    return reward


@register("regex")
def regex(pattern: str, match: float = 1.0, miss: float = 0.0) -> Reward:
    """`match` where the pattern occurs in the answer, else `miss`."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"reward regex: pattern {pattern!r} is not a regular expression ({error})") from None
    return lambda prompt, answer, facts: Verdict(match if compiled.search(answer) else miss)


@register("json-schema")
def json_schema(schema: Mapping[str, Any]) -> Reward:
    """1 where the answer, or its first tool call's arguments, is JSON that satisfies the schema, else 0."""
    import jsonschema

    try:
        validator = jsonschema.validators.validator_for(schema)(schema)
        validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"reward json-schema: schema is wrong ({error.message})") from None

    def reward(prompt: Messages, answer: str, facts: Mapping[str, Any]) -> Verdict:
        call = re.search(r"<tool_call>\s*(\{.*\})\s*</tool_call>", answer, re.DOTALL)
        try:
            value = json.loads(call.group(1))["arguments"] if call else json.loads(answer)
        except (ValueError, KeyError):
            return Verdict(0.0)
        return Verdict(float(validator.is_valid(value)))

    return reward


@register("http")
def http(url: str, timeout_seconds: float = 10.0, headers: Mapping[str, str] | None = None) -> Reward:
    """Asks an HTTP scorer: POST {"messages", "answer", "facts"}, answer {"reward": number, "criteria": {...}}."""
    import httpx

    from steersman.net import guarded_sync_client

    client = guarded_sync_client(timeout=timeout_seconds, headers=dict(headers or {}))

    def reward(prompt: Messages, answer: str, facts: Mapping[str, Any]) -> Verdict:
        body = {"messages": [dict(message) for message in prompt], "answer": answer, "facts": dict(facts)}
        try:
            response = client.post(url, json=body)
            response.raise_for_status()
            data = response.json()
            return Verdict(float(data["reward"]), {k: float(v) for k, v in data.get("criteria", {}).items()})
        except httpx.HTTPError as error:
            raise UnavailableError(f"{url}: {error}") from None
        except (ValueError, KeyError, TypeError):
            raise UnavailableError(f'{url}: the answer must be JSON like {{"reward": 0.5}}') from None

    return reward


@register("demo-rubric")
def demo_rubric() -> Reward:
    """The written rubric of the demo's data."""
    from steersman.demo.rubric import score

    def reward(prompt: Messages, answer: str, facts: Mapping[str, Any]) -> Verdict:
        criteria = score(prompt, answer, facts).model_dump()
        return Verdict(criteria["total"], criteria)

    return reward
