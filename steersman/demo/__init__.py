"""The demo's data: a seeded generator of synthetic ERP customer-service talk, and the rubric that judges it."""

from steersman.demo.dataset import Manifest, Sizes, generate
from steersman.demo.rubric import RubricScore, score

__all__ = ["Manifest", "RubricScore", "Sizes", "generate", "score"]
