"""The channel map: which slices of which parameters go together, as the host tells the device.

A *unit* is the smallest set of coupled channels that can be removed: one channel of a group. Units
that occupy the same slices form a *group*; its `width` is its number of units. A *branch* is a
residual branch that can be emptied as a whole: its groups then have width 0, and the addition that
joins it disappears.
"""

from collections.abc import Collection, Mapping
from functools import cached_property

from hardware.errors import CarveError
from hardware.records import Record


class ParameterSlice(Record):
    """Where the units of one group sit along one axis of one parameter (an ONNX initializer).

    `units[p]` is the unit that position `p` of the axis belongs to, or -1 where the position does
    not belong to this group. One unit may own several positions (a flatten, a tied split).
    """

    parameter: str  # name in the state_dict and in the ONNX file
    axis: int
    role: str  # "filter" | "input" | "depthwise" | "norm" | "bias" | "other"
    units: tuple[int, ...]


class Group(Record):
    """Coupled channels that are pruned together.

    `frozen` says in words why the group may not be pruned; None where it may.
    `mixes` names an operator that mixes the group's channels (LayerNorm, softmax over channels):
    removing is then not the same as masking, and the proof compares structure only.
    """

    name: str  # of the first layer that produces it
    width: int
    slices: tuple[ParameterSlice, ...]
    frozen: str | None = None
    mixes: str | None = None

    @cached_property
    def producers(self) -> tuple[str, ...]:
        """Parameters whose filters produce the group's channels, in graph order."""
        return tuple(s.parameter for s in self.slices if s.role == "filter")

    @cached_property
    def consumers(self) -> tuple[str, ...]:
        """Parameters that read the group's channels, in graph order."""
        return tuple(s.parameter for s in self.slices if s.role == "input")


class Branch(Record):
    """A residual branch that can be emptied: its groups get width 0 together."""

    name: str
    groups: tuple[str, ...]
    layers: tuple[str, ...]  # nodes that are not executed once the branch is empty, graph order
    join: str  # the Add node that disappears
    parameters: tuple[str, ...]  # parameters of the dead nodes


class Resize(Record):
    """A constant that says a width: recomputed from what is kept when the graph is carved.

    The place is element `index` of what input `input` of node `node` holds, or the attribute
    `attribute` of that node. The new value is `fixed` + for every group the number of entries of
    `parts[group]`, one unit per counted position, whose unit is kept.
    """

    node: str
    input: int | None = None
    attribute: str | None = None
    index: int = 0
    fixed: int = 0
    parts: Mapping[str, tuple[int, ...]]


class FrozenAxis(Record):
    """Convolution output channels that belong to no group, and why."""

    parameter: str
    channels: int
    reason: str


class ChannelMap(Record):
    """Everything needed to narrow one network, as a graph or as parameters."""

    groups: tuple[Group, ...]
    branches: tuple[Branch, ...] = ()
    resizes: tuple[Resize, ...] = ()
    frozen: tuple[FrozenAxis, ...] = ()
    unknown_operators: Mapping[str, int] = {}

    def group(self, name: str) -> Group:
        """Return the group of that name.

        Raises:
            CarveError: there is none.
        """
        return self.groups_of([name])[name]

    def groups_of(self, names: Collection[str]) -> dict[str, Group]:
        """Return the groups of these names by name, after one pass over all groups.

        Raises:
            CarveError: a name is no group's.
        """
        # Not kept in a cached property: `model_copy` would hand it on with other groups.
        known = {group.name: group for group in self.groups}
        for name in names:
            if name not in known:
                shown = ", ".join([*known][:8])
                raise CarveError(f"No pruning group {name!r}. There are {len(known)}: {shown}, ...")
        return {name: known[name] for name in names}

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups that may be pruned."""
        return tuple(group for group in self.groups if group.frozen is None)


Keep = Mapping[str, tuple[int, ...]]
"""Per group the units that stay, ascending. A group not named stays whole; () empties it."""
