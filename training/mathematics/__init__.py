"""Pure tensor mathematics of alignment: no I/O, no configuration, no models. See docs/algorithms.md.

segments       ragged batches: per-token tensors [T] beside `lengths` [N]
logprobs       log-probabilities and entropies from hidden states, in chunks
kl             k1, k2, k3 estimates; fixed and adaptive coefficient
rewards        scores -> per-token or per-response rewards
moments        global statistics and whitening
advantages     GAE, RLOO, GRPO, REINFORCE
losses         PPO, value, GRPO, RLOO, REINFORCE, PPO-ptx, each over a global denominator
reward_losses  pairwise with margin and centering, binary, aspects
mismatch       engine against trainer: statistics and truncated importance weights
stats          statistics that add up over micro-batches
"""
