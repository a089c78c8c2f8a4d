"""Hidden states of packed batches and padded rows, in the ways that a model may allow.

`packed`: one row without padding, prompts shared, attention exchanged (see `packed.py`). `plain`: the model's own code
on rows of equal length, so that no padding exists; slower, and right for every decoder. Which of them a model takes is
found by computing (`parity.py`), not by its family. An encoder-decoder has its own way (`encoder_decoder.py`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from steersman.errors import ConfigError, InvalidArgumentError
from steersman.nn import encoder_decoder, packed_attention  # noqa: F401 - registers it
from steersman.nn.packed import PACKED_ATTENTION, PackedBatch, pack, rows_of
from steersman.nn.sharing import places_of, share_beginnings

Way = Literal["packed", "plain", "encoder-decoder"]


def unwrapped(model: Any) -> Any:
    """The transformers model below PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk_of(model: nn.Module) -> nn.Module:
    """The transformer below the head of a causal LM or sequence classifier, PEFT-wrapped or not; of an encoder-decoder
    the decoder."""
    base = unwrapped(model)
    if encoder_decoder.is_encoder_decoder(base.config):
        return base.get_decoder()
    trunk: Any = getattr(base, base.base_model_prefix, None)  # Llama 4 text names a part that it does not have
    if trunk is None:
        trunk = base.model
    # Families that began as encoder-decoders call the decoder itself.
    calls = inspect.unwrap(type(base).forward).__code__.co_names
    return trunk.decoder if "decoder" in calls and hasattr(trunk, "decoder") else trunk


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers that make up the trunk, one like the other; of an encoder-decoder those of both stacks.

    Raises:
        ConfigError: the model keeps them elsewhere.
    """
    base = unwrapped(model)
    stacks = (
        (base.get_encoder(), base.get_decoder())
        if encoder_decoder.is_encoder_decoder(base.config)
        else (trunk_of(model),)
    )
    found: list[nn.Module] = []
    for stack in stacks:
        layers = getattr(stack, "layers", getattr(stack, "block", None))  # `block`: T5 and its family
        if not isinstance(layers, nn.ModuleList):
            raise ConfigError(
                f"{type(base).__name__} cannot be shared among ranks: {type(stack).__name__} has no list of layers; "
                "set trainer.workers to 1"
            )
        found += layers
    return found


def is_decoder(model: nn.Module) -> bool:
    """True for a causal LM, or a classifier that reads the last token of one; False for encoders."""
    base = unwrapped(model)
    return hasattr(base, "score") or getattr(base, "get_output_embeddings", lambda: None)() is not None


def use(model: nn.Module, way: Way, limit: int | None = None) -> None:
    """Decides how the functions below run a model (PEFT-wrapped or not), in place.

    Args:
        limit: longest row that they take; None: any.

    Raises:
        ConfigError: its attention cannot be exchanged.
    """
    base = unwrapped(model)
    if encoder_decoder.is_encoder_decoder(base.config):
        way = "encoder-decoder"
    if way == "packed":
        try:
            base.set_attn_implementation(PACKED_ATTENTION)
        except ValueError:
            raise ConfigError(
                f"{type(base).__name__} has no exchangeable attention; use a decoder such as Llama"
            ) from None
    base.steersman_way, base.steersman_limit = way, limit


def enable_packed(model: nn.Module) -> None:
    """Switches a model to packed attention, in place; the caller knows that it allows it."""
    use(model, "packed")


def way_of(model: nn.Module) -> Way:
    way: Way = unwrapped(model).steersman_way
    return way


def hidden_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Last hidden states [T, hidden] in the order of the packed row; the LM head is not run.

    Raises:
        InvalidArgumentError: a row is longer than the model can take rightly.
    """
    _check_length(model, batch.layout.longest)
    if way_of(model) == "packed":
        return _packed(trunk_of(model), batch).last_hidden_state[0]
    if way_of(model) == "encoder-decoder":
        return encoder_decoder.hidden_states(unwrapped(model), batch)
    rows, lengths, groups = rows_of(batch)
    states = rows_apart(trunk_of(model), rows)
    # The prompt's states are the same in every row of its group; one of them stands for all.
    prompts = {group: one[:length] for one, length, group in zip(states, lengths, groups, strict=True)}
    answers = [one[length:] for one, length in zip(states, lengths, strict=True)]
    return torch.cat([*(prompts[group] for group in sorted(prompts)), *answers])


