"""`steersman eval` of a model folder with real processes: policy engine, gateway, client."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from steersman.suites.asked import read_results
from steersman.testing.models import save_model_folder, tiny_llama

STEERSMAN = str(Path(sys.executable).with_name("steersman"))
SUITE = '{"id": "short", "messages": [{"role": "user", "content": "Hello"}], "expect": {"maxWords": 50}}\n'

pytestmark = pytest.mark.timeout(600)


def test_a_model_folder_is_asked_greedily_and_as_it_is_served(tmp_path: Path) -> None:
    save_model_folder(tmp_path / "model", tiny_llama())
    (tmp_path / "short.jsonl").write_text(SUITE + SUITE.replace("short", "again"))
    command = [STEERSMAN, "eval", "model", "--suite", "short.jsonl", "--samples", "3", "--max-tokens", "6", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])["model"]["short"]
    assert numbers["greedy"]["errors"] == numbers["served"]["errors"] == 0
    greedy, served = read_results(tmp_path / "evaluation" / "suites.json").results
    assert (len(greedy.asked), len(served.asked)) == (2, 6)
    # The same question, greedily: the same answer. Served at its temperature: samples of their own.
    assert greedy.asked[0].answers == greedy.asked[1].answers
    assert len({one.answers for one in served.asked}) > 1
    assert all(0 < one.tokens <= 6 for one in (*greedy.asked, *served.asked))
    assert (tmp_path / "evaluation" / "suites.html").is_file()
