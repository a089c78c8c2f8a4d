"""Which architecture goes through which path: every decoder, encoder and encoder-decoder that transformers offers.

    python -m benchmarks.models [--only llama gemma2 ...] [--docs docs/models.md] [--workers 2] [--seconds 120]

For each configuration a tiny random model with the same layer kinds is built, and every path takes its verdict by
computing, as `prepare` and the services do. Then the path runs again on another random model and other rows, and is
compared with the model's own forward pass of each row: an accepted path that differs there is `silently_wrong`.
Writes build/bench/models.json. The path `vllm` is measured by benchmarks/models_vllm.py, in vLLM's own environment.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from benchmarks.report import command_line, heading, table
from services.policy.engines.choice import difference_of, engine_verdict
from services.policy.engines.transformers_engine import with_decoder
from steersman.artifacts import write_whole
from steersman.config.manifest import Lora
from steersman.nn import parity
from steersman.nn.encoder_decoder import collated, is_encoder_decoder, language_model_class, refuse_encoder_decoder
from steersman.nn.forward import is_decoder, predicting_states, unwrapped
from steersman.nn.head import OutputHead
from steersman.nn.load import load_causal_lm, quiet_libraries
from steersman.nn.lora import attach_lora, merge_to_folder, save_adapter
from steersman.nn.packed import pack
from steersman.nn.parity import (
    ParityVerdict,
    causal_verdict,
    choose_forward,
    example_groups,
    score_verdict,
    skip_padding,
)
from steersman.nn.tiny import LENGTH, tiny_model
from steersman.nn.tokens import IGNORE
from steersman.testing.models import LONGROPE, save_model_folder

CAUSAL_PATHS = ("sft", "dpo", "rlFull", "rlLora", "reference", "engine", "merge")
SCORE_PATHS = ("rewardModel", "reward")
PATHS = (*CAUSAL_PATHS, "vllm", *SCORE_PATHS)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
HYBRID = ["mamba", "attention", "mamba"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 (window)": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "mistral (no window)": ("mistral", {"sliding_window": None}),
    "phi3 (longrope)": ("phi3", {"rope_parameters": LONGROPE, "max_position_embeddings": 131072}),
    "lfm2 (convolutions)": ("lfm2", {"full_attn_idxs": [2, 5, 8], "num_hidden_layers": 9}),
    "granitemoehybrid (attention, Mamba)": ("granitemoehybrid", {"layer_types": HYBRID, "num_hidden_layers": 3}),
    "granite (logit scale)": ("granite", {"logits_scaling": 8.0}),
    "nemotron (grouped queries)": ("nemotron", {"num_key_value_heads": 8}),
    "hunyuan_v1_dense (head width)": ("hunyuan_v1_dense", {"head_dim": 128}),
    "ministral (head width)": ("ministral", {"head_dim": 128}),
    "llama (Llama 3's rotations)": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 131072}),
    "llama (dynamic NTK)": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "qwen2 (YaRN)": ("qwen2", {"rope_parameters": YARN, "max_position_embeddings": 131072}),
    "falcon (new decoder)": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 64, "hidden_size": 4096},
    ),
    "deepseek_v3 (as published)": (
        "deepseek_v3",
        {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
    "olmo (clipped)": ("olmo", {"clip_qkv": 0.5}),
    "t5": ("t5", {"decoder_start_token_id": 0}),
    "longt5": ("longt5", {"decoder_start_token_id": 0}),
    "switch_transformers": ("switch_transformers", {"decoder_start_token_id": 0}),
    "t5 (FLAN-T5)": (
        "t5",
        {"decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}
"""Configurations that the defaults of their class do not show, or that its defaults leave incomplete."""
_FIRST = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_text", "phi3", "gpt_oss", "deepseek_v3"),
    *("mixtral", "qwen3_moe", "qwen3_5", "qwen3_5_text", "qwen3_next", "llama4", "llama4_text", "granite", "olmo3"),
    *("granitemoe", "cohere", "cohere2", "smollm3", "gpt2", "gptj", "bloom", "mpt", "opt", "falcon", "roberta"),
    *("bert", "deberta-v2", "modernbert", "distilbert", "xlm-roberta", "electra", "albert", *VARIANTS),
}
"""What people bring is measured first."""


def _default(family: str) -> PreTrainedConfig | None:
    """The configuration of a family without options; None where it cannot be made."""
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[family]()
    except Exception:  # whatever a configuration's own code raises
        return None
    return config


ENCODER_DECODERS = [
    family for family in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if is_encoder_decoder(_default(family))
]
"""Those that write text from text; the mapping has models of speech, too, whose text part is a decoder."""


def offered() -> set[str]:
    mapped = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    return {*chain.from_iterable(mapped), *ENCODER_DECODERS, *VARIANTS}


def decoders() -> list[str]:
    """The architectures that write text, those that people bring first."""
    everything = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *ENCODER_DECODERS, *VARIANTS}
    return sorted(everything, key=lambda name: (name not in _FIRST, name))


_REPORT = Path("build/bench/models.json")
VLLM_REPORT = Path("build/bench/models_vllm.json")
_VLLM_KEPT = Path("benchmarks/results/models_vllm.json")
INDEPENDENT_SEED = 11
MARKS = {"agrees": "agrees", "plain": "plain", "refused": "–"}


def of_vllm() -> dict[str, dict[str, Any]]:
    """Outcome, largest difference and reason of the path `vllm` by architecture, as measured last."""
    path = VLLM_REPORT if VLLM_REPORT.is_file() else _VLLM_KEPT
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())["architectures"] if path.is_file() else {}
    return found


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"the check takes longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def config_of(name: str) -> PreTrainedConfig:
    family, changes = VARIANTS.get(name, (name, {}))
    config: PreTrainedConfig = CONFIG_MAPPING[family](**changes)
    return config


def measure(name: str, seconds: int) -> dict[str, Any]:
    """Outcome, largest difference, reason, and what the second look found, by path."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    quiet_libraries()
    torch.set_num_threads(1)
    started, paths = time.monotonic(), {}
    family = VARIANTS.get(name, (name, {}))[0]
    offered = (CAUSAL_PATHS if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or family in ENCODER_DECODERS else ()) + (
        SCORE_PATHS if family in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES else ()
    )
    for path in offered:
        try:
            with at_most(seconds):
                paths[path] = _path(path, config_of(name))
        except Exception as error:  # whatever a model's own code raises
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            paths[path] = {"outcome": "refused", "difference": None, "reason": reason}
    vllm = of_vllm().get(name)
    if vllm is not None:
        paths["vllm"] = vllm
    return {"architecture": name, "seconds": round(time.monotonic() - started, 1), "paths": paths}


