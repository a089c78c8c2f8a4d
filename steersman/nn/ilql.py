"""The heads of ILQL beside a causal language model, and the distribution that model and heads make together.

    Q_i(s, .) = W2 relu(W1 h + b1) + b2 over the vocabulary,   V(s) the same with one output
    log pi_beta(. | s) = log softmax((log pi + beta (min(Q_1, Q_2) - V)) / temperature)

h is the trunk's last hidden state, which predicts the next token. Snell et al. 2022 (arXiv 2206.11871, section 4.3);
the shape of the heads, and that Polyak targets stand for the Qs when tokens are drawn, as in trlX's `modeling_ilql.py`.

In a model's folder the heads lie in `ilql_heads.safetensors`, in a weights transaction beside the other tensors, both
by the names of `HeadTensors`. A folder is loaded by transformers without them, and is then the language model alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steersman.errors import ConfigError, InvalidArgumentError, why

HEADS_FILE = "ilql_heads.safetensors"
_PREFIX = "ilql."
_BETA = "beta"

HeadTensors = Mapping[str, Tensor]
"""`ilql.{q.0,q.1,v}.{first,last}.{weight,bias}` and `ilql.beta` []; empty: a policy without heads."""


class Head(nn.Module):
    """Two linear layers, [T, D] -> [T, outputs]."""

    def __init__(self, hidden_size: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(hidden_size, 2 * hidden_size)
        self.last = nn.Linear(2 * hidden_size, outputs)
        # 0 everywhere: at the start policy and language model are the same, where random values would be noise on
        # every token that nobody said.
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def features(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, 2D], what the last layer reads."""
        return self.first(hidden).relu()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.last(self.features(hidden))


class AdvantageHeads(nn.Module):
    """Two Q heads (targets, when tokens are drawn) and the V head."""

    def __init__(self, hidden_size: int, vocab_size: int, beta: float) -> None:
        super().__init__()
        self.q = nn.ModuleList(Head(hidden_size, vocab_size) for _ in range(2))
        self.v = Head(hidden_size, 1)
        self.beta = beta
        """Weight of the advantage beside log pi."""

    def forward(self, hidden: Tensor) -> Tensor:
        """beta (min Q - V) of every token, [T, V] in the heads' dtype, from hidden states [T, D]."""
        hidden = hidden.to(self.v.last.weight.dtype)
        return self.beta * (torch.minimum(*(q(hidden) for q in self.q)) - self.v(hidden))

    def tensors(self, targets: nn.Module) -> HeadTensors:
        """What a folder and a transaction hold: the targets of the Q heads, and the V head."""
        named = {f"v.{name}": value for name, value in self.v.named_parameters()}
        named |= {f"q.{name}": value for name, value in targets.named_parameters()}
        return {f"{_PREFIX}{name}": value.detach() for name, value in named.items()} | {
            f"{_PREFIX}{_BETA}": torch.tensor(self.beta)
        }

    @staticmethod
    def of(tensors: HeadTensors, hidden_size: int, vocab_size: int) -> AdvantageHeads:
        """The heads that `tensors` holds, frozen, in memory of their own.

        Raises:
            InvalidArgumentError: a tensor is missing, unknown, not finite, or of another shape than this model's.
        """
        given = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
        with torch.device("meta"):
            heads = AdvantageHeads(hidden_size, vocab_size, 0.0)
        wanted = {name: tuple(value.shape) for name, value in heads.named_parameters()} | {_BETA: ()}
        for name in sorted(wanted.keys() ^ given.keys()):
            what = "lacks" if name in wanted else "holds the unknown"
            raise InvalidArgumentError(f"the heads of ILQL: the update {what} '{_PREFIX}{name}'")
        for name, shape in wanted.items():
            if tuple(given[name].shape) != shape:
                raise InvalidArgumentError(
                    f"'{_PREFIX}{name}' has shape {list(given[name].shape)}, the served model needs {list(shape)}"
                )
            if not bool(given[name].isfinite().all()):
                raise InvalidArgumentError(f"'{_PREFIX}{name}' holds a value that is not finite; it is not served")
        heads.beta = float(given.pop(_BETA))
        heads.load_state_dict({name: value.clone() for name, value in given.items()}, assign=True)
        return heads.requires_grad_(False)


def split_heads(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], HeadTensors]:
    """(the model's own tensors, those of the heads)."""
    heads = {name: value for name, value in tensors.items() if name.startswith(_PREFIX)}
    return {name: value for name, value in tensors.items() if name not in heads}, heads


def has_heads(folder: Path) -> bool:
    return (folder / HEADS_FILE).is_file()


def read_heads(folder: Path) -> HeadTensors:
    """The heads of a model folder; empty where it has none. Raises ConfigError for a damaged file."""
    if not has_heads(folder):
        return {}
    try:
        return load_file(folder / HEADS_FILE)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{folder / HEADS_FILE} cannot be read ({why(error)}); run the stage that writes it again"
        ) from None


def write_heads(folder: Path, tensors: HeadTensors) -> None:
    """Adds heads to a model folder, or an adapter's."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / HEADS_FILE)
