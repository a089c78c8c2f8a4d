"""Loading models the same way in training and in every service: safetensors only, dropout off, no chatter."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from steersman.errors import ConfigError, NotFoundError
from steersman.nn.dropout import disable_dropout
from steersman.nn.encoder_decoder import (
    TEXT_TO_TEXT,
    folder_is_encoder_decoder,
    language_model_class,
    refuse_encoder_decoder,
)
from steersman.nn.forward import is_decoder
from steersman.nn.hardware import DTYPES
from steersman.nn.parity import skip_padding
from steersman.nn.render import set_template_options
from steersman.nn.reward import REWARD_FILE, Aspect, RewardModel, read_settings


def quiet_libraries() -> None:
    """Turns off the progress bars and advice of the Hugging Face libraries, and everything that phones home."""
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # the environment was read at import
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("trl", "peft", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|trl|peft|accelerate|datasets|torch)\..*")


def has_safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def load_tokenizer(folder: Path, template_options: Mapping[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; padding on the right.

    Args:
        template_options: variables of the chat template beside those that the folder carries.
    """
    quiet_libraries()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}: the tokenizer cannot be loaded ({_first_line(error)})") from None
    if tokenizer.pad_token_id is None:
        # Padded positions are masked by length everywhere, so any id does.
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template and folder_is_encoder_decoder(folder):
        tokenizer.chat_template = TEXT_TO_TEXT
    set_template_options(tokenizer, template_options or {})
    return tokenizer


def load_causal_lm(
    folder: Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
    quantization_config: object | None = None,
) -> PreTrainedModel:
    """A language model, decoder-only or encoder-decoder, in evaluation mode with dropout off.

    Args:
        dtype: of the weights; `fp32`, `bf16`, a torch dtype, or `auto`: as in the folder.
        quantization_config: for QLoRA.

    Raises:
        NotFoundError, ConfigError: the folder is not there, has no safetensors, or is damaged.
    """
    options = {} if quantization_config is None else {"quantization_config": quantization_config}
    model = _load(language_model_class, folder, dtype, **options)
    return ready(model, device if quantization_config is None else None)


def load_classifier(
    folder: Path,
    *,
    num_labels: int | None = None,
    device: str = "cpu",
    quantization_config: object | None = None,
) -> PreTrainedModel:
    """A sequence classifier (decoder with a score head, or encoder) in evaluation mode with dropout off.

    From a causal language model it takes the trunk and starts a new head, from torch's random state.

    Args:
        num_labels: outputs of the head; None: as in the folder.
    """
    options: dict[str, object] = {} if quantization_config is None else {"quantization_config": quantization_config}
    if num_labels is not None:
        options["num_labels"] = num_labels
    model = _load(_classifier_class, folder, torch.float32, **options)
    keep_head_in_fp32(model)
    return ready(model, device if quantization_config is None else None)


