"""Converters from foreign data sets to canonical rows: one small function a format.

A converter takes one record and yields row dictionaries; what it leaves out it yields as `Skip` with the reason, so
that the summary of an import names it. Converters know shapes only: checks that hold for every row (empty answers,
roles, equal pairs) live in `steersman.data.records`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from steersman.data.records import Aspects, Demonstration, Feedback, Preference, Row


@dataclass(frozen=True, slots=True)
class Skip:
    """A part of a record that was left out on purpose."""

    reason: str


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What the user asks of an import, beside files and format."""

    languages: frozenset[str] = frozenset()
    """Languages to keep where a format names them; empty keeps all."""
    min_score_ratio: float = 1.0
    """SHP: leave out pairs whose score ratio is lower (the authors train on 2 and above)."""


Converted = Iterator[dict[str, Any] | Skip]
Converter = Callable[[dict[str, Any], ImportOptions], Converted]


@dataclass(frozen=True, slots=True)
class Format:
    """A data set format that `steersman data import` knows."""

    name: str
    row_type: type[Row] | None
    """None: each row by its own keys."""
    convert: Converter
    licence: str | None
    """Licence of the public data set; None where a format is used by many."""
    about: str
    plain: bool = False
    """Turns are made by the converter itself, of a user or the assistant with a text: nobody need look at each."""


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


# --- instruction data -------------------------------------------------------------------------------------------

# Dolly's card: contexts may hold bracketed Wikipedia citation numbers, which it recommends to remove.
_CITATION = re.compile(r"(?<=\S)\[\d{1,3}\]")
_NO_INPUT = re.compile(r"\W*no\s*input\W*", re.IGNORECASE)
_ALPACA_PROMPT = re.compile(
    r".*?### Instruction:\n(?P<instruction>.*?)(?:\n+### Input:\n(?P<input>.*?))?\n+### Response:\s*", re.DOTALL
)
_END_MARK = "###eos_token###"


def dolly(record: dict[str, Any], options: ImportOptions) -> Converted:
    context = _CITATION.sub("", record["context"]).strip()
    question = record["instruction"].strip()
    yield _demonstration(f"{question}\n\n{context}" if context else question, record["response"]) | {
        "category": record["category"]
    }


def alpaca(record: dict[str, Any], options: ImportOptions) -> Converted:
    extra = record.get("input") or ""
    if _NO_INPUT.fullmatch(extra):
        extra = ""
    question = record["instruction"].strip()
    yield _demonstration(f"{question}\n\n{extra.strip()}" if extra.strip() else question, record["output"])


def alpaca_prompt(record: dict[str, Any], options: ImportOptions) -> Converted:
    """{prompt, answer} with the Alpaca template rendered into the prompt and an end mark after the answer."""
    found = _ALPACA_PROMPT.fullmatch(record["prompt"])
    if found is None:
        yield Skip("prompt is not in the Alpaca template")
        return
    fields = {"instruction": found["instruction"], "input": found["input"], "output": record["answer"]}
    fields["output"] = fields["output"].removesuffix(_END_MARK)
    yield from alpaca(fields, options)


def gsm8k(record: dict[str, Any], options: ImportOptions) -> Converted:
    text, mark, number = record["answer"].rpartition("####")
    if not mark:
        yield Skip("answer has no final '#### number'")
        return
    answer = number.strip().replace(",", "")
    solution = re.sub(r"<<[^>]*>>", "", text).strip()
    yield _demonstration(record["question"], f"{solution}\nThe answer is {answer}.") | {"facts": {"answer": answer}}


def bitext(record: dict[str, Any], options: ImportOptions) -> Converted:
    row = _demonstration(record["instruction"], record["response"].replace("\r\n", "\n"))
    row |= {"intent": record["intent"], "category": record["category"], "tags": record["tags"]}
    if record["entity_type"]:
        # The value column lost leading zeros; the text at the character offsets has them.
        start, end = int(record["start_offset"]), int(record["end_offset"])
        row["entity"] = {"type": record["entity_type"], "value": record["instruction"][start:end]}
    yield row


def _demonstration(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [message("user", question.strip()), message("assistant", answer.strip())]}


# --- chat transcripts -------------------------------------------------------------------------------------------

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


def sharegpt(record: dict[str, Any], options: ImportOptions) -> Converted:
    turns = _sharegpt_turns(record)
    if isinstance(turns, Skip):
        yield turns
        return
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()  # shared conversations often end with a question that nobody answered
    yield {"messages": turns}


