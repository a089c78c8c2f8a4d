"""What the columns of a stage's `metrics.jsonl` mean; the reference page of metrics is made from it.

A test of every stage that trains compares what it writes with these names, so that neither knows one that the other
does not.
"""

from __future__ import annotations

from collections.abc import Mapping

EVERY_STAGE = {
    "step": "the step that is done, from 1",
    "total": "steps that the stage makes",
}

FROM_FILES = {
    "loss": "mean loss of the step",
    "grad_norm": "norm of the gradient before it is clipped at `optimizer.maxGradNorm`",
    "learning_rate": "learning rate of the next step",
    "epoch": "passes over the data",
    "num_tokens": "tokens seen since the stage began",
    "tokens_per_second": "tokens trained on a second since the last row",
    "entropy": "mean entropy of the model's next-token distributions, nats",
    "mean_token_accuracy": "share of target tokens that the model finds likeliest",
    "aux_loss": "mixture of experts: the routers' balance loss",
    "accuracy": "reward model: share of pairs whose chosen answer has the higher reward",
    "margin": "reward model: mean difference of the rewards of a pair",
    "mean_reward": "reward model: mean reward of all answers of the step",
    "min_reward": "reward model: smallest of them",
    "max_reward": "reward model: largest of them",
    "rewards/chosen": "DPO, KTO: mean implied reward, beta (log p - log p of the reference), of chosen (good) answers",
    "rewards/rejected": "DPO, KTO: the same of the rejected (bad) answers",
    "rewards/margins": "DPO, KTO: difference of the two",
    "rewards/accuracies": "DPO: share of pairs whose chosen answer has the higher implied reward",
    "logits/chosen": "DPO, KTO: mean logit over the chosen answers' tokens and the vocabulary",
    "logits/rejected": "DPO, KTO: the same of the rejected ones",
    "logps/chosen": "DPO, KTO: mean log-probability of the chosen answers, nats an answer",
    "logps/rejected": "DPO, KTO: the same of the rejected ones",
    "kl": "KTO: estimate of the KL divergence from the reference that the loss subtracts",
}
"""SFT, reward models, DPO, KTO, and the fine-tuning of rejection sampling."""

FROM_FILES_EVALUATED = {
    "runtime": "seconds that the validation rows took",
    "samples_per_second": "validation rows a second",
    "steps_per_second": "validation batches a second",
}
"""Behind `eval_`, beside the names that training rows have."""

ILQL = {
    "loss": "sum of the parts below, mean over actions",
    "loss_q": "squared error of Q against reward plus the next state's value",
    "loss_v": "expectile regression of V on the smaller target Q",
    "loss_cql": "cross-entropy that keeps Q low for actions nobody took, before its weight",
    "loss_lm": "language-model loss, before its weight",
    "q": "mean Q of the actions that were taken",
    "v": "mean V of their states",
    "advantage": "mean of Q minus V",
    "tokens": "actions of the step",
    "tokens_per_second": "actions trained on a second",
    "grad_norm": "norm of the model's gradient before it is clipped",
    "critic_grad_norm": "norm of the heads' gradient before it is clipped",
    "bad_updates": "1: the loss or its gradient was not finite, and the step changed nothing",
}

ONLINE = {
    "reward": "mean reward of the step's answers, as the loop uses it before the KL penalty",
    "reward_std": "its standard deviation",
    "reward_NAME": "mean of one part of the reward: a reward model, an aspect, a verifiable reward",
    "length": "mean tokens of an answer",
    "no_eos": "share of answers that were cut at `generation.maxNewTokens`",
    "failed": "answers left out because generation or scoring failed",
    "empty": "answers without a token",
    "generated_tokens": "tokens sampled",
    "prompts_sampled": "methods that sample on: prompts that were asked for",
    "prompts_kept": "methods that sample on: prompts whose answers teach something",
    "staleness": "`maxStaleness`: mean steps between an answer's weights and the newest",
    "stale": "`maxStaleness`: answers left out because they were older",
    "policy_loss": "mean of the method's loss",
    "clip_fraction": "share of tokens whose ratio was clipped",
    "approx_kl": "KL divergence from the policy that sampled, half the mean squared log-ratio, nats a token",
    "ratio_mean": "mean probability ratio of the new to the sampling policy",
    "ratio_max": "largest of them",
    "loss_kl": "`klLoss`: mean of its term, nats a token",
    "kl": "KL divergence from the reference, k1, nats an answer",
    "kl_coefficient": "coefficient of the KL penalty at this step",
    "entropy": "minus the mean log-probability of the sampled tokens, nats a token",
    "updates": "optimizer steps on this batch",
    "bad_updates": "of them, those whose loss or gradient was not finite and that changed nothing",
    "grad_norm": "mean norm of the policy's gradient before it is clipped",
    "critic_grad_norm": "mean norm of the critic's gradient before it is clipped",
    "value_loss": "critic: mean loss",
    "value_clip_fraction": "critic: share of values that were clipped",
    "value_error": "critic: mean squared error against the returns",
    "value_mean": "critic: mean value",
    "return_mean": "critic: mean return",
    "explained_variance": "critic: 1 - squared error / variance of the returns; 1 is perfect, 0 as good as the mean",
    "mismatch_mean_abs": "mean |difference| of the trainer's and the engine's log-probabilities, nats a token",
    "mismatch_max_abs": "largest of them",
    "mismatch_ratio": "mean ratio of the trainer's to the engine's probabilities",
    "mismatch_kl": "KL divergence of the trainer's policy from the engine's, k3, nats a token",
    "mismatch_above_cap": "share of tokens whose importance weight was cut at `mismatchCap`",
    "watch_reward": "`watch`: mean reward on the watched prompts",
    "watch_kl": "`watch`: KL divergence from the reference on them",
    "watch_alarm": "`watch`: 1 once the reward that is trained on rises while another one falls",
    "watch_NAME": "`watch`: mean of a scorer that training does not use",
    "weights_version": "version of the weights that the policy replicas have now",
    "seconds": "of the whole step",
    "seconds_generate": "until the last answer was sampled",
    "seconds_score_tail": "waiting for scores after that",
    "seconds_update": "optimizer steps",
    "seconds_publish": "giving the weights to the replicas",
    "tokens_per_s": "sampled tokens a second of the whole step",
}
"""The stages `rl`."""

REJECTION_SAMPLING = {
    "reward": "mean reward of a round's samples",
    "reward_best": "mean reward of the winners",
    "winners": "rows that are trained on",
    "generated_tokens": ONLINE["generated_tokens"],
    "seconds_generate": ONLINE["seconds_generate"],
    "seconds_score_tail": ONLINE["seconds_score_tail"],
}
"""A row a round; the fine-tuning of a round has rows of its own, in its folder."""

EVALUATE = {"reward": "mean reward of a model's answers; a row a model"}

STAGES: Mapping[str, Mapping[str, str]] = {
    "every stage": EVERY_STAGE,
    "sft, rewardModel, dpo, kto": FROM_FILES,
    "ilql": ILQL,
    "rl": ONLINE,
    "rejectionSampling": REJECTION_SAMPLING,
    "evaluate": EVALUATE,
}
"""By the stages that write them, as the reference shows them."""


def is_known(name: str) -> bool:
    """Whether a column of `metrics.jsonl` stands in the reference."""
    if name.startswith("eval_"):
        rest = name.removeprefix("eval_")
        return rest in FROM_FILES or rest in FROM_FILES_EVALUATED or rest in ILQL
    # `reward_` and `watch_` have names of the manifest behind them.
    return name.startswith(("reward_", "watch_")) or any(name in names for names in STAGES.values())
