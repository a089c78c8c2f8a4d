"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

DEFAULT_STORE = "sqlite:///steersman.db"
JsonOption = Annotated[bool, typer.Option("--json", help="One line of JSON; the reference has its shape.")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace; the kubeconfig's by default.")]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig.")]
StoreOption = Annotated[str, typer.Option(envvar="STEERSMAN_STORE", help="Database URL.")]


def parse_pairs(values: list[str], option: str) -> dict[str, str]:
    """NAME=VALUE options as a dictionary."""
    from steersman.errors import ConfigError

    pairs = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals or not name:
            raise ConfigError(f"{option} {value!r}: expected NAME=VALUE")
        if name.strip() in pairs:
            raise ConfigError(f"{option} {value!r}: {name.strip()} is given twice; give it once")
        pairs[name.strip()] = rest.strip().strip('"').replace("\\n", "\n")
    return pairs