def sharegpt_dpo(record: dict[str, Any], options: ImportOptions) -> Converted:
    turns = _sharegpt_turns(record)
    if isinstance(turns, Skip):
        yield turns
        return
    answers = [record[side] for side in ("chosen", "rejected")]
    chosen, rejected = (answer if isinstance(answer, str) else answer["value"] for answer in answers)
    yield {"prompt": turns, "chosen": [message("assistant", chosen)], "rejected": [message("assistant", rejected)]}


def kto(record: dict[str, Any], options: ImportOptions) -> Converted:
    """LLaMA-Factory's KTO files: a whole conversation and whether its last answer is good."""
    turns = _sharegpt_turns(record)
    if isinstance(turns, Skip):
        yield turns
        return
    yield {"prompt": turns[:-1], "completion": turns[-1:], "label": record["label"]}


def _sharegpt_turns(record: dict[str, Any]) -> list[dict[str, Any]] | Skip:
    raw = record["conversations"] if "conversations" in record else record["messages"]
    turns = [message("system", record["system"])] if record.get("system") else []
    for turn in raw:
        name = turn["from"] if "from" in turn else turn["role"]
        role = _SHAREGPT_ROLES.get(name)
        if role is None:
            return Skip(f"turn of unknown role {name!r}")
        turns.append(message(role, turn["value"] if "value" in turn else turn["content"]))
    return turns


# --- preferences ------------------------------------------------------------------------------------------------

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_HUMAN, _HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def hh(record: dict[str, Any], options: ImportOptions) -> Converted:
    """Anthropic HH-RLHF: two transcripts that part at some turn; the prompt is what they share.

    The prompt is the longest common prefix at a turn boundary that ends with a human turn: cutting before the last
    assistant turn instead gives two different prompts where a reply itself holds a human turn.
    """
    if record["chosen"] == record["rejected"]:
        yield Skip("chosen and rejected are the same")
        return
    parted = hh_last_turn(record["chosen"], record["rejected"])
    yield parted or hh_common_prefix(record["chosen"], record["rejected"])


def hh_last_turn(chosen: str, rejected: str) -> dict[str, Any] | None:
    """The short way for nearly every pair, in which only the last assistant turn differs; None for the others."""
    cut = chosen.rfind(_HH_ASSISTANT)
    if cut < 0 or cut != rejected.rfind(_HH_ASSISTANT):
        return None
    shared = chosen[:cut]
    if not rejected.startswith(shared) or chosen.find(_HH_HUMAN, cut) >= 0 or rejected.find(_HH_HUMAN, cut) >= 0:
        return None
    prompt = hh_turns(shared)
    if not prompt or prompt[-1]["role"] != "user":
        return None
    behind = cut + len(_HH_ASSISTANT)
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen[behind:].strip()}],
        "rejected": [{"role": "assistant", "content": rejected[behind:].strip()}],
    }


def hh_common_prefix(chosen: str, rejected: str) -> dict[str, Any] | Skip:
    """The general way: common turns up to a human turn, whatever follows on either side."""
    ours, theirs = hh_turns(chosen), hh_turns(rejected)
    shared = 0
    for our, their in zip(ours, theirs, strict=False):
        if our != their:
            break
        shared += 1
    while shared and ours[shared - 1]["role"] != "user":
        shared -= 1
    if not shared:
        return Skip("chosen and rejected share no human turn")
    if shared in (len(ours), len(theirs)):
        return Skip("a transcript does not end with an assistant turn")
    return {"prompt": ours[:shared], "chosen": ours[shared:], "rejected": theirs[shared:]}


def hh_turns(transcript: str) -> list[dict[str, Any]]:
    """Turns of an HH transcript; consecutive turns of one role are joined, "Human:" inside a line stays text."""
    parts = _HH_TURN.split(transcript)
    turns: list[dict[str, Any]] = []
    for index in range(1, len(parts), 2):
        role, text = _HH_ROLES[parts[index]], parts[index + 1].strip()
        if turns and turns[-1]["role"] == role:
            turns[-1] = message(role, f"{turns[-1]['content']}\n\n{text}".strip())
        else:
            turns.append({"role": role, "content": text})
    return turns


def shp(record: dict[str, Any], options: ImportOptions) -> Converted:
    """Stanford SHP: Reddit comments; margin is the natural logarithm of the score ratio."""
    ratio = float(record["score_ratio"])
    label = record["labels"]
    if label not in (0, 1) or ratio < 1:
        yield Skip("labels must be 0 or 1 and score_ratio at least 1")
        return
    if ratio < options.min_score_ratio:
        yield Skip(f"score ratio below {options.min_score_ratio:g}")
        return
    better, worse = ("A", "B") if label == 1 else ("B", "A")
    yield {
        "prompt": [message("user", record["history"])],
        "chosen": [message("assistant", record[f"human_ref_{better}"])],
        "rejected": [message("assistant", record[f"human_ref_{worse}"])],
        "margin": math.log(ratio),
        "domain": record["domain"],
    }