def _path(path: str, config: PreTrainedConfig) -> dict[str, Any]:
    if path == "dpo":
        refuse_encoder_decoder(config, "DPO is for decoders")
    if path == "engine":
        decoder, verdict = engine_verdict(config, with_decoder)
    else:
        decoder, verdict = None, (score_verdict if path in SCORE_PATHS else causal_verdict)(config)
    found: dict[str, Any] = {"outcome": verdict.outcome, "difference": _number(verdict.difference)}
    if verdict.outcome != "agrees" or verdict.limit:
        found["reason"] = verdict.reason
    if verdict.limit:
        found["limit"] = verdict.limit
    if decoder is not None and verdict.outcome != "refused":
        found["decoder"] = decoder
    if verdict.outcome == "refused":
        return found
    again = _again(path, config, verdict, decoder)
    found["difference"] = max(found["difference"], again)
    found["wrong"] = not again <= parity.NATS
    return found


def _again(path: str, config: PreTrainedConfig, verdict: ParityVerdict, decoder: Any) -> float:
    """Largest difference on another random model and other rows, through the functions that the path calls."""
    auto = AutoModelForSequenceClassification if path in SCORE_PATHS else language_model_class(config)
    model = tiny_model(auto, config, seed=INDEPENDENT_SEED)
    longest = LENGTH if verdict.limit else None
    if path == "engine":
        return difference_of(model, decoder, with_decoder, longest, seed=INDEPENDENT_SEED)
    groups = example_groups(longest, seed=INDEPENDENT_SEED)
    look: dict[str, Callable[[PreTrainedModel, list[parity.Group]], float]] = {
        "sft": _padded_difference,
        "dpo": _padded_difference,
        "rlFull": _packed_difference,
        "reference": _packed_difference,
        "rlLora": _adapter_difference,
        "merge": _merge_difference,
        "rewardModel": _score_difference,
        "reward": _score_difference,
    }
    return look[path](model, groups)


