"""How far a latency table can be trusted: what it said of networks before it measured them."""

from dataclasses import dataclass

import numpy as np

from hardware.latency.sweep import prediction_errors
from hardware.latency.table import LatencyTable

RECENT = 10  # of the last networks: the table knew less before
LEAST_NETWORKS = 5  # fewer say nothing of a quantile
MUCH_PCT = 8.0  # a network this far off makes another turn of the plan loop likely


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """How far the last networks were off what the table predicted just before, percent."""

    errors_pct: tuple[float, ...]  # above 0: predicted too long

    @property
    def median_pct(self) -> float:
        """The median of the errors; their sign is left aside."""
        return float(np.median(np.abs(self.errors_pct)))

    @property
    def worst_pct(self) -> float:
        """The largest of the errors; its sign is left aside."""
        return float(np.abs(self.errors_pct).max())

    def __str__(self) -> str:
        """Return it in one sentence, also where there is too little to say."""
        count = len(self.errors_pct)
        if count < LEAST_NETWORKS:
            return (
                f"{count} networks were predicted before they were measured: too few to say how "
                f"far the table can be trusted (at least {LEAST_NETWORKS})."
            )
        longer = (
            " Plans are measured in any case; to start them closer, measure for longer, in a quiet "
            "hour: target.table_minutes in a recipe, --minutes of espalier measure."
        )
        return (
            f"The last {count} networks, each predicted before it was measured: "
            f"{self.median_pct:.1f} % off (median), {self.worst_pct:.1f} % (worst)."
            f"{longer if self.worst_pct > MUCH_PCT else ''}"
        )


def trust_of(table: LatencyTable) -> Trust:
    """Return how far the last networks of a table were off their predictions."""
    errors = prediction_errors(table, table.variants)[-RECENT:]
    return Trust(errors_pct=tuple(100 * error for error in errors))
