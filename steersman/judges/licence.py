"""A licence for judges: agreement with people on comparisons that they judged, before a scorer may reward or gate.

accuracy   share of people's preferences that the judge shares, a tie half; Wilson's interval
kappa      Cohen's (1960), of the judge's and people's choices with the answers in alternating places, so that
           agreeing by chance is what two raters without a favourite place reach; interval by bootstrap over rows
people     mean over rows of max(p, 1 - p), p the share of people who preferred the answer: how often one of them
           agrees with the majority
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from steersman.data.agreement import cohen_kappa
from steersman.errors import FailedPreconditionError
from steersman.judges.options import Licence
from steersman.report.schema import LicenceResult
from steersman.statistics import Interval, wilson_interval

_DRAWS = 1000


def measure(verdicts: Sequence[float], licence: Licence, people: float | None = None) -> LicenceResult:
    """The licence of a judge by its verdicts.

    Args:
        verdicts: for each row 1 where it prefers what people preferred, 0 where not, 0.5 for a tie.
        people: how often one person agrees with the majority; None: unknown.
    """
    if len(verdicts) < 2:
        return missing("it was not compared with people: add data.preferences.heldout")
    accuracy = wilson_interval(sum(verdicts), len(verdicts))
    kappa = kappa_interval(verdicts)
    wanted = licence.accuracy if people is None else max(licence.accuracy, licence.of_people * people)
    granted = accuracy.low >= wanted
    text = (
        f"it shares {accuracy.estimate:.1%} ({accuracy.low:.1%} to {accuracy.high:.1%}) of people's preferences on "
        f"{len(verdicts)} rows, at least {wanted:.1%} are asked of the lower end"
    )
    if people is not None:
        text += f"; one person agrees with the majority in {people:.1%}"
    if licence.kappa is not None:
        granted = granted and kappa is not None and kappa.low >= licence.kappa
        said = "not defined" if kappa is None else f"{kappa.estimate:.2f} ({kappa.low:.2f} to {kappa.high:.2f})"
        text += f"; kappa is {said}, at least {licence.kappa:g} is asked of the lower end"
    return LicenceResult(
        granted=granted, text=text, rows=len(verdicts), accuracy=accuracy, kappa=kappa, people=people
    )  # fmt: skip


def missing(reason: str) -> LicenceResult:
    """Not measured is not granted."""
    return LicenceResult(granted=False, text=reason)


def kappa_interval(verdicts: Sequence[float]) -> Interval | None:
    """Cohen's kappa of judge and people, whose preferred answer stands alternately first and second; None where it is
    not defined."""
    cells = Counter(
        (float(place % 2), verdict if place % 2 else 1.0 - verdict) for place, verdict in enumerate(verdicts)
    )
    estimate = cohen_kappa(cells)
    if estimate is None:
        return None
    keys, counts = list(cells), np.array(list(cells.values()))
    draws = np.random.default_rng(0).multinomial(len(verdicts), counts / counts.sum(), _DRAWS)
    found = [cohen_kappa(dict(zip(keys, map(int, draw), strict=True))) for draw in draws]
    low, high = np.quantile([one for one in found if one is not None], (0.025, 0.975))
    return Interval(estimate, float(low), float(high))


def people_agreement(soft_labels: Iterable[float | None]) -> float | None:
    """How often one person agrees with the majority; None where no row says how many did."""
    known = [max(share, 1.0 - share) for share in soft_labels if share is not None]
    return sum(known) / len(known) if known else None


def enforce(licences: Mapping[str, LicenceResult], licence: Licence, note: Callable[[str], None], what: str) -> None:
    """Warns of every judge without a licence, or refuses.

    Args:
        note: called with a line of warning.
        what: they would do.

    Raises:
        FailedPreconditionError: `licence.without` is `refuse`.
    """
    for name, found in licences.items():
        if found.granted:
            continue
        told = f"{name} has no licence to {what}: {found.text}"
        if licence.without == "refuse":
            raise FailedPreconditionError(f"{told}; judge more rows, mend the judge, or lower spec.licence")
        note(f"warning: {told}")
