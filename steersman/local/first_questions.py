"""What somebody gets who opens the demo's chat: fifty first questions to the model as it is served."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from steersman.config.manifest import AlignmentRun
from steersman.demo.shop import FirstQuestion, open_shop
from steersman.errors import UnavailableError, why
from steersman.local.serve import find_model, serving
from steersman.progress import ConsoleReporter

_AT_ONCE = 8
_TEMPERATURE = 0.0
"""The likeliest answer: the share says something of the model, not of the draw."""


def ask_first_questions(run: AlignmentRun, run_dir: Path) -> list[float]:
    """Share of grounded answers with its 95% interval: [share, low, high]; a model is asked once.

    Raises:
        UnavailableError: the gateway does not answer a question.
    """
    from steersman.statistics import wilson_interval

    model, _, _ = find_model(run_dir)
    made = (model.parent / "complete.json").read_text(encoding="utf-8")
    path, known = run_dir / "first_questions.jsonl", run_dir / "first_questions.of.json"
    if path.is_file() and known.is_file() and known.read_text(encoding="utf-8") == made:
        good = [json.loads(line)["grounded"] for line in path.read_text(encoding="utf-8").splitlines()]
        return _rounded(wilson_interval(sum(good), len(good)))
    questions = open_shop(run.spec.seed).questions()
    with (
        serving(run_dir, run_dir / "services", {}, None) as served,
        ConsoleReporter("questions") as reporter,
        ThreadPoolExecutor(_AT_ONCE) as threads,
    ):
        reporter.activity(f"asking the chat {len(questions)} first questions")
        answers = list(threads.map(lambda question: _ask(served.url, served.name, question), questions))
    good = [question.is_grounded(answer) for question, answer in zip(questions, answers, strict=True)]
    rows = [
        {"question": question.text, "answer": answer, "grounded": grounded}
        for question, answer, grounded in zip(questions, answers, good, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    known.write_text(made, encoding="utf-8")
    return _rounded(wilson_interval(sum(good), len(good)))


def _rounded(found: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in found]


def _ask(url: str, model: str, question: FirstQuestion) -> str:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question.text}],
        "temperature": _TEMPERATURE,
        "max_tokens": 64,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return str(json.load(response)["choices"][0]["message"]["content"] or "")
    except OSError as error:
        raise UnavailableError(f"no answer to a first question ({why(error)}); the gateway's log says why") from None
