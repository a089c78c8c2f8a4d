"""A base model of about a million parameters for `benchmarks.algorithms`, which trains on any machine in minutes.

    python -m benchmarks.algorithms_base FOLDER [--cycles 1000,350]

It has read what the demo's shop writes, good answers and bad ones, of a seed that no table uses: tokenizer (BPE, digits
one by one) and weights come from nothing but these texts. As with any base model all tokens of a conversation count.
The learning rate rises and falls to 0 in each cycle: behind the first the model writes the shop's language, in the
second it learns to copy from the record.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steersman.data import records
from steersman.demo import Sizes, generate
from steersman.testing.models import CHAT_TEMPLATE, save_model_folder

SEED = 7
ROWS = 8_000
VOCABULARY = 1024
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4}
BATCH = 16
LEARNING_RATE = 4e-3


def conversations(folder: Path) -> list[list[dict[str, str]]]:
    """The demo's demonstrations of this seed, written into `folder`."""
    small = dict.fromkeys(Sizes.model_fields, 1)
    generate(folder, SEED, Sizes(**{**small, "demonstrations": ROWS}))
    rows = records.read_jsonl(folder / "demonstrations.train.jsonl", records.Demonstration)
    return [[{"role": turn.role, "content": turn.content} for turn in row.messages] for row in rows]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|endoftext|>"]})
    fast.chat_template = CHAT_TEMPLATE
    fast.model_max_length = 512
    return fast


def batches(rows: list[list[int]], steps: int, pad: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels) of random rows, padded."""
    for _ in range(steps):
        chosen = [torch.tensor(rows[index]) for index in torch.randint(len(rows), (BATCH,)).tolist()]
        ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=pad)
        yield ids, torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-100)


def train(model: LlamaForCausalLM, rows: list[list[int]], steps: int) -> float:
    """One cycle; returns the last loss in nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    loss = torch.zeros(())
    for step, (ids, labels) in enumerate(batches(rows, steps, 3), start=1):
        loss = model(ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    return loss.item()


def make(folder: Path, cycles: Sequence[int]) -> float:
    """Writes the model; returns the last loss in nats a token."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as data:
        chats = conversations(Path(data))
    tokenizer = train_tokenizer([turn["content"] for chat in chats for turn in chat])
    rows = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=3,
            **SIZES,
        )
    )
    loss = 0.0
    for number, steps in enumerate(cycles):
        torch.manual_seed(SEED + number)
        loss = train(model, rows, steps)
    model.generation_config = GenerationConfig(eos_token_id=[2], pad_token_id=3)
    folder.mkdir(parents=True, exist_ok=True)
    save_model_folder(folder, model, tokenizer)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model is written")
    parser.add_argument("--cycles", default="1000,350", help="steps of each, comma-separated")
    arguments = parser.parse_args()
    loss = make(arguments.folder, [int(steps) for steps in arguments.cycles.split(",")])
    print(f"{arguments.folder}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
