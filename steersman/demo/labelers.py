"""Five simulated labelers who compare two answers by the rubric, each with an own eye, leniency and love of ties."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from steersman.demo.rubric import RubricScore

VERDICTS = ("a", "b", "tie")


@dataclass(frozen=True)
class Labeler:
    """A labeler sees the rubric total through noise and through one criterion that matters more to them."""

    name: str
    noise: float
    """Standard deviation of the error of each perceived score."""
    leniency: float
    """Share by which flaws are forgiven: 0 sees every flaw in full, 1 would see none."""
    tie: float
    """Differences below this are called a tie."""
    focus: str
    """Criterion that this labeler weighs more than the rubric does."""

    def perceive(self, rng: Random, rubric: RubricScore) -> float:
        seen = 0.85 * rubric.total + 0.15 * float(getattr(rubric, self.focus))
        return 1 - (1 - self.leniency) * (1 - seen) + rng.gauss(0, self.noise)

    def compare(self, rng: Random, a: RubricScore, b: RubricScore) -> str:
        """One of `VERDICTS`."""
        difference = self.perceive(rng, a) - self.perceive(rng, b)
        if abs(difference) < self.tie:
            return "tie"
        return "a" if difference > 0 else "b"


LABELERS = (
    Labeler("labeler-1", noise=0.05, leniency=0.00, tie=0.04, focus="grounded"),
    Labeler("labeler-2", noise=0.07, leniency=0.15, tie=0.05, focus="polite"),
    Labeler("labeler-3", noise=0.09, leniency=0.05, tie=0.03, focus="answers"),
    Labeler("labeler-4", noise=0.06, leniency=0.25, tie=0.07, focus="no_invented"),
    Labeler("labeler-5", noise=0.10, leniency=0.10, tie=0.05, focus="concise"),
)

MARGINS = ((1.0, "significantly better", 1.0), (0.6, "better", 2 / 3), (0.4, "slightly better", 1 / 3))
"""Net share of votes from which a level holds, its name, and its margin ("margin small", Llama 2, appendix A.3.3)."""


def majority(votes: Sequence[str]) -> tuple[str, float, str]:
    """Verdict of the majority, the preference's margin and the name of its level; a draw between a and b is a tie."""
    count = Counter(votes)
    net = (count["a"] - count["b"]) / len(votes)
    if net == 0 or count["tie"] > len(votes) / 2:
        return "tie", 0.0, "tie"
    for share, level, margin in MARGINS:
        if abs(net) >= share - 1e-9:
            return ("a" if net > 0 else "b"), round(margin, 4), level
    return ("a" if net > 0 else "b"), 0.0, "negligibly better"


def agreement(judgements: Sequence[Sequence[str]]) -> dict[str, float]:
    """Agreement of labelers over items (rows) of equally many verdicts: pairwise share and Fleiss' kappa (1971)."""
    raters = len(judgements[0])
    counts = [Counter(row) for row in judgements]
    per_item = [(sum(n * n for n in count.values()) - raters) / (raters * (raters - 1)) for count in counts]
    observed = sum(per_item) / len(per_item)
    shares = [sum(count[verdict] for count in counts) / (raters * len(counts)) for verdict in VERDICTS]
    expected = sum(share * share for share in shares)
    kappa = (observed - expected) / (1 - expected) if expected < 1 else 1.0
    return {"pairwise": round(observed, 4), "fleiss_kappa": round(kappa, 4)}
