"""What `steersman eval` asks: a model folder or a run, which are served for the while, or an endpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from steersman.errors import ConfigError, UnavailableError
from steersman.progress import ConsoleReporter
from steersman.suites.asked import SuiteResult, ask
from steersman.suites.asking import Decoding, Endpoint
from steersman.suites.schema import Suite


def names_of(targets: Sequence[str]) -> list[str]:
    """A short name for every target, in order; those that would be the same get numbers.

    Raises:
        ConfigError: a target stands there twice.
    """
    if len(set(targets)) < len(targets):
        raise ConfigError(f"{max(targets, key=list(targets).count)} is named twice; name every model once")
    names: list[str] = []
    for target in targets:
        name = target.split("://", 1)[1].rstrip("/") if is_url(target) else Path(target).resolve().name
        taken = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({taken + 1})" if taken else name)
    return names


def is_url(target: str) -> bool:
    return target.startswith(("http://", "https://"))


@contextmanager
def opened(target: str, model: str | None, key_env: str | None) -> Iterator[Endpoint]:
    """The target as an endpoint; a folder is served, a run as its customers meet it: with its gateway and tools."""
    if is_url(target):
        with Endpoint(target, model, key_env=key_env) as endpoint:
            yield endpoint
        return
    from steersman.local.serve import serving

    with (
        tempfile.TemporaryDirectory(prefix="steersman-eval-") as logs,
        serving(Path(target), Path(logs), {}, None) as served,
        Endpoint(f"{served.url}/v1", served.name) as endpoint,
    ):
        yield endpoint


def ask_all(
    targets: Sequence[str],
    suites: Sequence[Suite],
    decodings: Sequence[Decoding],
    *,
    samples: int,
    max_tokens: int,
    seed: int,
    concurrency: int,
    model: str | None = None,
    key_env: str | None = None,
) -> list[SuiteResult]:
    """Every suite with every decoding of every target, target after target."""
    results = []
    for target, name in zip(targets, names_of(targets), strict=True):
        with ConsoleReporter(name) as reporter:
            reporter.activity("opening the model")
            with opened(target, model, key_env) as endpoint:
                for suite in suites:
                    for decoding in decodings:
                        reporter.activity(f"suite {suite.name}, {decoding.name}")
                        result = ask(
                            suite, name, endpoint.converse, decoding, samples=samples, max_tokens=max_tokens, seed=seed,
                            concurrency=concurrency,
                        )  # fmt: skip
                        if all(one.error is not None for one in result.asked):
                            raise UnavailableError(
                                f"{target} answered no question of {suite.name}: {result.asked[0].error}"
                            )
                        passed = sum(result.scores.values())
                        reporter.note(f"{suite.name}, {decoding.name}: {passed:g} of {len(result.scores)} cases pass")
                        results.append(result)
    return results