# --- ratings by aspect ------------------------------------------------------------------------------------------

_HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_USR_SCALES = {
    "understandability": (0, 1),
    "naturalness": (1, 3),
    "coherence": (1, 3),
    "engagingness": (1, 3),
    "groundedness": (0, 1),
    "overall": (1, 5),
}


def helpsteer(record: dict[str, Any], options: ImportOptions) -> Converted:
    yield {
        "prompt": [message("user", record["prompt"])],
        "completion": [message("assistant", record["response"])],
        "aspects": {name: float(record[name]) for name in _HELPSTEER},
        "scales": dict.fromkeys(_HELPSTEER, (0, 4)),
    }


def ultrafeedback(record: dict[str, Any], options: ImportOptions) -> Converted:
    """One row for each completion. Ratings are strings, "N/A" where the judge gave none."""
    correct = [answer for answer in record.get("correct_answers") or [] if answer != "None"]
    for completion in record["completions"]:
        ratings = {}
        for aspect, annotation in completion["annotations"].items():
            try:
                ratings[aspect] = float(annotation["Rating"])
            except ValueError:
                continue
        if not ratings:
            yield Skip("completion without a rating")
            continue
        row = {
            "prompt": [message("user", record["instruction"])],
            "completion": [message("assistant", completion["response"])],
            "aspects": ratings,
            "scales": dict.fromkeys(ratings, (1, 5)),
            "model": completion["model"],
        }
        if correct:
            row["facts"] = {"correct_answers": correct}
        yield row


def usr(record: dict[str, Any], options: ImportOptions) -> Converted:
    """USR / Topical-Chat: a dialogue of two people, one turn a line; the last line is answered."""
    lines = [line.strip() for line in record["source"].split("\n") if line.strip()]
    turns = [message("user" if (len(lines) - at) % 2 else "assistant", text) for at, text in enumerate(lines)]
    yield {
        "prompt": turns,
        "completion": [message("assistant", record["system_output"].strip())],
        "aspects": record["scores"],
        "scales": {name: _USR_SCALES[name] for name in record["scores"]},
        "model": record["system_id"],
    }


# --- conversation trees -----------------------------------------------------------------------------------------


def oasst(record: dict[str, Any], options: ImportOptions) -> Converted:
    """OpenAssistant trees: every two ranked replies to a prompt make a pair; margin is the distance in rank."""
    root = _oasst_root(record)
    if isinstance(root, Skip):
        yield root
        return
    stack: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [(root, [])]
    while stack:
        node, path = stack.pop()
        reason = _oasst_unwanted(node, options)
        if reason:
            yield Skip(reason)
            continue
        here = [*path, message("user" if node["role"] == "prompter" else "assistant", node["text"])]
        replies = node.get("replies") or []
        stack.extend((reply, here) for reply in reversed(replies))
        if node["role"] != "prompter" or len(replies) < 2:
            continue
        wanted = [reply for reply in replies if not _oasst_unwanted(reply, options)]
        ranked = sorted((reply for reply in wanted if reply.get("rank") is not None), key=lambda reply: reply["rank"])
        if len(ranked) < len(wanted) and len(wanted) > 1:
            yield Skip("reply without a rank beside other replies")
        for at, better in enumerate(ranked):
            for worse in ranked[at + 1 :]:
                if better["rank"] == worse["rank"]:
                    yield Skip("replies of equal rank")
                    continue
                yield {
                    "prompt": here,
                    "chosen": [message("assistant", better["text"])],
                    "rejected": [message("assistant", worse["text"])],
                    "margin": float(worse["rank"] - better["rank"]),
                    "language": node["lang"],
                    "tree": record.get("message_tree_id") or node["message_id"],
                }


def oasst_demonstrations(record: dict[str, Any], options: ImportOptions) -> Converted:
    """OpenAssistant trees: the path of the best replies by people, down to its last answer."""
    root = _oasst_root(record)
    if isinstance(root, Skip):
        yield root
        return
    node, turns = root, []
    while True:
        reason = _oasst_unwanted(node, options) or ("made by a model" if node.get("synthetic") else None)
        if reason:
            yield Skip(reason)
            break
        turns.append(message("user" if node["role"] == "prompter" else "assistant", node["text"]))
        replies = node.get("replies") or []
        if not replies:
            break
        node = min(replies, key=lambda reply: math.inf if reply.get("rank") is None else reply["rank"])
    while turns and turns[-1]["role"] == "user":
        turns.pop()
    if turns:
        yield {"messages": turns, "language": root["lang"], "tree": root["message_id"]}
    else:
        yield Skip("tree without an answer")