def predicting_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Hidden states [R, hidden] that predict `batch.targets`."""
    return hidden_states(model, batch)[batch.predictor]


def rows_apart(trunk: Any, rows: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """Hidden states [L, hidden] of every row int64 [L]; rows of equal length run together, so nothing is padded."""
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(index)
    states: list[Tensor] = [rows[0]] * len(rows)
    for members in by_length.values():
        found = trunk(input_ids=torch.stack([rows[index] for index in members]), use_cache=False, **options)
        for index, one in zip(members, found.last_hidden_state, strict=True):
            states[index] = one
    return states


def _packed(trunk: Any, batch: PackedBatch, **options: Any) -> Any:
    ids = batch.token_ids[None]
    return trunk(
        input_ids=ids,
        # All ones: without it transformers guesses from the positions where sequences begin.
        attention_mask=torch.ones_like(ids),
        position_ids=batch.position_ids[None],
        use_cache=False,
        packed=batch.layout,
        **options,
    )


def _check_length(model: nn.Module, longest: int) -> None:
    limit = unwrapped(model).steersman_limit
    if limit is not None and longest > limit:
        name = type(unwrapped(model)).__name__
        raise InvalidArgumentError(
            f"a row has {longest} tokens, but beyond {limit} {name} computes every row by the longest of its batch; "
            "shorten it"
        )


def run_without_padding(model: nn.Module, way: Way, limit: int | None = None) -> None:
    """Makes the trunk of a decoder take right-padded rows and skip the padding, in place."""
    use(model, way, limit)
    trunk = trunk_of(model)
    trunk.forward = functools.partial(_padded, model, trunk.forward)


def _padded(
    model: nn.Module, forward: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> BaseModelOutputWithPast:
    """input_ids and attention_mask [B, L], padded on the right; `last_hidden_state` [B, L, D], 0 where padded."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.dim() != 2 or not bool((mask[:, :-1] >= mask[:, 1:]).all()):
        raise InvalidArgumentError("skip_padding needs rows that are padded on the right, with a [batch, length] mask")
    lengths = mask.sum(1).tolist()
    _check_length(model, max(lengths))
    options = {name: value for name, value in kwargs.items() if name.startswith("output_") and value}
    if way_of(model) == "plain":
        return _padded_apart(forward, input_ids, lengths, options)
    ids = input_ids.cpu().numpy()
    groups = share_beginnings([row[:length] for row, length in zip(ids, lengths, strict=True)])
    batch = pack([(group.prompt, group.rests) for group in groups], device=input_ids.device)
    output = _packed(forward, batch, **options)
    index = torch.from_numpy(places_of(groups, *ids.shape)).to(input_ids.device)
    output.last_hidden_state = _spread(output.last_hidden_state[0], index)
    if getattr(output, "router_logits", None) is not None:
        # Of mixtures of experts: the balance loss counts every token of the padded batch that the mask keeps.
        output.router_logits = tuple(_spread(one, index).flatten(0, 1) for one in output.router_logits)
    return output


def _spread(packed: Tensor, index: Tensor) -> Tensor:
    """[T, D] -> [B, L, D]. A padded cell reads token 0 and is then set to 0, so that no gradient comes from it."""
    padded = packed.index_select(0, index.clamp(min=0).flatten()).view(*index.shape, -1)
    return padded.masked_fill((index < 0)[..., None], 0)


def _padded_apart(forward: Any, ids: Tensor, lengths: Sequence[int], options: dict[str, Any]) -> Any:
    """As `_padded`, by rows of equal length."""
    rows, width = len(ids), ids.shape[1]
    hidden: Tensor | None = None
    routed: list[Tensor] = []
    output: Any = None
    for length in sorted(set(lengths)):
        members = torch.tensor([row for row in range(rows) if lengths[row] == length], device=ids.device)
        output = forward(input_ids=ids[members, :length], use_cache=False, **options)
        index = (members[:, None] * width + torch.arange(length, device=ids.device)).flatten()
        states = output.last_hidden_state
        if hidden is None:
            hidden = states.new_zeros(rows * width, states.shape[-1])
        hidden = hidden.index_copy(0, index, states.flatten(0, 1))
        for number, one in enumerate(getattr(output, "router_logits", None) or ()):
            if len(routed) <= number:
                routed.append(one.new_zeros(rows * width, one.shape[-1]))
            routed[number] = routed[number].index_copy(0, index, one.reshape(-1, one.shape[-1]))
    assert hidden is not None
    output.last_hidden_state = hidden.view(rows, width, -1)
    if routed:
        output.router_logits = tuple(routed)
    return output
