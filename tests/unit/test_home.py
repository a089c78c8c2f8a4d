"""A process finds a name and a home whatever uid, HOME and file system a container gives it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import sandbox

ASK = """
import getpass, json, os, pathlib, tempfile
import steersman
from steersman.rpc.server import ServerConfig
cache = ServerConfig().cache_dir
cache.mkdir(parents=True, exist_ok=True)
home = pathlib.Path.home()
print(json.dumps([os.getuid(), getpass.getuser(), str(home), os.access(home, os.W_OK), str(cache)]))
"""


@pytest.mark.parametrize("environment", [{}, {"HOME": "/"}, {"HOME": "/nonexistent"}, {"HOME": ""}, {"HOME": "here"}])
def test_an_unknown_uid_without_a_home_gets_both(tmp_path, environment) -> None:
    sandbox.require()
    code, output = sandbox.run(["python", "-c", ASK], root=tmp_path / "root", uid=1000710000, environment=environment)
    home = "/tmp/steersman-1000710000"
    assert (code, output.strip()) == (0, f'[1000710000, "uid1000710000", "{home}", true, "{home}/.cache/steersman"]')


def test_a_home_that_can_be_made_is_kept(tmp_path) -> None:
    """As the chart sets it."""
    sandbox.require()
    environment = {"HOME": "/tmp/home", "LOGNAME": "somebody"}
    code, output = sandbox.run(["python", "-c", ASK], root=tmp_path / "root", environment=environment)
    assert (code, output.strip()) == (0, '[10001, "somebody", "/tmp/home", true, "/tmp/home/.cache/steersman"]')


def test_a_folder_that_another_user_prepared_is_not_taken(tmp_path, monkeypatch) -> None:
    from steersman import home

    monkeypatch.setattr(home.tempfile, "gettempdir", lambda: str(tmp_path))
    mine = home._own_folder(os.getuid())
    assert mine == tmp_path / f"steersman-{os.getuid()}"
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700
    assert home._own_folder(os.getuid()) == mine
    mine.chmod(0o777)
    other = home._own_folder(os.getuid())
    assert other != mine
    assert stat.S_IMODE(other.stat().st_mode) == 0o700
    mine.rmdir()
    mine.symlink_to(other)
    assert home._own_folder(os.getuid()) not in (mine, other)
    assert Path(other).is_dir()
