"""How far a latency table can be trusted, by its own measurements.

Every network in the table is predicted by the table without it, and in large tables without some
others. Networks of a sweep differ from one another in most widths, so this is about what a plan
meets that was not measured: no plan is needed, and none is built.

Reference:
    Stone, "Cross-Validatory Choice and Assessment of Statistical Predictions", Journal of the Royal
    Statistical Society B 36, 1974. The whole model is fitted anew for each fold, also what decides
    how much is shared.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hardware.latency.predict import predict_networks_ms
from hardware.latency.table import LatencyTable, Variant

Progress = Callable[[int, int, str], None]

LEAST_NETWORKS = 6  # fewer say nothing of a quantile
MUCH_PCT = 5.0  # a 95th percentile above this is worth a longer sweep
MOST_FOLDS = 20  # times that the table is fitted, a few tenths of a second each
# What was measured while the device was further from its usual pace is no measure of a prediction.
PACE_ERROR = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """One network of a table, and what the table says of it without having seen it."""

    variant: Variant
    predicted_ms: float
    measured_ms: float  # at the pace of the other networks

    @property
    def error_pct(self) -> float:
        """How far the prediction is off, percent of what was measured; above 0: too high."""
        return 100 * (self.predicted_ms / self.measured_ms - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossValidation:
    """How well a table predicts the networks that it holds, each from all others."""

    networks: tuple[HeldOut, ...]
    passed_over: int  # with a layer that no other one has, or measured far from the usual pace

    @property
    def median_pct(self) -> float:
        """The median of the errors, percent; their sign is left aside."""
        return float(np.median(self._errors))

    @property
    def p95_pct(self) -> float:
        """Their 95th percentile."""
        return float(np.quantile(self._errors, 0.95))

    @property
    def _errors(self) -> list[float]:
        return [abs(network.error_pct) for network in self.networks]

    def __str__(self) -> str:
        """Return it in one sentence, also where there is too little to say."""
        if len(self.networks) < LEAST_NETWORKS:
            return (
                f"{len(self.networks)} networks can be predicted from the others: too few to say "
                f"how far the table can be trusted (at least {LEAST_NETWORKS})."
            )
        longer = (
            " To do better, measure for longer, in a quiet hour: target.table_minutes in a recipe, "
            "--minutes of espalier measure."
        )
        aside = f", {self.passed_over} left aside" if self.passed_over else ""
        return (
            f"Each network predicted from the others: {self.median_pct:.1f} % off (median), "
            f"{self.p95_pct:.1f} % (95th percentile) over {len(self.networks)} networks{aside}."
            f"{longer if self.p95_pct > MUCH_PCT else ''}"
        )


def cross_validate(table: LatencyTable, progress: Progress = lambda *_: None) -> CrossValidation:
    """Return how well a table predicts each of its networks from the others.

    Args:
        table: of one device.
        progress: told after every fold: how many are done, of how many, and what was judged.
    """
    folds = min(len(table.variants), MOST_FOLDS)
    found: dict[int, HeldOut] = {}
    for fold in range(folds):
        places = range(fold, len(table.variants), folds)
        rest = table.without([table.variants[place] for place in places])
        judged = [place for place in places if _is_known(rest, table, table.variants[place])]
        keys = [[table.entries[i].key for i in table.variants[place].entries] for place in judged]
        for place, predicted_ms in zip(judged, predict_networks_ms(rest, keys), strict=True):
            variant = table.variants[place]
            measured_ms = rest.corrected_ms(variant)
            found[place] = HeldOut(
                variant=variant, predicted_ms=predicted_ms, measured_ms=measured_ms
            )
        progress(fold + 1, folds, f"{len(found)} networks")
    networks = tuple(found[place] for place in sorted(found))
    return CrossValidation(networks=networks, passed_over=len(table.variants) - len(networks))


def _is_known(rest: LatencyTable, table: LatencyTable, variant: Variant) -> bool:
    """Tell whether the rest of a table can be held to a variant."""
    known = {entry.key.kind for entry in rest.entries}
    kinds = {table.entries[place].key.kind for place in variant.entries}
    if variant.template not in rest.anchors_ms or kinds - known:
        return False
    return abs(rest.drift(variant) - 1) <= PACE_ERROR
