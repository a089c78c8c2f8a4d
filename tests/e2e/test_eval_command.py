"""`steersman eval` of a model folder with real processes: policy engine, gateway, client."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from loaded import Loaded

from steersman.suites.asked import read_results
from steersman.testing.models import save_model_folder, tiny_llama

SUITE = '{"id": "short", "messages": [{"role": "user", "content": "Hello"}], "expect": {"maxWords": 50}}\n'

pytestmark = pytest.mark.timeout(600)


def test_a_model_folder_is_asked_greedily_and_as_it_is_served(tmp_path: Path, loaded: Loaded) -> None:
    save_model_folder(tmp_path / "model", tiny_llama())
    (tmp_path / "short.jsonl").write_text(SUITE + SUITE.replace("short", "again"))
    command = ["eval", "model", "--suite", "short.jsonl", "--samples", "3", "--max-tokens", "6", "--json"]
    done = loaded.run(*command, cwd=tmp_path)
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
