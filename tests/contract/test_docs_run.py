"""The commands and programs of the documentation run, in the order of their page, in a folder as the page expects it.

Models, services and labelers are stood in for; what cannot run in a test is in LEFT_OUT, each with where it runs.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from doc_blocks import ROOT, SHELL, Block, blocks
from typer.testing import CliRunner

from services.gateway.testing import gateway_config, running_gateway
from steersman.cli import app
from steersman.config.manifest import load_manifest
from steersman.config.stages import mark_complete
from steersman.local import folder
from steersman.store import Store
from steersman.store.feedback import Event, save_answer, submit
from steersman.store.models import Answer
from steersman.testing.fake_policy import FakePolicy, serve_policy

LEFT_OUT = {
    "make": "takes minutes; tests/unit/test_docs.py looks for the target, CI and the benchmarks run it",
    "steersman serve": "needs a model; tests/e2e/test_serve.py runs it",
    "steersman eval": "needs a model; tests/e2e/test_eval_command.py runs it",
    "steersman submit": "needs a cluster; tests/unit/controller/test_cluster_commands.py runs it",
    "steersman status": "as submit",
    "steersman logs": "as submit",
    "steersman cancel": "as submit",
    "steersman doctor --cluster": "as submit",
    "kubectl": "needs a cluster; charts/steersman/tests/test_deployment_guide.py looks at its flags and objects",
    "helm": "as kubectl; there the chart is rendered with the values of each installation",
    "docker": "needs a container engine; scripts/check_image.py runs the steps of the Dockerfiles",
    "gzip": "as docker",
    "python3 -m venv": "installs from the package index; scripts/check_image.py does",
    "~/.steersman/bin/pip": "as python3 -m venv",
    "hf": "downloads from a model hub",
    "pg_restore": "needs PostgreSQL's own programs",
    "openssl": "a program of the reader's",
}
"""Commands that are only looked at, and why. Whatever is not here runs."""

PAGES = sorted({block.page for block in blocks(*SHELL)})


def in_words(words: list[str]) -> str:
    return " ".join("steersman" if Path(word).name == "steersman" else word for word in words)


def left_out(words: list[str]) -> bool:
    return any(in_words(words) == start or in_words(words).startswith(f"{start} ") for start in LEFT_OUT)


class Reader:
    """Somebody who types what a page says, in a folder of his own."""

    def __init__(self, page: str, home: Path, monkeypatch: pytest.MonkeyPatch, url: str = "") -> None:
        self.page, self.home, self.monkeypatch, self.url = page, home, monkeypatch, url
        self.ran: list[str] = []

    def types(self, words: list[str]) -> None:
        """Runs a command. AssertionError with what it said when it fails."""
        program = Path(words[0]).name
        runs: dict[str, Callable[[list[str]], None]] = {
            "steersman": self.steersman,
            "python": self.python,
            "curl": self.curl,
            "ls": self.listed,
            "export": self.export,
            "KEY=X": self.export,
        }
        assert program in runs, f"{self.page}: nobody knows how to try {words}; run it here or say in LEFT_OUT why not"
        runs[program](words[1:])
        self.ran.append(in_words(words))

    def steersman(self, words: list[str]) -> None:
        if words[0] == "run" and "--dry-run" not in words:
            words = [*words, "--dry-run"]  # tests/e2e trains
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{self.page}: steersman {' '.join(words)}: {done.output} {done.exception!r}"
        assert done.output.strip(), f"{self.page}: steersman {' '.join(words)} says nothing"

    def python(self, words: list[str]) -> None:
        from services.gateway import __main__ as gateway
        from services.gateway.auth import keys

        assert words[0] == "-m"
        module, arguments = words[1], words[2:]
        shown = io.StringIO()
        with redirect_stdout(shown):
            if module == "services.gateway.auth.keys":
                arguments = [f"sqlite:///{self.home}/gateway.db" if word == "URL" else word for word in arguments]
                assert keys.main(arguments) == 0
            elif module == "services.gateway":
                assert gateway.main([*arguments, "--print-config"]) == 0  # without it the gateway stays up
            else:
                assert module == "services.policy", module
                self.print_config(module, arguments)
        assert shown.getvalue().strip(), words

    def print_config(self, module: str, arguments: list[str]) -> None:
        from services.policy.config import PolicyConfig
        from steersman.rpc.app import service_main

        async def never(config: PolicyConfig) -> None:
            raise AssertionError("it would stay up")

        self.monkeypatch.setattr("sys.argv", [module, *arguments, "--print-config"])
        service_main("policy", PolicyConfig, never)

    def curl(self, words: list[str]) -> None:
        (address,) = [word for word in words if "127.0.0.1" in word or "localhost" in word]
        given = dict(pairwise(words))
        body = given["-d"].replace("chatcmpl-...", self.answer_id()) if "chatcmpl-..." in given["-d"] else given["-d"]
        headers = dict(value.split(": ", 1) for flag, value in pairwise(words) if flag == "-H")
        path = address.split("8080", 1)[1]
        answer = httpx.post(f"{self.url}{path}", content=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text

    def answer_id(self) -> str:
        question = {"model": "my-run", "messages": [{"role": "user", "content": "Hello"}]}
        return str(httpx.post(f"{self.url}/v1/chat/completions", json=question, timeout=60).json()["id"])

    def listed(self, words: list[str]) -> None:
        names = {path.name for path in Path(words[0]).iterdir()}
        assert {"manifest.yaml", "report", "rl"} <= names

    def export(self, words: list[str]) -> None:
        for word in words:
            name, _, value = word.partition("=")
            self.monkeypatch.setenv(name, value)


# --- what pages expect to be there


def rows(path: Path, kind: str, count: int = 10) -> None:
    """`count` canonical rows about different things."""
    found = []
    for number in range(count):
        prompt = [{"role": "user", "content": f"Where is order {number}?"}]
        good, bad = ([{"role": "assistant", "content": f"{text} {number}."}] for text in ("It comes on day", "No idea"))
        row = {"prompt": prompt, "chosen": good, "rejected": bad}
        found.append({"prompt": prompt, "completion": good, "label": number % 2 == 0} if kind == "feedback" else row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def evaluated_run(manifest: Path, where: Path) -> None:
    """The folder of a run whose stages are complete, with a small evaluation."""
    run = folder.resolve(load_manifest(manifest), where, manifest.parent)
    where.mkdir(parents=True)
    folder.write_manifest(run, where)

    def sample(number: int, reward: float) -> dict[str, Any]:
        return {
            "prompt_id": f"p{number}",
            "prompt": [{"role": "user", "content": f"Question {number}?"}],
            "answer": "Answer.",
            "reward": reward,
            "rubric": {"grounded": 0.5, "total": 0.5},
            "kl": 0.5,
            "length": 10,
            "finish_reason": "stop",
        }

    models = {name: [sample(i, shift + 0.1 * i) for i in range(12)] for name, shift in (("sft", 0.0), ("rlhf", 1.0))}
    evaluation = {"name": "quickstart", "seed": 17, "models": models, "seconds": {"rl": 1.0}, "peak_memory_gib": 1.0}
    for name in run.stage_names():
        (where / name).mkdir()
        if name == "evaluate":
            (where / name / "evaluation.json").write_text(json.dumps(evaluation))
        else:
            lines = [{"step": step, "total": 3, "loss": 0.5, "reward": 1.0, "kl": 0.1} for step in (1, 2, 3)]
            (where / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        mark_complete(run, name, where)
    (where / "report").mkdir()
    (where / "report/report.html").write_text("<p>a report</p>")
    (where / "usage.json").write_text(json.dumps({"seconds": {"rl": 1.0}, "peakMemoryGib": 1.0}))


def labelled(home: Path) -> None:
    """`pairs.jsonl`; what three people say of them comes later."""
    rows(home / "pairs.jsonl", "preference", 12)


def judged(reader: Reader) -> None:
    """Three people who agree judge the project's items."""
    from steersman.store.handing import next_task
    from steersman.store.judging import NewJudgement, ensure_labeler, get_project, record
    from steersman.store.verdicts import Verdict

    opened = Store.open(f"sqlite:///{reader.home}/feedback.db")
    for who in ("Ann", "Ben", "Cy"):
        while True:
            with opened.transaction() as session:
                project, labeler = get_project(session, "shop"), ensure_labeler(session, who)
                task = next_task(session, project, labeler)
                if task is None:
                    break
                verdict = Verdict(ranking=((0,), (1,)) if task.item.id % 2 else ((1,), (0,)))
                record(session, project, NewJudgement(task.item.id, labeler.id, verdict, 5.0))
    opened.close()