def _own(model: Any, groups: list[parity.Group]) -> Tensor:
    return parity.alone(model, groups)[0]


def _padded_difference(model: PreTrainedModel, groups: list[parity.Group]) -> float:
    trained = copy.deepcopy(model)
    skip_padding(trained)
    padded = _collated_batch if is_encoder_decoder(model.config) else parity.of_padded_batch
    return _largest(padded(trained, groups), _own(model, groups))


@torch.no_grad()
def _collated_batch(trained: Any, groups: list[parity.Group]) -> Tensor:
    """As `of_padded_batch`, in the batch from which an encoder-decoder learns."""
    pairs = [(prompt, answer) for prompt, answers in groups for answer in answers]
    rows = [{"input_ids": prompt.tolist(), "labels": answer.tolist()} for prompt, answer in pairs]
    batch = collated(rows, trained, IGNORE)
    labels = batch.pop("labels").long()
    table = trained(**batch).logits.float().log_softmax(-1)
    return table.gather(2, labels.clamp(min=0)[..., None])[..., 0][labels != IGNORE]


def _packed_difference(model: PreTrainedModel, groups: list[parity.Group]) -> float:
    trained = copy.deepcopy(model)
    return _largest(_logprobs(trained, groups), _own(model, groups))


def _adapted(model: PreTrainedModel) -> Any:
    adapted = attach_lora(copy.deepcopy(model), Lora(rank=4))
    generator = torch.Generator().manual_seed(INDEPENDENT_SEED)
    with torch.no_grad():
        for name, one in adapted.named_parameters():
            if "lora_B" in name:
                one.add_(0.05 * torch.randn(one.shape, generator=generator))
    return adapted.eval()


def _adapter_difference(model: PreTrainedModel, groups: list[parity.Group]) -> float:
    adapted = _adapted(model)
    own = _own(copy.deepcopy(adapted), groups)
    return _largest(_logprobs(adapted, groups), own)