def _oasst_root(record: dict[str, Any]) -> dict[str, Any] | Skip:
    """The first message of a tree, wrapped with its state or bare."""
    state = record.get("tree_state", "ready_for_export")
    if state != "ready_for_export":
        return Skip(f"tree state {state}")
    return record["prompt"] if isinstance(record.get("prompt"), dict) else record


def _oasst_unwanted(node: dict[str, Any], options: ImportOptions) -> str | None:
    """Why a message, and all below it, is left out."""
    if node.get("deleted"):
        return "deleted message"
    if node.get("review_result") is False or _oasst_label(node, "spam") > 0.5:
        return "spam"
    if (node.get("emojis") or {}).get("red_flag"):
        return "flagged by a reader"
    if options.languages and node["lang"] not in options.languages:
        return f"language {node['lang']}"
    return None


def _oasst_label(node: dict[str, Any], name: str) -> float:
    """Mean value of a label in either form: {name: {value}} of the trees, {name: [], value: []} of the flat export."""
    labels = node.get("labels") or {}
    if isinstance(labels.get("name"), list):
        return dict(zip(labels["name"], labels["value"], strict=True)).get(name, 0.0)
    return (labels.get(name) or {}).get("value", 0.0)


def label_studio(record: dict[str, Any], options: ImportOptions) -> Converted:
    """Tasks exported by `steersman data export --to label-studio`, or by Label Studio with the same configuration.

    Each annotation that says something gives one row; cancelled ones are left out.
    """
    done = [a for a in record.get("annotations") or [] if not a.get("was_cancelled")]
    if not done:
        if "messages" in record["data"]:
            yield dict(record["data"])
        else:
            yield Skip("task without an annotation")
    for annotation in done:
        row = dict(record["data"])
        for result in annotation["result"]:
            value = result["value"]
            if result["type"] == "pairwise":
                sides = ("answer_1", "answer_2") if value["selected"] == "left" else ("answer_2", "answer_1")
                row["chosen"], row["rejected"] = (row[side] for side in sides)
            elif result["type"] == "choices":
                row["label"] = value["choices"][0] == "good"
            elif result["type"] == "rating":
                row.setdefault("aspects", {})[result["from_name"]] = value["rating"]
        for side in ("answer_1", "answer_2"):
            row.pop(side, None)
        yield row


FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format("dolly", Demonstration, dolly, "CC-BY-SA-3.0", "databricks-dolly-15k"),
        Format("alpaca", Demonstration, alpaca, "CC-BY-NC-4.0", "Stanford Alpaca and files in its form"),
        Format("alpaca-prompt", Demonstration, alpaca_prompt, None, "{prompt, answer} with the Alpaca template"),
        Format("gsm8k", Demonstration, gsm8k, "MIT", "grade-school mathematics, answers as verifiable facts"),
        Format("bitext", Demonstration, bitext, "CDLA-Sharing-1.0", "Bitext customer support"),
        Format("sharegpt", Demonstration, sharegpt, None, "ShareGPT conversations"),
        Format("sharegpt-dpo", Preference, sharegpt_dpo, None, "ShareGPT / LLaMA-Factory DPO files"),
        Format("kto", Feedback, kto, None, "LLaMA-Factory KTO files"),
        Format("hh", Preference, hh, "MIT", "Anthropic HH-RLHF", plain=True),
        Format("shp", Preference, shp, "Reddit terms (SHP)", "Stanford Human Preferences"),
        Format("helpsteer", Aspects, helpsteer, "CC-BY-4.0", "NVIDIA HelpSteer"),
        Format("ultrafeedback", Aspects, ultrafeedback, "MIT", "OpenBMB UltraFeedback"),
        Format("usr", Aspects, usr, "MIT", "USR ratings of Topical-Chat"),
        Format("label-studio", None, label_studio, None, "Label Studio tasks with annotations"),
        Format("oasst", Preference, oasst, "Apache-2.0", "OpenAssistant trees, ranks to pairs"),
        Format("oasst-demonstrations", Demonstration, oasst_demonstrations, "Apache-2.0", "OpenAssistant best paths"),
    )
}
