"""Converters from foreign data sets to canonical rows: one small function a format.

A converter takes one record and yields row dictionaries; what it leaves out it yields as `Skip` with the reason, so
that the summary of an import names it. Converters know shapes only: checks that hold for every row (empty answers,
roles, equal pairs) live in `steersman.data.records`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import orjson

from steersman.data import chat_formats
from steersman.data.format import (
    Converted,
    Format,
    ImportOptions,
    Skip,
    beside,
    message,
    offered_tools,
    tool_call,
)
from steersman.data.label_studio import label_studio
from steersman.data.records import Aspects, Demonstration, Feedback, Preference
from steersman.data.transcripts import hh_common_prefix, hh_last_turn, hh_turns

__all__ = ["FORMATS", "Format", "ImportOptions", "Skip", "hh_common_prefix", "hh_last_turn", "hh_turns"]

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
    yield {"messages": [*_instructed(record), _answer(record["output"])]}


def _instructed(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation up to the output."""
    extra = record.get("input") or ""
    extra = "" if _NO_INPUT.fullmatch(extra) else extra.strip()
    question = record["instruction"].strip()
    turns = [message("system", record["system"])] if record.get("system") else []
    for asked, answered in record.get("history") or []:  # LLaMA-Factory: rounds before this one
        turns += [message("user", asked.strip()), _answer(answered)]
    return [*turns, message("user", f"{question}\n\n{extra}" if extra else question)]


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
    return {"messages": [message("user", question.strip()), _answer(answer)]}


# --- chat transcripts -------------------------------------------------------------------------------------------

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
    "function_call": "assistant",
}


def sharegpt(record: dict[str, Any], options: ImportOptions) -> Converted:
    turns = _asked(record)
    if isinstance(turns, Skip):
        yield turns
        return
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()  # shared conversations often end with a question that nobody answered
    yield {"messages": turns} | offered_tools(record)


def sharegpt_dpo(record: dict[str, Any], options: ImportOptions) -> Converted:
    """LLaMA-Factory's DPO files: a conversation, or an instruction, and two answers: texts, turns or lists of turns."""
    prompt = _asked(record)
    pair: dict[str, Any] = {"prompt": prompt}
    for side in ("chosen", "rejected"):
        answer = record[side]
        raw = (
            answer
            if isinstance(answer, list)
            else [answer if isinstance(answer, dict) else message("assistant", answer)]
        )
        pair[side] = _sharegpt_turns(raw, prompt if isinstance(prompt, list) else [])
    skipped = next((part for part in pair.values() if isinstance(part, Skip)), None)
    yield skipped or pair | offered_tools(record)


def kto(record: dict[str, Any], options: ImportOptions) -> Converted:
    """LLaMA-Factory's KTO files: a conversation, or an instruction with an output, and whether its answer is good."""
    turns = _asked(record)
    if isinstance(turns, Skip):
        yield turns
        return
    if _is_instruction(record):
        turns.append(_answer(record["output"]))
    label = record["kto_tag"] if "kto_tag" in record else record["label"]
    yield {"prompt": turns[:-1], "completion": turns[-1:], "label": label} | offered_tools(record)


def _answer(text: str) -> dict[str, Any]:
    return message("assistant", text.strip())


def _beside_turns(record: dict[str, Any]) -> Iterator[str]:
    name = "conversations" if "conversations" in record else "messages"
    told = (turn for turn in record.get(name, ()) if "from" in turn or "value" in turn)  # OpenAI's are kept whole
    return beside(told, ("from", "role", "value", "content"), name)


def _is_instruction(record: dict[str, Any]) -> bool:
    return "instruction" in record and not {"conversations", "messages"} & record.keys()


def _asked(record: dict[str, Any]) -> list[dict[str, Any]] | Skip:
    """The conversation of a record; of an instruction, with its system and history, all but the output."""
    if _is_instruction(record):
        return _instructed(record)
    system = [message("system", record["system"])] if record.get("system") else []
    turns = _sharegpt_turns(record["conversations"] if "conversations" in record else record["messages"], system)
    return turns if isinstance(turns, Skip) else system + turns


