"""Metrics as rewards, as RL4LMs has them: how near an answer is to a reference text, or what a classifier says of it.

`reference` says where the text lies: `prompt` is the last user message (an article that is summarised), any other word
is the key of the row (or of its `facts`) that holds a text or a list of texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from steersman.errors import ConfigError
from steersman.rewards.registry import (
    Answered,
    BatchReward,
    Failed,
    Messages,
    Outcome,
    Reward,
    Verdict,
    register,
    register_batch,
)

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["precision", "recall", "fmeasure"]
Variant = Literal["rouge1", "rouge2", "rougeL", "rougeLsum"]


def references(prompt: Messages, facts: Mapping[str, Any], key: str) -> list[str]:
    """The reference texts of an answer; ValueError where there are none."""
    found: Any = facts.get(key)
    if key == "prompt":
        found = next((message["content"] for message in reversed(prompt) if message["role"] == "user"), None)
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"the row has no text under {key!r} to compare with")
    return texts


@register("rouge")
def rouge(
    variant: Variant = "rougeL", reference: str = "reference", part: Part = "fmeasure", stemmer: bool = True
) -> Reward:
    """ROUGE (Lin 2004) by `rouge-score`: `rouge1`, `rouge2`, `rougeL`, `rougeLsum`; the best of the references."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([variant], use_stemmer=stemmer)

    def reward(prompt: Messages, answer: str, facts: Mapping[str, Any]) -> Verdict:
        scores = [scorer.score(text, answer)[variant] for text in references(prompt, facts, reference)]
        return Verdict(max(getattr(score, part) for score in scores))

    return reward


@register("bleu")
def bleu(reference: str = "reference") -> Reward:
    """Sentence BLEU (Papineni et al. 2002) by `sacrebleu`, with exponential smoothing, between 0 and 1."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(effective_order=True)
    return _sacrebleu(lambda answer, texts: metric.sentence_score(answer, texts).score, reference)


@register("chrf")
def chrf(reference: str = "reference", word_order: int = 0) -> Reward:
    """chrF (Popović 2015), with `word_order` 2 chrF++, by `sacrebleu`, between 0 and 1."""
    from sacrebleu.metrics import CHRF

    metric = CHRF(word_order=word_order)
    return _sacrebleu(lambda answer, texts: metric.sentence_score(answer, texts).score, reference)


def _sacrebleu(score: Callable[[str, list[str]], float], reference: str) -> Reward:
    def reward(prompt: Messages, answer: str, facts: Mapping[str, Any]) -> Verdict:
        return Verdict(score(answer, references(prompt, facts, reference)) / 100.0)

    return reward


def _one_of(name: str, option: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"reward {name}: {option} is {value!r}; use {', '.join(allowed)}")


@register_batch("classifier")
def classifier(path: str, label: str, max_length: int = 512) -> BatchReward:
    """Probability that a local text classifier gives the answer's text the label, for example `neutral`."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(path, use_safetensors=True, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    names = {str(name): int(index) for index, name in model.config.id2label.items()}
    _one_of("classifier", "label", label, sorted(names))
    column = names[label]

    def reward(items: Sequence[Answered]) -> list[Verdict]:
        texts = [item.answer for item in items]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.inference_mode():
            probabilities = model(**batch).logits.float().softmax(-1)
        return [
            Verdict(float(row[column]), {name: float(row[index]) for name, index in names.items()})
            for row in probabilities
        ]

    return reward


@register_batch("bertscore")
def bertscore(path: str, reference: str = "reference", layer: int | None = None, max_length: int = 512) -> BatchReward:
    """BERTScore's F1 (Zhang et al. 2020, section 3, without idf and rescaling) with a local encoder.

    Every token is matched with the most similar one of the other text by the cosine of the hidden states of `layer`
    (None: the last); special tokens take no part.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(path, use_safetensors=True, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    depth = model.config.num_hidden_layers
    if layer is not None and not 0 <= layer <= depth:
        raise ConfigError(f"reward bertscore: layer is {layer}; the model has {depth} layers")

    def embed(texts: Sequence[str]) -> list[Tensor]:
        """Unit vectors [tokens, width] of each text."""
        batch = tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
            return_special_tokens_mask=True,
        )
        special = batch.pop("special_tokens_mask").bool()
        with torch.inference_mode():
            hidden = model(**batch, output_hidden_states=True).hidden_states[depth if layer is None else layer].float()
        kept = batch["attention_mask"].bool() & ~special
        return [torch.nn.functional.normalize(row[keep], dim=-1) for row, keep in zip(hidden, kept, strict=True)]

    def reward(items: Sequence[Answered]) -> list[Outcome]:
        outcomes: list[Outcome] = [None] * len(items)
        wanted: dict[int, list[str]] = {}
        for place, item in enumerate(items):
            try:
                wanted[place] = references(item.prompt, item.facts, reference)
            except ValueError as error:
                outcomes[place] = Failed(str(error))
        if not wanted:
            return outcomes
        answers = embed([items[place].answer for place in wanted])
        texts = iter(embed([text for several in wanted.values() for text in several]))
        for (place, several), answer in zip(wanted.items(), answers, strict=True):
            outcomes[place] = max((greedy_match(answer, next(texts)) for _ in several), key=lambda found: found.value)
        return outcomes

    return reward


def greedy_match(answer: Tensor, text: Tensor) -> Verdict:
    """BERTScore of two sequences of unit vectors [tokens, width]; 0 where one has no tokens."""
    if not len(answer) or not len(text):
        return Verdict(0.0, {"precision": 0.0, "recall": 0.0})
    similarity = answer @ text.T
    precision, recall = float(similarity.amax(1).mean()), float(similarity.amax(0).mean())
    total = precision + recall
    return Verdict(2 * precision * recall / total if total else 0.0, {"precision": precision, "recall": recall})
