"""Converters of conversations with tools, and of TRL's own data set formats."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from steersman.data.format import Converted, ImportOptions, Skip, message, offered_tools, tool_call
from steersman.data.transcripts import hh_common_prefix, hh_turns
from steersman.errors import DataError

_SIDES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}


def trl(record: dict[str, Any], options: ImportOptions) -> Converted:
    """TRL's formats (docs/dataset_formats): texts or messages, the prompt apart or at the head of both answers.

    UltraFeedback-binarized is one of them; its scores become the margin.
    """
    row = dict(record) | offered_tools(record)
    if "prompt_id" in row and row.get("id") is None:
        row["id"] = row.pop("prompt_id")
    if "chosen" in row and "rejected" in row:
        pair = _pair(row)
        if isinstance(pair, Skip):
            yield pair
            return
        row |= pair
        _score_margin(row)
    for name, role in _SIDES.items():
        if isinstance(row.get(name), str):
            row[name] = [message(role, row[name].strip())]
    if "chosen" in row and "rejected" in row and row.get("messages") == row["prompt"] + row["chosen"]:
        del row["messages"]  # said already
    if "completion" in row and row.get("label") is None and not {"aspects", "reward"} & row.keys():
        row["messages"] = row.pop("prompt") + row.pop("completion")
        row.pop("label", None)
    yield row


def _pair(row: dict[str, Any]) -> dict[str, Any] | Skip:
    """The two answers of a preference without the prompt that they may begin with, and that prompt."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if row.get("prompt") is not None:
            return {}
        return _text_pair(chosen, rejected)
    if not (isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected):
        raise DataError("chosen and rejected must both be texts or both be lists of messages")
    if row.get("prompt") is not None and chosen[0].get("role") == "assistant":
        return {}
    shared = 0
    for one, two in zip(chosen, rejected, strict=False):
        if one != two:
            break
        shared += 1
    while shared and chosen[shared - 1].get("role") not in ("user", "tool"):
        shared -= 1
    if not shared:
        return Skip("chosen and rejected share no prompt, and none is given")
    if shared in (len(chosen), len(rejected)):
        return Skip("chosen and rejected are the same")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _text_pair(chosen: str, rejected: str) -> dict[str, Any] | Skip:
    """Two texts that begin alike: TRL's `extract_prompt`, and HH's transcripts by their turns."""
    if len(hh_turns(chosen)) > 1:
        return hh_common_prefix(chosen, rejected)
    differs = next((at for at, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    cut = chosen.rfind(" ", 0, differs) if differs is not None else -1
    if cut < 1:
        return Skip("chosen and rejected share no prompt, and none is given")
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def _score_margin(row: dict[str, Any]) -> None:
    scores = [row.get("score_chosen"), row.get("score_rejected")]
    if row.get("margin") is None and all(type(score) in (int, float) for score in scores):
        better, worse = (float(row.pop(name)) for name in ("score_chosen", "score_rejected"))
        if better < worse:
            raise DataError(f"score_chosen is {better:g}, below score_rejected {worse:g}; mend the row")
        row["margin"] = better - worse


# --- agents -----------------------------------------------------------------------------------------------------


def tau_bench(record: dict[str, Any], options: ImportOptions) -> Converted:
    """A trajectory of tau-bench: the prompt ends with the first user turn; reward 1 is good, 0 is bad."""
    reward = float(record["reward"])
    if reward not in (0.0, 1.0):
        yield Skip("reward is neither 0 nor 1")
        return
    turns = _until_last_answer([{name: turn[name] for name in turn if turn[name] is not None or name == "content"}
                                for turn in record["traj"]])  # fmt: skip
    first = next((at for at, turn in enumerate(turns) if turn["role"] == "user"), len(turns)) + 1
    if first >= len(turns):
        yield Skip("trajectory without an answer")
        return
    known = {name: record[name] for name in ("task_id", "trial", "info") if record.get(name) is not None}
    yield known | {"prompt": turns[:first], "completion": turns[first:], "label": reward == 1.0}


def tau_bench_solved(record: dict[str, Any], options: ImportOptions) -> Converted:
    """The same as something to imitate: only what solved its task."""
    for row in tau_bench(record, options):
        if isinstance(row, dict) and row.pop("label"):
            yield row | {"messages": row.pop("prompt") + row.pop("completion")}
        else:
            yield Skip("the task was not solved") if isinstance(row, dict) else row


_SPEAKER = re.compile(r"^(user|assistant|tool): ?", re.MULTILINE)
_NO_TEXT = "None"


def tau_bench_few_shot(record: dict[str, Any], options: ImportOptions) -> Converted:
    """{messages_display}: a dialogue as one text, with "None" where a tool was called.

    The results stay as turns; what they answer is lost, and nobody is taught to say "None".
    """
    found = _SPEAKER.split(record["messages_display"])
    if found[0].strip():
        yield Skip("text that begins without a speaker")
        return
    turns: list[dict[str, Any]] = []
    for role, text in zip(found[1::2], found[2::2], strict=True):
        if role != "assistant" or text.strip() != _NO_TEXT:
            turns.append(message(role, text.strip()))
    yield {"messages": _until_last_answer(turns)}


def calls_without_text(record: dict[str, Any]) -> Iterator[str]:
    """Of a few-shot text."""
    if re.search(rf"^assistant: {_NO_TEXT}$", record["messages_display"], re.MULTILINE):
        yield "messages_display: which tool was called with what"


def abcd(record: dict[str, Any], options: ImportOptions) -> Converted:
    """ABCD: what the agent did stands as a call of a tool and its result; turns of one speaker are joined."""
    turns: list[dict[str, Any]] = []
    for number, ((speaker, text), target) in enumerate(zip(record["original"], record["delexed"], strict=True)):
        if speaker == "action":
            name, values = target["targets"][2] or "action", target["targets"][3]
            call = tool_call(f"call-{number}", name, {"values": values})
            turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
            turns.append({"role": "tool", "tool_call_id": f"call-{number}", "content": text})
            continue
        role = {"agent": "assistant", "customer": "user"}[speaker]
        if turns and turns[-1]["role"] == role and "tool_calls" not in turns[-1]:
            turns[-1]["content"] += f"\n{text}"
        else:
            turns.append(message(role, text))
    known = {"convo_id": record["convo_id"], "scenario": record["scenario"]}
    yield known | {"messages": _until_last_answer(turns)}


def _until_last_answer(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    while turns and turns[-1]["role"] != "assistant":
        turns = turns[:-1]
    return turns