def load_trunk(folder: Path, *, dtype: torch.dtype | str = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """An encoder, or a decoder without its head, in evaluation mode with dropout off."""
    return ready(_load(lambda config: AutoModel, folder, dtype), device)


def load_reward_model(folder: Path, *, device: str = "cpu", precision: Literal["fp32", "bf16"] = "fp32") -> RewardModel:
    """A reward model as training left it: settings, every member, tokenizer.

    Raises:
        ConfigError: a language model, whose scores would come from a new head.
    """
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: there is no such reward model; check the path or run the stage that writes it")
    if not (folder / REWARD_FILE).is_file() and (folder / "config.json").is_file():
        made_as = getattr(AutoConfig.from_pretrained(folder), "architectures", None) or [""]
        if made_as[0].endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
            raise ConfigError(
                f"{folder}: a language model ({made_as[0]}), which scores nothing; name a reward model's folder"
            )
    settings = read_settings(folder)
    members = [load_classifier(folder / member.folder, device=device) for member in settings.members]
    for member in members:
        skip_padding(member)
        if precision == "bf16":
            round_products(member)
    tokenizer = load_tokenizer(folder / settings.members[0].folder)
    return RewardModel(settings, members, tokenizer, device=device, precision=precision)


def load_reward_backbone(folder: Path, *, device: str = "cpu") -> tuple[PreTrainedModel, nn.Linear]:
    """(trunk with an empty head, value head [hidden -> 1]) for a critic that starts as the reward model.

    The value head gives the normalised reward at the last token. Of an ensemble the first member is taken.

    Raises:
        ConfigError: an encoder, which has no value for the tokens on the way.
    """
    settings = read_settings(folder)
    if settings.thresholds:
        raise ConfigError(f"{folder}: decides by thresholds, which no value head can; use ppo.critic.kind: valueHead")
    member = settings.members[0]
    model = load_classifier(folder / member.folder, device=device)
    if not is_decoder(model):
        raise ConfigError(f"{folder}: an encoder cannot become a critic; use ppo.critic.kind: valueHead")
    aspects = list(settings.aspects.values()) or [Aspect(weight=1.0)]
    weights = torch.tensor([aspect.step_weight * aspect.std for aspect in aspects], device=device)
    offset = sum(aspect.step_weight * aspect.mean for aspect in aspects)
    scores: nn.Linear = model.score  # type: ignore[assignment]
    head = nn.Linear(model.config.hidden_size, 1, device=device)
    with torch.no_grad():
        head.weight.copy_((weights @ scores.weight)[None] / (member.std * settings.std))
        head.bias.fill_(((offset - member.mean) / member.std - settings.mean) / settings.std)
    model.score = nn.Identity()
    return model, head


class _Fp32Linear(nn.Linear):
    """Computes in fp32 whatever autocast says: bf16 has 3 digits, too few to rank rewards."""

    @classmethod
    def of(cls, layer: nn.Linear) -> _Fp32Linear:
        """With the parameters of another."""
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        return made.train(layer.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(input.float(), self.weight.float(), bias)


def keep_head_in_fp32(model: nn.Module) -> None:
    """Makes the last linear layers of a classifier compute in fp32, in place."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.partition(".")[0] in ("score", "classifier"):
            model.set_submodule(name, _Fp32Linear.of(module))


def round_products(model: nn.Module) -> None:
    """Keeps the weights of linear layers in bf16, in place, for products that run in bf16; heads stay in fp32.

    Autocast would round them to the same numbers at every call: of a small model that takes longer than to score a few
    answers.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight.data = module.weight.data.to(torch.bfloat16)


def context_of(config: Any) -> int:
    """Tokens of prompt and answer that a decoder was made for; a million where its configuration names no limit."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length", "max_sequence_length")
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), 1_000_000)


def ready(model: nn.Module, device: str | None) -> PreTrainedModel:
    """Moves to the device, switches dropout off for good and enters evaluation mode."""
    if device is not None:
        model.to(device)
    disable_dropout(model)
    return model.eval()  # type: ignore[return-value]


def _classifier_class(config: Any) -> Any:
    refuse_encoder_decoder(config, "a reward model is made of a decoder or an encoder")
    return AutoModelForSequenceClassification


def _load(class_of: Callable[[Any], Any], folder: Path, dtype: torch.dtype | str, **options: object) -> nn.Module:
    quiet_libraries()
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: there is no such model folder; check the path or run the stage that writes it")
    if not has_safetensors(folder):
        raise ConfigError(f"{folder}: no *.safetensors; pickled weights are not loaded, convert them to safetensors")
    kind = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    try:
        config = AutoConfig.from_pretrained(folder)
        config.num_labels = options.pop("num_labels", config.num_labels)
        if getattr(config.get_text_config(), "attn_logit_softcapping", None):
            # transformers before 5.20 leaves the cap out in its faster attention, without a word
            options["attn_implementation"] = "eager"
        return class_of(config).from_pretrained(folder, config=config, dtype=kind, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder}: the model cannot be loaded ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
