"""Where a service's configuration comes from: file, then the environment, then the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from steersman.rpc.app import OVERRIDES, service_main
from steersman.rpc.server import ServerConfig


@pytest.mark.parametrize(
    ("environment", "arguments", "wanted"),
    [("", [], 1.0), ("drainSeconds=2\n", [], 2.0), ("drainSeconds=2", ["--set", "drainSeconds=3"], 3.0)],
)
def test_the_environment_is_weaker_than_the_command_line(tmp_path: Path, monkeypatch, environment, arguments, wanted):
    (tmp_path / "config.yaml").write_text("drainSeconds: 1")
    monkeypatch.setenv(OVERRIDES, environment)
    monkeypatch.setattr("steersman.rpc.app.end_within", lambda seconds, code: None)  # this process goes on
    monkeypatch.setattr("sys.argv", ["service", "--config", str(tmp_path / "config.yaml"), *arguments])
    seen: list[ServerConfig] = []

    async def serve(config: ServerConfig) -> None:
        seen.append(config)

    service_main("policy", ServerConfig, serve)
    assert seen[0].drain_seconds == wanted
