"""`steersman eval` and `steersman compare`: is it better, and where not?"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steersman.cli.options import DEFAULT_STORE, JsonOption, StoreOption

if TYPE_CHECKING:
    from rich.table import Table

    from steersman.judges.comparing import JudgeOfPairs
    from steersman.report.schema import JudgeResult
    from steersman.suites.asked import SuiteReport, SuiteResult

SUITES_FILE = "suites.json"

_Judges = Annotated[list[Path], typer.Option(help="YAML of an LLM judge that compares the answers; repeatable.")]
_People = Annotated[
    Path | None, typer.Option(help="Comparisons that people judged (JSONL): do the judges agree with them?")
]
_Out = Annotated[Path, typer.Option(help="Folder for suites.json and suites.html.")]


def evaluate(
    targets: Annotated[list[str], typer.Argument(help="Model folders, runs' folders, or URLs that end with /v1.")],
    suite: Annotated[list[Path], typer.Option(help="YAML or JSONL with conversations; repeatable.")] = [],  # noqa: B006
    decoding: Annotated[
        list[str], typer.Option(help="greedy, served (the endpoint's own), or a temperature; repeatable.")
    ] = ["greedy", "served"],  # noqa: B006
    samples: Annotated[int, typer.Option(help="Answers to a case; a greedy one is drawn once.", min=1, max=1000)] = 1,
    max_tokens: Annotated[int, typer.Option(help="Token limit of an answer.", min=1, max=100_000)] = 256,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1)] = 17,
    concurrency: Annotated[int, typer.Option(help="Conversations at a time.", min=1, max=256)] = 4,
    knowledge: Annotated[
        Path | None, typer.Option(help="Folder with files of TruthfulQA, MMLU, GSM8K: what every model knows.")
    ] = None,
    task: Annotated[list[str], typer.Option(help="Task of knowledge; all that have files by default.")] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(help="Only the first questions of a task.", min=1)] = None,
    judge: _Judges = [],  # noqa: B006
    people: _People = None,
    previous: Annotated[Path | None, typer.Option(help="suites.json of the version before, to compare with.")] = None,
    out: _Out = Path("evaluation"),
    model: Annotated[str | None, typer.Option(help="Model's name at the endpoints; the first one by default.")] = None,
    key_env: Annotated[str | None, typer.Option(help="Environment variable with the endpoints' API key.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the endpoints' model: its tokenizer, for --knowledge.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Asks suites of models, runs and endpoints: results by tag, and what changed; and what the models know."""
    from steersman.errors import ConfigError, NotFoundError
    from steersman.local.evaluate import ask_all
    from steersman.local.judges import read_judges
    from steersman.suites.asked import read_results
    from steersman.suites.asking import Decoding
    from steersman.suites.schema import read_suite

    if not suite and knowledge is None:
        raise ConfigError("there is nothing to ask: give --suite FILE, or --knowledge FOLDER")
    _must_matter("--suite", suite, {"--judge": judge, "--previous": previous})
    _must_matter("--knowledge", knowledge, {"--task": task, "--limit": limit, "--tokenizer": tokenizer})
    _must_matter("--judge", judge, {"--people": people})
    if tokenizer is not None and not tokenizer.is_dir():
        raise NotFoundError(f"--tokenizer {tokenizer} is not a folder; name that of the endpoints' model")
    how = {"limit": limit, "model_name": model, "key_env": key_env, "tokenizer": tokenizer}
    known = _knowledge(targets, knowledge, task, how) if knowledge is not None else {}
    if not suite:
        _end(out, {}, known, as_json)
        return
    if judge and len(targets) < 2:
        raise ConfigError("--judge compares the answers of targets: name at least two")
    judges = read_judges(judge)
    suites = [read_suite(path) for path in suite]
    double = next((one.name for one in suites if [other.name for other in suites].count(one.name) > 1), None)
    if double is not None:
        raise ConfigError(f"two suites have the name {double}; results are compared by it")
    decodings = list({name: Decoding.parse(name) for name in decoding}.values())
    earlier = read_results(previous) if previous is not None else None
    results = ask_all(
        targets, suites, decodings, samples=samples, max_tokens=max_tokens, seed=seed, concurrency=concurrency,
        model=model, key_env=key_env,
    )  # fmt: skip
    settings = {
        "targets": targets, "suites": [str(path) for path in suite], "decoding": [one.name for one in decodings],
        "samples": samples, "max_tokens": max_tokens, "seed": seed, "previous": str(previous) if previous else None,
    }  # fmt: skip
    _end(out, _shown(results, settings, earlier, judges, people, out), known, as_json)


