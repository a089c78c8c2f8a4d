"""Run tracking: MLflow, TensorBoard and Weights & Biases, through their own libraries.

    <run>/<stage>/metrics.jsonl, config.yaml, complete.json ... --> follower (a process of its own) --> sinks

A follower reads what the stages write anyway, so that no tracker can slow or break a training, and a run that was made
without one can be sent later (`steersman track RUN`).
"""

from steersman.tracking.follow import Follower

__all__ = ["Follower"]
