"""Everything random in training mode, switched off: training mode then computes what evaluation mode computes."""

from __future__ import annotations

from torch import nn

_SHARES = ("attention_dropout", "dropout_prob", "dropout", "activation_dropout", "hidden_dropout", "dropout_p")
_NOISE = ("jitter_noise", "router_jitter_noise", "input_jitter_noise", "jitter_eps", "layerdrop")


def disable_dropout(model: nn.Module) -> None:
    """Sets dropout probabilities, layer dropping and the noise of routers to 0, in place."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in (*_SHARES, *_NOISE):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
