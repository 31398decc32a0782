"""Redundancy measures: how narrow a group may become. One file and one line here per measure."""

from collections.abc import Callable, Mapping

from pipeline.records import Floor, GroupView
from pipeline.redundancy import graph, none

MEASURES: Mapping[str, Callable[[GroupView], Floor]] = {
    "graph": graph.structural,
    "graph_fixed": graph.structural_fixed,
    "none": none.no_floor,
}
