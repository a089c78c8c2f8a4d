"""Models as lm-evaluation-harness asks them: a folder, of whose questions every beginning is computed once, and an
endpoint. What is asked and how an answer counts is the harness's own; only where log-probabilities come from is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from steersman.errors import ConfigError, UnavailableError, UnsupportedError
from steersman.net import patiently
from steersman.nn.forward import hidden_states
from steersman.nn.head import OutputHead
from steersman.nn.packed import pack
from steersman.nn.parity import choose_forward
from steersman.nn.sharing import common_prefix, places_of, share_beginnings
from steersman.suites.asking import Endpoint, text_of

Asked = tuple[Any, list[int], list[int]]
"""The harness's key of a question; token ids of what is given and of what may follow."""
Told = tuple[float, bool]
"""Log-probability of what follows, and whether it is what the model would say by itself."""

_TOKENS_AT_ONCE = 4096
_CALLS_AT_ONCE = 4
_TRIES = 5
"""More, of a request to an endpoint that is away for a moment: thousands of them follow each other."""


class FolderModel(HFLM):
    """The harness's own model of a folder; rows that begin alike share what they begin with."""

    def _loglikelihood_tokens(self, requests: list[Asked], disable_tqdm: bool = False, **kwargs: Any) -> list[Told]:
        longest = max((len(given) + len(follows) for _, given, follows in requests), default=0)
        with _packed(self.model) as packs:
            if packs and longest <= self.max_length:
                return self._shared(requests, disable_tqdm)
        told: list[Told] = super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **kwargs)
        return told

    @torch.inference_mode()
    def _shared(self, requests: list[Asked], quiet: bool) -> list[Told]:
        """By whole rows, each different one once; neighbours in alphabetical order have most in common."""
        head = OutputHead(self.model)
        keys = [(tuple(given + follows), len(given)) for _, given, follows in requests]
        found: dict[tuple[tuple[int, ...], int], Told] = {}
        asked = sorted(set(keys))
        with tqdm(total=len(asked), disable=quiet, desc="Log-probabilities") as bar:
            for some in _parts(asked):
                found |= zip(some, self._told(head, some), strict=True)
                bar.update(len(some))
        return [found[key] for key in keys]

    def _told(self, head: OutputHead, some: Sequence[tuple[tuple[int, ...], int]]) -> list[Told]:
        rows = [np.array(row, np.int64) for row, _ in some]
        groups = share_beginnings(rows)
        batch = pack([(group.prompt, group.rests) for group in groups], self.device)
        places = places_of(groups, len(rows), max(map(len, rows)))
        begins = [begin for _, begin in some]
        predicting = [places[index, begin - 1 : len(rows[index]) - 1] for index, begin in enumerate(begins)]
        wanted = np.concatenate([row[begin:] for row, begin in zip(rows, begins, strict=True)])
        states = hidden_states(self.model, batch)[torch.from_numpy(np.concatenate(predicting)).to(self.device)]
        targets = torch.from_numpy(wanted).to(self.device)
        logprobs, _ = head.token_logprobs(states, targets)
        likeliest = head.likeliest(states) == targets
        sizes = [len(one) for one in predicting]
        pairs = zip(logprobs.split(sizes), likeliest.split(sizes), strict=True)
        return [(float(values.sum()), bool(best.all())) for values, best in pairs]


@contextmanager
def _packed(model: Any) -> Iterator[bool]:
    """Inside, the model may run packed rows, if that is right for it; afterwards it is as it was."""
    before = model.config._attn_implementation
    try:
        packs = choose_forward(model).way == "packed"
    except ConfigError:
        packs = False
    try:
        yield packs
    finally:
        model.set_attn_implementation(before)


def _parts(rows: Sequence[tuple[tuple[int, ...], int]]) -> Iterator[list[tuple[tuple[int, ...], int]]]:
    """Neighbours that have about so many tokens, counting what two of them begin with once."""
    part: list[tuple[tuple[int, ...], int]] = []
    size = 0
    for row in rows:
        common = common_prefix(np.array(part[-1][0]), np.array(row[0])) if part else 0
        if part and size + len(row[0]) - common > _TOKENS_AT_ONCE:
            yield part
            part, size, common = [], 0, 0
        part.append(row)
        size += len(row[0]) - common
    if part:
        yield part


class EndpointModel(TemplateLM):
    """A model behind an OpenAI-compatible endpoint: completions with `echo` and `logprobs` tell how likely a given
    answer is, the chat generates. It answers token ids, so that its rows are those of the folder.
    """

    def __init__(self, endpoint: Endpoint, tokenizer: PreTrainedTokenizerBase | None, context: int) -> None:
        """
        Args:
            tokenizer: the served model's; None: only generating tasks can be asked.
            context: tokens that the endpoint takes.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self._endpoint = endpoint
        self._context = context

    @property
    def eot_token_id(self) -> int:
        return int(self._known.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self._known.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def _known(self) -> Any:
        if self.tokenizer is None:
            raise ConfigError(
                "log-probabilities of given answers need the served model's tokenizer: --tokenizer FOLDER"
            )
        return self.tokenizer

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """As the harness encodes for a folder: the tokenizer's own special tokens, unless that is said."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self._known.encode(string, **options))

    def _loglikelihood_tokens(self, requests: list[Asked], disable_tqdm: bool = False, **kwargs: Any) -> list[Told]:
        keys = [(tuple(given + follows), len(given)) for _, given, follows in requests]
        asked = list(dict.fromkeys(keys))
        with ThreadPoolExecutor(_CALLS_AT_ONCE) as calls:
            answers = tqdm(calls.map(self._told, asked), total=len(asked), disable=disable_tqdm, desc="Requests")
            found = dict(zip(asked, answers, strict=True))
        return [found[key] for key in keys]

    def _told(self, key: tuple[tuple[int, ...], int]) -> Told:
        row, begin = key
        left_out = max(0, len(row) - self._context + 1)  # a continuation has at least one token
        prompt = list(row[left_out:])
        body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
        answer = self._post("completions", body)
        try:
            said = answer["choices"][0]["logprobs"]
            values = said["token_logprobs"][begin - left_out : len(prompt)]
            tops = said["top_logprobs"][begin - left_out : len(prompt)]
            if len(values) != len(row) - begin:
                raise IndexError(f"{len(values)} of {len(row) - begin} log-probabilities")
            return float(sum(values)), all(value >= max(top.values()) for value, top in zip(values, tops, strict=True))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UnavailableError(
                f"{self._endpoint.url}/completions tells no log-probabilities of the prompt's tokens ({error}); "
                "ask the model's folder"
            ) from None

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return patiently(lambda: self._endpoint.post(path, body), _TRIES)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise UnsupportedError("perplexities of whole texts are not asked of an endpoint; ask the model's folder")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Every context as a message of its own, answered greedily."""
        with ThreadPoolExecutor(_CALLS_AT_ONCE) as calls:
            answers = calls.map(lambda request: self._generated(*request.args), requests)
            return list(tqdm(answers, total=len(requests), disable=disable_tqdm, desc="Requests"))

    def _generated(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        body = {
            "messages": [{"role": "user", "content": context}],
            "temperature": 0,
            "max_tokens": int(options.get("max_gen_toks", 256)),
            "stop": stops[:4],  # as many as OpenAI's API takes
        }
        answer = self._post("chat/completions", body)
        try:
            text = text_of(answer["choices"][0]["message"]["content"])
        except (AttributeError, IndexError, KeyError, TypeError):
            raise UnavailableError(f"{self._endpoint.url}: the answer is no chat completion") from None
        for stop in stops:
            text = text.split(stop, 1)[0]
        return text
