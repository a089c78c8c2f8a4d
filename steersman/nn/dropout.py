"""Everything random in training mode, switched off: training mode then computes what evaluation mode computes."""

from __future__ import annotations

from torch import nn


def disable_dropout(model: nn.Module) -> None:
    """Sets dropout probabilities, layer dropping and the noise of routers to 0, in place."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)