def fed_back(home: Path) -> None:
    """A run's own store with thumbs of people who agreed to training."""
    (home / "runs/my-run").mkdir(parents=True)
    opened = Store.open(f"sqlite:///{home}/runs/my-run/feedback.db")
    with opened.transaction() as session:
        for number in range(6):
            said = [{"role": "user", "content": f"Where is order {number}?"}]
            answer = Answer(
                id=f"a{number}", customer="acme", deployment="d", model="bot", prompt=said, answer="On its way.",
                consent=True,
            )  # fmt: skip
            save_answer(session, answer)
    with opened.transaction() as session:
        for number in range(6):
            submit(session, "acme", Event(f"e{number}", f"a{number}", "thumbs", "up" if number % 2 else "down"))
    opened.close()


def my_model(home: Path) -> None:
    from steersman.testing.models import save_model_folder, tiny_llama

    save_model_folder(home / "path/to/my-model", tiny_llama())
    rows(home / "my-preferences.jsonl", "preference")


PREPARE: dict[str, Callable[[Path], None]] = {
    "docs/tutorials/first-alignment.md": lambda home: evaluated_run(
        ROOT / "examples/01-quickstart/run.yaml", home / "runs/01-quickstart-17"
    ),
    "docs/tutorials/label-with-your-team.md": labelled,
    "docs/tutorials/close-the-loop.md": fed_back,
    "docs/tutorials/your-rows.md": my_model,
    "docs/gateway.md": lambda home: (home / "gateway.yaml").write_text("model: shop\n") and None,
}
BETWEEN: dict[str, Callable[[Reader], None]] = {"steersman data add shop pairs.jsonl": judged}
"""What other people do after a command."""


