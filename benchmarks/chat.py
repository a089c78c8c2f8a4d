"""A chat's fifth turn and its grounded answers, with and without what the engine remembers and drafts, in one run.

    python -m benchmarks.chat [--model FOLDER] [--precision auto] [--rounds 3] [--threads 2]

Two policy services on one machine take turns: `plain` remembers no prefix and drafts nothing, `ours` does
both.
Workloads, over gRPC: five turns about one order, of which the last one's time to first token counts; the demo's
held-out questions with their records; and longer records that the answer reads back. Answers are greedy, so both give
the same text but where rounding decides between two tokens; the share of equal ones is told. Prints a table
and writes build/bench/chat.json.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import common
from benchmarks.report import base_model, command_line, heading, table, write
from steersman.demo.dataset import Sizes, generate
from steersman.rpc.client import open_channel
from steersman.v1 import common_pb2, policy_pb2, policy_pb2_grpc

SERVICES = {
    "plain": {"transformers": {"prefixTokens": 0, "lookahead": False}},
    "ours": {"transformers": {"lookahead": True}},
}
_RULES = (
    "You are the assistant of Halden Office Supply. Answer from the record below and from nothing else, in full "
    "sentences, and repeat numbers, names and dates as they stand there. Deliveries take two to four working days, "
    "returns are free for thirty days, invoices are due within fourteen days, and what is not in the record is "
    "answered by a colleague.\n"
)
_ORDERS = [
    f"Order {number}, {name}, placed {day} March 2026: {lines}. Shipped with Nordpost, parcel NP{number}0{day}EU, "
    f"expected on {day + 4} March 2026, total {number % 900}.50 euros."
    for number, name, day, lines in (
        (48213, "Dana Whitfield", 3, "2 walnut desk organisers, 1 brass reading lamp, 4 boxes of A4 recycled paper"),
        (51877, "Imre Castellan", 9, "12 lever arch files in blue, 1 height-adjustable standing desk, 2 cable trays"),
        (60342, "Solveig Aarud", 14, "1 conference speaker, 3 whiteboard sets with magnets, 20 fine liners in black"),
    )
]
_TURNS = (
    "Where is my order?",
    "What did I buy?",
    "When will it come?",
    "How much do I have to pay?",
    "Which parcel number do I look for?",
)
_READ_BACK = ("Please confirm my order with all its details.", "Repeat what I bought, the parcel number and the total.")

Messages = list[tuple[str, str]]


@dataclass(frozen=True)
class Answer:
    text: str
    token_ids: list[int]
    first: float
    """Seconds to the first token."""
    seconds: float


def ask(stub: policy_pb2_grpc.PolicyServiceStub, messages: Messages, most: int) -> Answer:
    request = policy_pb2.PolicyServiceChatRequest(
        messages=[common_pb2.Message(role=role, content=content) for role, content in messages],
        sampling=common_pb2.SamplingParams(max_new_tokens=most, temperature=0.0),
    )
    start = time.perf_counter()
    text, token_ids, first = "", [], 0.0
    for response in stub.Chat(request):
        first = first or time.perf_counter() - start
        text += response.delta
        token_ids += [token.token_id for token in response.tokens]
    return Answer(text, token_ids, first, time.perf_counter() - start)


def fifth_turn(stub: policy_pb2_grpc.PolicyServiceStub, record: str) -> list[Answer]:
    messages: Messages = [("system", _RULES + record)]
    for turn in _TURNS:
        messages.append(("user", turn))
        answer = ask(stub, messages, 24)
        messages.append(("assistant", answer.text))
    return [answer]


def demo_questions(count: int) -> list[Messages]:
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), 17, Sizes(prompts=1, heldout_prompts=count, demonstrations=1, preferences=1))
        lines = (Path(folder) / "prompts.heldout.jsonl").read_text().splitlines()
    return [[(message["role"], message["content"]) for message in json.loads(line)["prompt"]] for line in lines]


def run(folder: Path, precision: str, rounds: int, threads: int) -> dict[str, object]:
    short = demo_questions(24)
    long: list[Messages] = [
        [("system", _RULES + record), ("user", question)] for record in _ORDERS for question in _READ_BACK
    ]
    firsts: dict[str, list[float]] = {name: [] for name in SERVICES}
    rates: dict[str, dict[str, list[float]]] = {work: {name: [] for name in SERVICES} for work in ("demo", "read back")}
    same: list[bool] = []
    with contextlib.ExitStack() as stack:
        stubs = {}
        for name, settings in SERVICES.items():
            chosen = {"model": str(folder), "precision": precision, **settings}
            one = stack.enter_context(common.service("policy", threads, shared=False, **chosen))
            channel = stack.enter_context(open_channel(one.target))
            stubs[name] = policy_pb2_grpc.PolicyServiceStub(channel)
            ask(stubs[name], short[0], 4)
        for round_number in range(rounds):
            for record in _ORDERS:
                found = {name: fifth_turn(stub, f"{record} (No. {round_number})") for name, stub in stubs.items()}
                same += _same(found)
                for name, (answer,) in found.items():
                    firsts[name].append(answer.first)
            for work, questions, most in (("demo", short, 40), ("read back", long, 96)):
                found = {name: [ask(stub, one, most) for one in questions] for name, stub in stubs.items()}
                same += _same(found)
                for name, answers in found.items():
                    tokens = sum(len(answer.token_ids) - 1 for answer in answers)
                    rates[work][name].append(tokens / sum(answer.seconds - answer.first for answer in answers))
            print(f"round {round_number + 1} of {rounds}", flush=True)
    ratios = [ours / plain for ours, plain in zip(firsts["ours"], firsts["plain"], strict=True)]
    return {
        **heading(threads),
        "model": folder.name,
        "precision": precision,
        "equal_answers": statistics.fmean(same),
        "first_token_of_turn_5": {
            "seconds": {name: statistics.median(found) for name, found in firsts.items()},
            "ratio": statistics.median(ratios),
        },
        "tokens_per_second": {
            work: {
                **{name: statistics.median(found) for name, found in by_name.items()},
                "ratio": statistics.median(
                    ours / plain for ours, plain in zip(by_name["ours"], by_name["plain"], strict=True)
                ),
            }
            for work, by_name in rates.items()
        },
    }


def _same(found: dict[str, list[Answer]]) -> list[bool]:
    return [plain.token_ids == ours.token_ids for plain, ours in zip(found["plain"], found["ours"], strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, "chat", rounds=3, model=True)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    options = parser.parse_args(argv)
    report = run(base_model(options), options.precision, options.rounds, options.threads)
    turn, speed = report["first_token_of_turn_5"], report["tokens_per_second"]
    rows: list[list[object]] = [["first token of turn 5, s", *turn["seconds"].values(), turn["ratio"]]]  # type: ignore[index]
    rows += [[f"tokens/s, {work}", *by_name.values()] for work, by_name in speed.items()]  # type: ignore[attr-defined]
    table(["", *SERVICES, "ratio"], rows)
    write(report, options.out)


if __name__ == "__main__":
    main()
