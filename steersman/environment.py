"""Secrets in environment variables that a configuration names."""

from __future__ import annotations

import os

from steersman.errors import ConfigError


def secret_in(variable: str, field: str, *, least: int = 1) -> str:
    """The secret in an environment variable.

    Args:
        field: what names the variable, for the message.
        least: how many characters it must have.

    Raises:
        ConfigError: the variable is not set, or too short.
    """
    secret = os.environ.get(variable, "")
    if not secret:
        raise ConfigError(f"{field}: the environment variable {variable} is not set; give it the secret")
    if len(secret) < least:
        raise ConfigError(f"{field}: the environment variable {variable} must hold at least {least} characters")
    return secret


def header_secret_in(variable: str, field: str, *, words: bool = False) -> str:
    """`secret_in` for a header; ConfigError, too, where no header can carry it.

    Args:
        words: whether it may have spaces, as the whole of a header has after the scheme.
    """
    secret = secret_in(variable, field)
    visible = all("!" <= character <= "~" or (words and character == " ") for character in secret)
    if not visible or secret != secret.strip():
        raise ConfigError(f"{field}: a header cannot carry what {variable} holds; is there a line break at its end?")
    return secret