@asynccontextmanager
async def a_gateway(tmp_path: Path, *, wanted: bool) -> AsyncIterator[str]:
    """Its URL; empty where nobody wants one."""
    if not wanted:
        yield ""
        return
    async with serve_policy(FakePolicy()) as endpoint:
        database = f"sqlite:///{tmp_path}/g.db"
        config = gateway_config(endpoint, model="my-run", modelAliases=["steersman"], database=database)
        async with running_gateway(config) as gateway:
            yield gateway.url


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES)
async def test_every_command_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [words for block in blocks(*SHELL) if block.page == page for words in block.commands]
    home = tmp_path / "home"
    home.mkdir()
    (home / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(home)
    PREPARE.get(page, lambda home: None)(home)
    async with a_gateway(tmp_path, wanted=any(words[0] == "curl" for words in commands)) as url:
        reader = Reader(page, home, monkeypatch, url)
        for words in commands:
            if left_out(words):
                continue
            await asyncio.to_thread(reader.types, words)
            if in_words(words) in BETWEEN:
                BETWEEN[in_words(words)](reader)
    assert reader.ran or all(left_out(words) for words in commands)


def test_nothing_is_left_out_for_nothing() -> None:
    every = [words for block in blocks(*SHELL) for words in block.commands]
    for start in LEFT_OUT:
        assert any(f"{in_words(words)} ".startswith(f"{start} ") for words in every), f"no page has {start!r}"


PYTHON = blocks("python")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", PYTHON, ids=str)
async def test_every_program_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names: dict[str, Any] = {}
    if block.page == "docs/tutorials/notebook.md":
        # A run that was made before stands in for the one that is started; test_notebook.py starts one.
        from steersman.notebook import Run

        evaluated_run(ROOT / "examples/01-quickstart/run.yaml", tmp_path / "runs/quickstart")
        opened = Run(tmp_path / "runs/quickstart")
        (opened.folder / "summary.json").write_text('{"reward": {"rlhf": [1.0, 0.9, 1.1]}}')
        for way in ("start", "submit"):
            monkeypatch.setattr(Run, way, staticmethod(lambda manifest, **options: opened))
        names["Run"] = Run
    address = "http://127.0.0.1:8080"
    async with a_gateway(tmp_path, wanted=address in block.text) as url:
        text = block.text.replace(address, url)
        with redirect_stdout(io.StringIO()) as shown:
            await asyncio.to_thread(exec, compile(text, str(block), "exec"), names)
    if "connect-an-application" in block.page:
        assert "You said: Where is my order?" in shown.getvalue()
    if "near_length" in names:
        (given,) = names["near_length"]([[{"content": "one two three"}]], words=3)
        assert given == 1
    if block.page == "docs/demo-data.md":
        assert (tmp_path / "data/manifest.json").is_file()


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_every_piece_of_json_is_what_its_page_says(block: Block, tmp_path: Path) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    from steersman.demo.rubric import score
    from steersman.rewards.builtin import http

    found = json.loads(block.text)
    if block.page == "docs/demo-data.md":
        assert score([{"role": "user", "content": "When?"}], "It arrives on Friday.", found).total > 0
        return
    assert block.page == "docs/tutorials/your-own-reward.md", f"{block}: what is it?"
    asked, answered = (json.loads(one.text) for one in blocks("json") if one.page == block.page)
    sent: list[Any] = []

    class Scorer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answered).encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Scorer)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        verdict = http(f"http://127.0.0.1:{server.server_port}/")(asked["messages"], asked["answer"], asked["facts"])
    finally:
        server.shutdown()
        server.server_close()
    assert sent == [asked]
    assert (verdict.value, verdict.criteria) == (answered["reward"], answered["criteria"])