def _sharegpt_turns(raw: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[dict[str, Any]] | Skip:
    """Turns in OpenAI's form, their calls numbered on from those of the turns before."""
    turns: list[dict[str, Any]] = []
    call = sum(len(turn.get("tool_calls") or ()) for turn in before)
    for turn in raw:
        name = turn["from"] if "from" in turn else turn["role"]
        role = _SHAREGPT_ROLES.get(name)
        if role is None:
            return Skip(f"turn of unknown role {name!r}")
        if "from" not in turn and "value" not in turn:
            turns.append(dict(turn))  # OpenAI's own shape, with all that a turn may have
            continue
        text = turn["value"] if "value" in turn else turn["content"]
        if name == "function_call":
            calls = orjson.loads(text) if isinstance(text, str) else text
            calls = calls if isinstance(calls, list) else [calls]
            turns.append({"role": role, "content": "", "tool_calls": [tool_call(f"call-{call + at}", c["name"],
                          c.get("arguments", {})) for at, c in enumerate(calls)]})  # fmt: skip
            call += len(calls)
        else:
            turns.append(message(role, text))
            if role == "tool" and call:
                turns[-1]["tool_call_id"] = f"call-{call - 1}"
    return turns


# --- preferences ------------------------------------------------------------------------------------------------


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
    ratings = {name: rating for name in _HELPSTEER if (rating := _rating(record[name])) is not None}
    if not ratings:
        yield Skip("answer without a rating")
        return
    yield {
        "prompt": [message("user", record["prompt"])],
        "completion": [message("assistant", record["response"])],
        "aspects": ratings,
        "scales": dict.fromkeys(ratings, (0, 4)),
    }


def _rating(value: Any) -> float | None:
    """A number, also as text; None where the judge gave none. Raises ValueError for anything else."""
    if value is None or (isinstance(value, str) and value.strip().upper() in ("", "N/A", "NA", "NONE", "NULL")):
        return None
    return float(value)


def ultrafeedback(record: dict[str, Any], options: ImportOptions) -> Converted:
    """One row for each completion. Ratings are strings, "N/A" where the judge gave none."""
    correct = [answer for answer in record.get("correct_answers") or [] if answer != "None"]
    for completion in record["completions"]:
        ratings = {}
        for aspect, annotation in completion["annotations"].items():
            rating = _rating(annotation["Rating"])
            if rating is not None:
                ratings[aspect] = rating
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


def _beside_ratings(record: dict[str, Any]) -> Iterator[str]:
    completions = record["completions"]
    yield from beside(completions, ("annotations", "response", "model"), "completions")
    for completion in completions:
        yield from beside(completion["annotations"].values(), ("Rating",), "completions[].annotations")


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
        labels = {given: {"value": value} for given, value in zip(labels["name"], labels["value"], strict=True)}
    value: float = (labels.get(name) or {}).get("value", 0.0)
    return value


FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format("dolly", Demonstration, dolly, "CC-BY-SA-3.0", "databricks-dolly-15k"),
        Format("alpaca", Demonstration, alpaca, "CC-BY-NC-4.0", "Stanford Alpaca and files in its form"),
        Format("alpaca-prompt", Demonstration, alpaca_prompt, None, "{prompt, answer} with the Alpaca template"),
        Format("gsm8k", Demonstration, gsm8k, "MIT", "grade-school mathematics, answers as verifiable facts"),
        Format("bitext", Demonstration, bitext, "CDLA-Sharing-1.0", "Bitext customer support"),
        Format("sharegpt", Demonstration, sharegpt, None, "ShareGPT conversations", lost=_beside_turns),
        Format(
            "sharegpt-dpo", Preference, sharegpt_dpo, None, "ShareGPT / LLaMA-Factory DPO files", lost=_beside_turns
        ),
        Format(
            "trl", None, chat_formats.trl, None, "TRL's data set formats: texts or messages, prompt implicit or not"
        ),
        Format("ultrafeedback-binarized", Preference, chat_formats.trl, "MIT", "UltraFeedback as pairs (Zephyr)"),
        Format("tau-bench", Feedback, chat_formats.tau_bench, "MIT", "tau-bench trajectories, reward as label"),
        Format(
            "tau-bench-demonstrations",
            Demonstration,
            chat_formats.tau_bench_solved,
            "MIT",
            "tau-bench trajectories that solved their task",
        ),
        Format(
            "tau-bench-few-shot",
            Demonstration,
            chat_formats.tau_bench_few_shot,
            "MIT",
            "tau-bench few-shot texts; what tools were asked is not in them",
            lost=chat_formats.calls_without_text,
        ),
        Format("abcd", Demonstration, chat_formats.abcd, "MIT", "ABCD dialogues, actions as tool calls"),
        Format("kto", Feedback, kto, None, "LLaMA-Factory KTO files", lost=_beside_turns),
        Format("hh", Preference, hh, "MIT", "Anthropic HH-RLHF", plain=True),
        Format("shp", Preference, shp, "Reddit terms (SHP)", "Stanford Human Preferences"),
        Format("helpsteer", Aspects, helpsteer, "CC-BY-4.0", "NVIDIA HelpSteer"),
        Format("ultrafeedback", Aspects, ultrafeedback, "MIT", "OpenBMB UltraFeedback", lost=_beside_ratings),
        Format("usr", Aspects, usr, "MIT", "USR ratings of Topical-Chat"),
        Format("label-studio", None, label_studio, None, "Label Studio tasks with annotations", votes=True),
        Format("oasst", Preference, oasst, "Apache-2.0", "OpenAssistant trees, ranks to pairs"),
        Format("oasst-demonstrations", Demonstration, oasst_demonstrations, "Apache-2.0", "OpenAssistant best paths"),
    )
}