def _merge_difference(model: PreTrainedModel, groups: list[parity.Group]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        base = save_model_folder(Path(folder) / "base", model)
        adapted = _adapted(load_causal_lm(base))
        save_adapter(adapted, Path(folder) / "adapter")
        merge_to_folder(base, Path(folder) / "adapter", Path(folder) / "merged")
        return _largest(_own(load_causal_lm(Path(folder) / "merged"), groups), _own(adapted, groups))


def _score_difference(model: PreTrainedModel, groups: list[parity.Group]) -> float:
    return parity.score_difference(model, groups, lambda one: skip_padding(one))


def _logprobs(model: Any, groups: list[parity.Group]) -> Tensor:
    choose_forward(model)
    assert is_decoder(unwrapped(model))
    batch = pack(groups)
    with torch.no_grad():
        return OutputHead(model).token_logprobs(predicting_states(model, batch), batch.targets)[0]


def _largest(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max())


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


_PAGE = """\
An architecture is accepted by computing, not by a list: `steersman validate`, `prepare` and every service build a tiny
random model of the same configuration (layers cut, every layer kind kept, windows and chunks shorter than the rows),
run it through the functions that they will use, and compare with the model's own forward pass of each row, gradients
included.

- **agrees**: without padding, prompts shared between answers, sliding windows past their end; the engine has a cache of
  its own with continuous batching.
- **plain**: the model's own code on rows of equal length (the engine: one sample at a time). Slower, announced, and
  right. Recurrent and convolution layers, ALiBi, and masks that a model makes itself end here, and encoder-decoders,
  whose prompts and answers are padded (DPO and reward models refuse them).
- **–**: refused with the measured reason, which is in `build/bench/models.json`: an output layer that is more than one
  linear layer (language-model heads of encoders), a training mode that computes something else than evaluation mode
  (Phi-3.5 MoE draws its experts, 0.54 nats), or a default configuration that cannot be built. LoRA leaves out linear
  layers whose weight a model reads itself (Mamba's `dt_proj`, LongCat's `router.classifier`): an adapter there would do
  nothing, so `lora.targetModules` that names one is refused by `validate`, before anything is spent.
- `limit`: rotations that depend on the longest row of a batch (longrope, dynamic NTK) bound rows and context to the
  length up to which they do not.

Paths: SFT and DPO on padded batches, RL with all weights and with LoRA (`all-linear`), reference service, transformers
engine, merging an adapter, training a reward model, reward service. Numbers are the largest difference of a
log-probability in nats (of a score), over two random models in fp32.

Path `vllm` (`make bench-models-vllm`, in vLLM's own environment): the engine serves such a model, heads as wide as the
real ones, before it loads the real weights, and then a second one in its place, sent as training sends weights.
**agrees**: both as transformers. **–**: vLLM refuses, or its numbers are others, in which case the engine refuses
(`prepare` too, where vLLM is installed); the reasons are below. Where the small model cannot be served, which says
nothing about the real one, the engine says so and goes on: vLLM refuses loudly what it does not know. In bf16 the mean
difference counts, up to 0.1 nats. The guard of the RL loop compares once more in the first step of every run.
"""


_COLUMNS = ("architecture", *PATHS, "largest difference", "limit")


def documented(rows: dict[str, dict[str, str]], total: int, wrong: int) -> str:
    """The page docs/models.md of `rows`: cells of the table by architecture and column."""
    counts = {path: Counter(row.get(path, "") for row in rows.values()) for path in PATHS}
    looked_at = sum(counts[path][mark] for path in PATHS for mark in MARKS.values())
    lines = [
        "# Models",
        "",
        f"Generated by `make bench-models ARGS='--docs docs/models.md'`, transformers {transformers.__version__} and "
        f"torch {torch.__version__.partition('+')[0]};",
        "rows with ° on another machine with transformers 5.17.0 and torch 2.11.",
        "",
        _PAGE,
        f"Measured: {len(rows)} of {total} configurations. "
        f"Silently wrong: {wrong} of {looked_at} (architecture, path).",
        "",
        "| path | " + " | ".join(MARKS) + " |",
        "|---|" + "---|" * len(MARKS),
        *(f"| {path} | " + " | ".join(str(counts[path][mark]) for mark in MARKS.values()) + " |" for path in PATHS),
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|---|" + "---|" * (len(_COLUMNS) - 1),
        *(
            "| " + " | ".join([name, *(row.get(key, "") for key in _COLUMNS[1:])]) + " |"
            for name, row in sorted(rows.items())
        ),
        "",
        *_vllm_reasons(),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _vllm_reasons() -> list[str]:
    """What vLLM cannot serve, or computes otherwise, and since when its context ends earlier."""
    found = {name: one for name, one in sorted(of_vllm().items()) if one["reason"]}
    rows = [f"| {name} | {MARKS[one['outcome']]} | {one['reason'].replace('|', '/')} |" for name, one in found.items()]
    return ["## vLLM: why not", "", "| architecture | outcome | reason |", "|---|---|---|", *rows] if rows else []


def row_of(result: dict[str, Any]) -> dict[str, str]:
    """Cells of the page's table by column."""
    paths = result["paths"]
    accepted = [one for one in paths.values() if one["outcome"] != "refused" and one["difference"] is not None]
    largest = max((one["difference"] for one in accepted), default=None)
    return {
        **{path: MARKS[one["outcome"]] for path, one in paths.items()},
        "largest difference": "" if largest is None else f"{largest:.1e}",
        "limit": next((str(one["limit"]) for one in paths.values() if "limit" in one), ""),
    }


def rows_of(page: Path) -> dict[str, dict[str, str]]:
    """What stands in a page that an earlier run wrote; nothing where there is none."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    header = next((row for row in rows if row[0] == "architecture" and row[-1] == "limit"), [])
    found = (dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header) and row != header)
    return {row.pop("architecture"): row for row in found}


def _with_vllm(rows: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """With the column `vllm` as measured last: it has runs of its own."""
    measured, able = of_vllm(), set(decoders())
    cells = {name: MARKS[one["outcome"]] for name, one in measured.items()}
    cells = dict.fromkeys(able, "not measured") | cells
    return {name: row | {"vllm": cells.get(name.removesuffix(" °"), "")} for name, row in rows.items()}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--only", nargs="*", help="architectures by their model_type; default: all")
    parser.add_argument("--docs", type=Path, help="write the page of the matrix there")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=120, help="of one path of one architecture")
    arguments = parser.parse_args()
    names = arguments.only or sorted(offered(), key=lambda name: (name not in _FIRST, name))
    results: list[dict[str, Any]] = []
    with ProcessPoolExecutor(arguments.workers, get_context("spawn"), max_tasks_per_child=25) as pool:
        for result in pool.map(measure, names, [arguments.seconds] * len(names)):
            results.append(result)
            outcomes = " ".join(f"{path}={found['outcome']}" for path, found in result["paths"].items())
            done = f"{len(results)}/{len(names)} {result['architecture']}"
            print(f"{done} ({result['seconds']} s) {outcomes}", flush=True)
            _write(results, len(offered()), arguments.docs)  # what was measured stays, also of a run that is stopped
    counts, wrong = _counted(results)
    table(["path", *MARKS], [[path, *(counts[path].get(mark, 0) for mark in MARKS)] for path in PATHS])
    print(f"silently wrong: {wrong}; written to {_REPORT}")
    if wrong:
        raise SystemExit(1)


def _counted(results: list[dict[str, Any]]) -> tuple[dict[str, dict[str, int]], int]:
    """Outcomes by path, and how many accepted paths differ."""
    counts: dict[str, dict[str, int]] = {path: {} for path in PATHS}
    for result in results:
        for path, found in result["paths"].items():
            counts[path][found["outcome"]] = counts[path].get(found["outcome"], 0) + 1
    return counts, sum(bool(found.get("wrong")) for result in results for found in result["paths"].values())


def _write(results: list[dict[str, Any]], total: int, docs: Path | None) -> None:
    counts, wrong = _counted(results)
    models = {result["architecture"]: result["paths"] for result in results}
    figures = {"silently_wrong": wrong, "measured": len(results), "offered": total, "counts": counts}
    write_whole(_REPORT, json.dumps({**heading(1), **figures, "architectures": models}, indent=2) + "\n")
    if docs is not None:
        write_page(docs, results)


def write_page(page: Path, results: Sequence[dict[str, Any]] = ()) -> None:
    """The page with the rows of `results`, and the column `vllm` as measured last; what was not measured now stays."""
    measured = {result["architecture"]: row_of(result) for result in results}
    kept = {name: row for name, row in rows_of(page).items() if name.removesuffix(" °") not in measured}
    wrong = sum(bool(found.get("wrong")) for result in results for found in result["paths"].values())
    wrong += sum(one["wrong"] for name, one in of_vllm().items() if name not in measured)
    page.write_text(documented(_with_vllm({**kept, **measured}), len(offered()), wrong))


if __name__ == "__main__":
    main()
