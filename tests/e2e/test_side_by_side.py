"""`steersman serve --candidate`: two tiny models behind one gateway, judged by thumbs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from loaded import Loaded

from steersman.local import serve
from steersman.local.supervisor import Supervisor
from steersman.testing.models import save_model_folder, tiny_llama

pytestmark = pytest.mark.timeout(600)


def call(url: str, body: dict[str, object]) -> dict[str, object]:
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(url, json.dumps(body).encode(), headers), timeout=60) as response:
        return json.load(response)


def test_two_models_answer_and_are_told_apart(tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "Supervisor", partial(Supervisor, start=loaded.process))
    models = [save_model_folder(tmp_path / name, tiny_llama()) for name in ("old", "new")]
    database = f"sqlite:///{tmp_path}/feedback.db"
    with serve.serving(models[0], tmp_path / "logs", {}, database, models[1], 50) as served:
        assert served.canary is not None
        seen: dict[str, list[object]] = {}
        for number in range(12):
            messages = [{"role": "user", "content": f"question {number}"}]
            answer = call(f"{served.url}/v1/chat/completions", {"model": "old", "messages": messages, "max_tokens": 2})
            about = answer["steersman"]
            assert isinstance(about, dict)
            seen.setdefault(str(about["variant"]), []).append(about["answer_id"])
        assert set(seen) == {"champion", served.canary.state.name}
        for variant, answers in seen.items():
            thumbs = "down" if variant != "champion" else "up"
            event = {"event_id": f"e-{variant}", "answer_id": answers[0], "thumbs": thumbs}
            call(f"{served.url}/v1/feedback", event)
        told = served.canary.look(database, served.metrics_url)
        assert told == "candidate: 1 judged, 1 with a thumb down; champion: 1 and 0"
        evidence = served.canary.state.evidence
        assert evidence.champion.requests + evidence.candidate.requests == 12
