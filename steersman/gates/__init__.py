"""Gates: what a model must show before it is released.

A gate is a class of this package with its options, registered by the name that the manifest gives it. It gets the
evaluation and says what it found. Nothing here imports scipy until a gate is checked.

Several gates at once: a model is released when all of them pass. Where one of them should not pass, the others cannot
make up for it, so the chance that all pass is at most that of this one: the intersection-union test (Berger 1982) keeps
every single gate's error rate without a correction. A gate that looks at an interval looks at one end of a 95% interval
and so errs with at most 2.5%.
"""

from steersman.gates.block import Gates, check_gates
from steersman.gates.registry import GATES, Against, Finding, Gate, failed

__all__ = ["GATES", "Against", "Finding", "Gate", "Gates", "check_gates", "failed"]
