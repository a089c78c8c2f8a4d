"""The words of the reports, explained where they stand. `docs/glossary.md` says the same, which a test compares."""

TERMS = {
    "Cohen's d": "A difference of means in standard deviations: 0.2 is small, 0.5 medium, 0.8 large.",
    "confidence interval": (
        "The range that holds the true value in 95 of 100 repetitions. A difference whose interval does not hold 0 is "
        "not chance at that level."
    ),
    "held-out prompts": ("Prompts that no training stage has seen; the only ones that an evaluation may use."),
    "KL": (
        "Kullback-Leibler divergence between the policy and the reference, in nats per answer: how far training has "
        "moved the model. 0 is not at all; large values with a rising reward often mean that the reward is being "
        "exploited."
    ),
    "margin": "How much better the chosen answer of a pair is, as labelers said it.",
    "mismatch": (
        "Mean difference between the log-probabilities of the engine that sampled and of the trainer; rounding gives "
        "up to 0.04 in bf16."
    ),
    "policy": "The language model that is being trained to answer.",
    "reference": "The frozen model that the policy must not move away from too far.",
    "reward": "The number that says how good an answer is, from a reward model, a rule, or both.",
    "reward model": (
        "A model that was trained on comparisons to give better answers a higher number. Its accuracy is the share of "
        "held-out pairs that it orders as people did."
    ),
    "rubric": (
        "Written criteria that an answer is checked against. The demo's rubric is exact and is never trained on."
    ),
    "EOS": "The token that ends an answer. An answer without it was cut at its length limit.",
}