def evaluate_live(
    suite: Annotated[list[Path], typer.Option(help="YAML or JSONL with conversations; repeatable.")],
    store: StoreOption = DEFAULT_STORE,
    since: Annotated[str, typer.Option(help="Begin: a time in ISO 8601, or days back as 7d, hours as 12h.")] = "7d",
    until: Annotated[str | None, typer.Option(help="End, likewise; now by default.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only answers to this tenant.")] = None,
    judge: _Judges = [],  # noqa: B006
    people: _People = None,
    previous: Annotated[Path | None, typer.Option(help="suites.json of an earlier time span, to compare with.")] = None,
    out: _Out = Path("evaluation"),
    as_json: JsonOption = False,
) -> None:
    """Suites and judges over what the gateway recorded in a time span, by deployment."""
    from steersman.errors import NotFoundError
    from steersman.local.judges import read_judges
    from steersman.store import Store
    from steersman.store.live import ask_recorded, by_question, recorded
    from steersman.suites.asked import read_results
    from steersman.suites.schema import read_suite

    _must_matter("--judge", judge, {"--people": people})
    judges, suites = read_judges(judge), [read_suite(path) for path in suite]
    earlier = read_results(previous) if previous is not None else None
    now = datetime.now(UTC)
    begin, end = _time(since, now, "--since"), now if until is None else _time(until, now, "--until")
    with Store.open(store).reading() as session:
        answers = recorded(session, begin, end, tenant)
    results = [result for one in suites for result in ask_recorded(one, answers)]
    if not results:
        raise NotFoundError(f"of {len(answers)} recorded answers none is one that the suites say something about")
    settings = {
        "store": "recorded answers", "suites": [str(path) for path in suite], "since": begin.isoformat(),
        "until": end.isoformat(), "tenant": tenant,
    }  # fmt: skip
    numbers = _shown(results, settings, earlier, judges, people, out, by_question(answers))
    _end(out, {"answers": len(answers), **numbers}, {}, as_json)


