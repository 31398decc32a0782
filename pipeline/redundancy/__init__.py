"""Redundancy measures: how narrow a group may become. One file and one line here per measure."""

from collections.abc import Callable, Mapping

from torch import Tensor

from pipeline.evidence.needs import GRADIENTS, PATTERNS, RESPONSES
from pipeline.records import Floor, GroupView
from pipeline.redundancy import effective, graph, none, responses, scores

MEASURES: Mapping[str, Callable[[GroupView], Floor]] = {
    "graph": graph.structural,
    "graph_fixed": graph.structural_fixed,
    "effective": effective.by_energy,
    "effective_threshold": effective.by_threshold,
    "effective_entropy": effective.by_entropy,
    "functionality": responses.functionality,
    "functionality_maximised": responses.functionality_maximised,
    "feature_rank": responses.feature_rank,
    "none": none.no_floor,
}

SCORES: Mapping[str, Callable[[GroupView], Tensor]] = {
    "graph": scores.by_weights,
    "graph_fixed": scores.by_weights,
    "effective": scores.by_gradients,
    "effective_threshold": scores.by_gradients,
    "effective_entropy": scores.by_gradients,
    "functionality": scores.by_correlation,
    "functionality_maximised": scores.by_patterns,
    "feature_rank": scores.by_responses,
    "none": scores.unknown,
}
"""Of every measure, how well the other filters of a group replace each one: 1 = entirely."""

NEEDS: Mapping[str, str] = {
    "effective": GRADIENTS,
    "effective_threshold": GRADIENTS,
    "effective_entropy": GRADIENTS,
    "functionality": RESPONSES,
    "functionality_maximised": PATTERNS,
    "feature_rank": RESPONSES,
}
"""What a view must hold besides weights, for the measures that need calibration images."""
