"""The records that the comparison writes, one result after the other."""

from collections.abc import Mapping
from typing import Any

from hardware.records import Record


class Result(Record):
    """One network pruned by one choice, fine-tuned with one seed; accuracies on test images."""

    name: str  # of the criterion, or of the measure whose floors were held
    seed: int
    before_pct: float  # accuracy of the pruned network as it is
    recalibrated_pct: float  # accuracy with the statistics of batch norms taken anew
    after_pct: float  # accuracy after fine-tuning
    parameters: int
    plan_share: float  # latency over the full network's, as the plan was measured


class Comparison(Record):
    """All results so far, and what they belong to: another setting is another file."""

    setting: Mapping[str, Any]  # Any: as JSON holds it
    baseline_pct: float | None = None  # of the full network
    widths: Mapping[str, int] = {}  # of the plan that all criteria share
    plan_share: float = 1.0
    criteria: tuple[Result, ...] = ()
    floors: tuple[Result, ...] = ()
    impossible: Mapping[str, str] = {}  # measures whose floors forbid the target, and the message

    def has(self, kind: str, name: str, seed: int) -> bool:
        """Tell whether a result is there."""
        found: tuple[Result, ...] = getattr(self, kind)
        return any((one.name, one.seed) == (name, seed) for one in found)


class Cost(Record):
    """How long something took on one network."""

    name: str
    kind: str  # "collecting", "criterion", "measure"
    seconds: float
    error: str = ""  # why it could not be had