def evaluate_reward(
    model: Annotated[Path, typer.Argument(help="Folder of a reward model.")],
    bench: Annotated[
        list[Path], typer.Option(help="File of RewardBench or RewardBench 2, Parquet or JSON Lines; repeatable.")
    ] = [],  # noqa: B006
    pairs: Annotated[Path | None, typer.Option(help="Comparisons that people judged (JSONL).")] = None,
    project: Annotated[str | None, typer.Option(help="Labelling project: agreement with each labeler.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """What a reward model knows: benchmarks, accuracy, calibration, length, agreement with each labeler."""
    from steersman.errors import ConfigError, NotFoundError
    from steersman.local.reward_report import against_labelers, on_benchmark, on_pairs, open_scorer, pairs_of

    if not bench and pairs is None and project is None:
        raise ConfigError("there is nothing to ask: give --bench, --pairs or --project")
    if not model.is_dir():
        raise NotFoundError(f"{model} is not a folder; name one with a reward model")
    score = open_scorer(model)
    found: dict[str, Any] = {"bench": {path.name: on_benchmark(score, path) for path in bench}}
    if pairs is not None:
        found["pairs"] = on_pairs(score, pairs)
    if project is not None:
        from steersman.store import Store
        from steersman.store.blind import rankings_of
        from steersman.store.judging import get_project

        with Store.open(store).reading() as session:
            rankings, answers = rankings_of(session, get_project(session, project))
        scored = zip(answers, score(list(answers.values())), strict=True) if answers else ()
        rewards = {answer: reward for answer, reward in scored if reward is not None}
        verdicts = [said for item, labeler, ranking in rankings for said in pairs_of(item, labeler, ranking)]
        found["labelers"] = against_labelers(verdicts, rewards)
    typer.echo(json.dumps(_rounded(found), indent=None if as_json else 2))


def _rounded(value: Any) -> Any:
    """Figures with the digits that they have."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def _must_matter(needed: str, given: object, options: dict[str, object]) -> None:
    """Refuses options that would change nothing, because what they are about is not asked for."""
    from steersman.errors import ConfigError

    alone = next((name for name, value in options.items() if value), None)
    if alone is not None and not given:
        raise ConfigError(f"{alone} changes nothing without {needed}; give both, or leave it out")


def _time(text: str, now: datetime, option: str) -> datetime:
    from steersman.errors import ConfigError

    back = re.fullmatch(r"(\d{1,6})([dh])", text)
    if back:
        return now - timedelta(**{"days" if back[2] == "d" else "hours": int(back[1])})
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{option} {text!r} is no time; give 2026-01-31, 2026-01-31T12:00Z, 7d or 12h") from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _shown(
    results: list[SuiteResult],
    settings: dict[str, Any],
    earlier: SuiteReport | None,
    judges: dict[str, JudgeOfPairs],
    people: Path | None,
    out: Path,
    judged_results: list[SuiteResult] | None = None,
) -> dict[str, Any]:
    """Writes `suites.json`, `suites.html` and `judges.json`, prints the tables, and returns the figures.

    Args:
        judged_results: what judges compare, where that is not `results`.
    """
    from rich.console import Console

    from steersman.artifacts import storage_errors
    from steersman.local.judges import ask_judges
    from steersman.report.pages import write_suites
    from steersman.suites.asked import SuiteReport

    report = SuiteReport(
        date=datetime.now(UTC).isoformat(timespec="seconds"), settings=settings, results=tuple(results)
    )
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / SUITES_FILE).write_text(report.model_dump_json(indent=1), encoding="utf-8")
    judged, licences = ask_judges(judges, results if judged_results is None else judged_results, people, out)
    page = write_suites(report, out, earlier, judged, licences)
    before = earlier.results if earlier is not None else ()
    for result in results:
        Console().print(_table(result, before))
    for name, found in wins(judged).items():
        for pair, rate in found["win_rates"].items():
            typer.echo(f"{name}: {pair} in {rate[0]:.1%} ({rate[1]:.1%} to {rate[2]:.1%})")
    for name, said in judged.items():
        if said.missing:
            typer.echo(f"{name}: {said.missing} comparisons without a verdict: {said.reason}")
    typer.echo(f"{page}")
    return summary(results, before) | ({"judges": wins(judged)} if judged else {})


def _knowledge(targets: list[str], folder: Path, tasks: list[str], how: dict[str, Any]) -> dict[str, Any]:
    """Table and figures of every task; the first target is what the others are compared with.

    Args:
        how: further arguments of `ask_knowledge`.
    """
    import tempfile

    from rich.console import Console
    from rich.table import Table

    from steersman.inference import equivalence
    from steersman.knowledge import ask_knowledge, available, write_tasks
    from steersman.local.evaluate import is_url, names_of
    from steersman.local.serve import find_model
    from steersman.progress import ConsoleReporter
    from steersman.report.summary import KNOWLEDGE_BOUND
    from steersman.statistics import mean_interval

    names, tasks = names_of(targets), list(dict.fromkeys(tasks)) or available(folder)
    scores: dict[str, dict[str, tuple[float, ...]]] = {}
    with tempfile.TemporaryDirectory(prefix="steersman-knowledge-") as files, ConsoleReporter("knowledge") as reporter:
        write_tasks(folder, tasks, Path(files))
        for target, name in zip(targets, names, strict=True):
            reporter.activity(f"asking {name}")
            place = target if is_url(target) else str(find_model(Path(target))[0])
            scores[name] = ask_knowledge(place, tasks, Path(files), **how)
    table = Table(title="Knowledge", title_justify="left")
    for title in ("task", *names):
        table.add_column(title, justify="left" if title == "task" else "right")
    found: dict[str, Any] = {}
    for task in tasks:
        cells, numbers = [], {}
        for name in names:
            mean = mean_interval(scores[name][task])
            numbers[name] = {"score": [round(x, 4) for x in mean], "questions": len(scores[name][task])}
            cells.append(f"{mean.estimate:.1%} ± {mean.high - mean.estimate:.1%}")
            if name != names[0]:
                result = equivalence(scores[names[0]][task], scores[name][task], KNOWLEDGE_BOUND)
                numbers[name] |= {
                    "difference": [round(x, 4) for x in result.difference],
                    "bound": KNOWLEDGE_BOUND,
                    "equivalent": result.equivalent,
                }
        table.add_row(task, *cells)
        found[task] = numbers
    Console().print(table)
    return {"knowledge": found, "scores": {name: scores[name] for name in names}}


def _end(out: Path, numbers: dict[str, Any], known: dict[str, Any], as_json: bool) -> None:
    """Writes `knowledge.json` where there is some, and the line of JSON."""
    from steersman.artifacts import storage_errors

    if known:
        with storage_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            (out / "knowledge.json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        numbers = numbers | {"knowledge": known["knowledge"]}
    if as_json:
        typer.echo(json.dumps(numbers))


def wins(judged: dict[str, JudgeResult]) -> dict[str, Any]:
    """What every judge said: win rates [share, low, high] by pair, calls, failures, cost."""
    from steersman.report.wins import Duel, win_rate

    found: dict[str, Any] = {}
    for name, result in judged.items():
        duels = [Duel(pair.prompt_id, pair.one, pair.other, pair.score) for pair in result.pairs]
        pairs = dict.fromkeys((duel.one, duel.other) for duel in duels)
        rates = {f"{one} over {other}": [round(x, 4) for x in win_rate(duels, one, other).rate] for one, other in pairs}
        found[name] = {"win_rates": rates, **result.model_dump(exclude={"pairs"})}
    return found


def summary(results: list[SuiteResult], earlier: Any = ()) -> dict[str, Any]:
    """Shares [estimate, low, high] by target, suite, decoding and tag, and the cases that changed."""
    from steersman.suites.verdicts import change, earlier_of, lines

    found: dict[str, Any] = {}
    for result in results:
        before = earlier_of(result, earlier)
        entry: dict[str, Any] = {line.name: [round(x, 4) for x in line.share] for line in lines(result)}
        numbers: dict[str, Any] = {"shares": entry, "errors": sum(one.error is not None for one in result.asked)}
        if before is not None:
            changed = change(before, result)
            numbers["worse"], numbers["better"] = list(changed.worse), list(changed.better)
        found.setdefault(result.target, {}).setdefault(result.suite, {})[result.decoding] = numbers
    return found


def _table(result: SuiteResult, earlier: Any) -> Table:
    from rich.table import Table

    from steersman.suites.verdicts import change, earlier_of, lines

    before = earlier_of(result, earlier)
    caption = ""
    if before is not None:
        changed = change(before, result)
        caption = f"against the version before: {len(changed.worse)} cases worse, {len(changed.better)} better"
        caption += f" (p = {changed.p_value:.3f})" + "".join(f"\n  worse: {case}" for case in changed.worse[:10])
    table = Table(
        title=f"{result.target}: {result.suite}, {result.decoding}", caption=caption or None, title_justify="left",
        caption_justify="left",
    )  # fmt: skip
    for title in ("", "passed", "95% interval", "cases", *(["before"] if before else [])):
        table.add_column(title, justify="left" if not title else "right")
    for line in lines(result, before):
        cells = [line.name, f"{line.share.estimate:.1%}", f"{line.share.low:.1%} to {line.share.high:.1%}",
                 str(line.cases)]  # fmt: skip
        if before:
            cells.append("–" if line.before is None else f"{line.before.estimate:.1%}")
        table.add_row(*cells)
    return table


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of two or more runs with an evaluation.")],
    out: Annotated[Path, typer.Option(help="Folder for compare.html.")] = Path("evaluation"),
    as_json: JsonOption = False,
) -> None:
    """Compares runs on one page: metrics, wins, suites, knowledge, configurations, answers side by side."""
    from steersman.artifacts import storage_errors
    from steersman.config.manifest import load_manifest
    from steersman.errors import ConfigError
    from steersman.local.evaluate import names_of
    from steersman.local.knowledge import known_of
    from steersman.report.compare import Version, write_compare
    from steersman.report.schema import read_evaluation_of

    if len(runs) < 2:
        raise ConfigError("compare needs at least two runs; name another one")
    versions = []
    for run, name in zip(runs, names_of([str(run) for run in runs]), strict=True):
        evaluation = read_evaluation_of(run)
        if not evaluation.knowledge:
            evaluation = evaluation.model_copy(update={"knowledge": known_of(run)})
        spec = load_manifest(run / "manifest.yaml").spec.model_dump(mode="json", by_alias=True)
        versions.append(Version(name, evaluation, spec))
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        page = write_compare(versions, out)
    if not as_json:
        typer.echo(str(page))
        return
    from steersman.cli.shapes import Comparison, print_json
    from steersman.report.summary import summarise

    print_json(Comparison(str(page), {one.name: summarise(one.evaluation) for one in versions}))
