"""Secrets in environment variables: present, long enough, and fit for a header before anything is asked."""

from __future__ import annotations

import pytest

from steersman.environment import header_secret_in, secret_in
from steersman.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "said"), [(None, "KEY is not set"), ("", "KEY is not set"), ("short", "KEY must hold at least 6 char")]
)
def test_a_secret_that_is_missing_or_short_is_named(
    monkeypatch: pytest.MonkeyPatch, value: str | None, said: str
) -> None:
    monkeypatch.delenv("KEY", raising=False) if value is None else monkeypatch.setenv("KEY", value)
    with pytest.raises(ConfigError, match=f"^keyEnv: the environment variable {said}"):
        secret_in("KEY", "keyEnv", least=6)


@pytest.mark.parametrize("value", ["sk-1\n", " sk-1", "schlüssel", "a\tb", "two words"])
def test_a_key_that_no_header_carries_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("KEY", value)
    with pytest.raises(ConfigError, match="a header cannot carry what KEY holds") as caught:
        header_secret_in("KEY", "--key-env")
    assert value not in str(caught.value)


def test_a_whole_header_may_have_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "Basic abc")
    assert header_secret_in("KEY", "authorizationEnv", words=True) == "Basic abc"
