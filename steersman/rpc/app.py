"""The command line that every service shares."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from steersman import loading
from steersman.config.base import apply_overrides, dump_yaml, load_model, read_yaml
from steersman.ending import end_within
from steersman.errors import SteersmanError
from steersman.openmp import prefer_yielding_threads
from steersman.rpc.server import ServerConfig

OVERRIDES = "STEERSMAN_SET"
"""Environment variable with a line `a.b=c` for each override of the file, weaker than `--set`: what a controller sets
on a Deployment that somebody else made."""

END_SECONDS = 5.0
"""How long the end of a process may wait for threads, once calls have been drained."""

C = TypeVar("C", bound=ServerConfig)


def service_main(name: str, config_type: type[C], serve: Callable[[C], Awaitable[None]]) -> None:
    """Parses `--config FILE --set a.b=c`, runs the service; an error is one sentence and its exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m services.{name}", description=f"Steersman's {name} service")
    parser.add_argument("--config", type=Path, help="YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override of one field; repeatable")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    arguments = parser.parse_args()
    loading.begin()
    prefer_yielding_threads()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    try:
        given = [line for line in os.environ.get(OVERRIDES, "").splitlines() if line.strip()]
        data = apply_overrides(read_yaml(arguments.config) if arguments.config else {}, [*given, *arguments.set])
        config = load_model(config_type, data, str(arguments.config or "--set"))
        if arguments.print_config:
            print(dump_yaml(config), end="")
            return
        code = asyncio.run(_served(name, serve(config)))
    except SteersmanError as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if code:
        raise SystemExit(code)


async def _served(name: str, service: Awaitable[None]) -> int:
    """The exit code of a service that has ended; from then on its threads have END_SECONDS."""
    code = 130
    try:
        await service
        code = 0
    except SteersmanError as error:
        print(f"{name}: {error}", file=sys.stderr)
        code = error.exit_code
    finally:
        end_within(END_SECONDS, code)
    return code
