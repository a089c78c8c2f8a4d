"""A base model of about a million parameters for `benchmarks.algorithms`, whose cells are trained in a minute each.

    python -m benchmarks.algorithms_base FOLDER [--steps 1200 1200]        # twenty minutes of a core

It has read what the demo's shop writes, good answers and bad ones, of seeds that no table uses: tokenizer (BPE, digits
one by one) and weights come from nothing but these texts. As with any base model all tokens of a conversation count.
A conversation asks of one record again and again: so the model learns to copy from it, on which most of the rubric
stands. The learning rate rises and falls to 0 in each cycle: behind the first the model copies words, behind the
second numbers, too (seven values of ten).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.report import command_line
from steersman.demo.answers import answer, draw_style
from steersman.demo.orderbook import ASKED, CUSTOMERS, TOPICS, draw_case
from steersman.demo.questions import ask
from steersman.testing.models import CHAT_TEMPLATE, save_model_folder

CYCLES = ((7, 7), (31, 99))
"""Of each, the seeds of its conversations and of their order."""
ROWS = 20_000
TURNS = 6
VOCABULARY = 1024
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4}
BATCH = 16
LEARNING_RATE = 4e-3


def conversations(seed: int) -> list[list[dict[str, str]]]:
    """Records, each asked `TURNS` times for a field and answered in the manners of the demo's staff."""
    rng = Random(seed)
    return [_conversation(rng, sorted(TOPICS)[number % len(TOPICS)]) for number in range(ROWS)]


def _conversation(rng: Random, topic: str) -> list[dict[str, str]]:
    case = draw_case(rng, rng.choice(CUSTOMERS), topic)
    turns = [{"role": "system", "content": case.system}]
    for _ in range(TURNS):
        field, kind = rng.choice(sorted(ASKED[topic].items()))
        asked = replace(case, asked=field, kind=kind)
        question, _ = ask(rng, asked, "train")
        said = answer(rng, asked, draw_style(rng))
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
    return turns


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
    """The learning rate rises and falls to 0; returns the last loss in nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    loss = torch.zeros(())
    for step, (ids, labels) in enumerate(batches(rows, steps, 3), start=1):
        loss = model(ids.to(model.device), labels=labels.to(model.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    return loss.item()


def make(folder: Path, steps: Sequence[int], device: str = "cpu") -> float:
    """Writes the model after as many cycles as `steps` names; returns the last loss in nats a token."""
    torch.set_num_threads(1)
    torch.manual_seed(CYCLES[0][1])
    chats = conversations(CYCLES[0][0])
    tokenizer = train_tokenizer([turn["content"] for chat in chats for turn in chat])
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "tie_word_embeddings": True, **SIZES}
    model = LlamaForCausalLM(LlamaConfig(bos_token_id=0, eos_token_id=2, pad_token_id=3, **shape)).to(device)
    loss = 0.0
    for number, count in enumerate(steps):
        if number:
            seed, order = CYCLES[number]
            chats = conversations(seed)
            torch.manual_seed(order)
        loss = train(model, [tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats], count)
    model.cpu()
    model.generation_config = GenerationConfig(eos_token_id=[2], pad_token_id=3)
    folder.mkdir(parents=True, exist_ok=True)
    save_model_folder(folder, model, tokenizer)
    return loss


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, help="where the model is written")
    parser.add_argument("--steps", type=int, nargs="+", default=[1200, 1200], help="of each cycle; at most two")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if len(arguments.steps) > len(CYCLES) or min(arguments.steps) < 1:
        parser.error(f"argument --steps: give one to {len(CYCLES)} numbers above 0")
    loss = make(arguments.folder, arguments.steps, arguments.device)
    print(f"{arguments.folder}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
