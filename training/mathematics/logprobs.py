"""Log-probabilities of chosen tokens; shared with the services, so it lives in `steersman.nn.logprobs`."""

from steersman.nn.logprobs import token_logprobs

__all__ = ["token_logprobs"]
