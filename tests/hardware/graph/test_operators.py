import onnx

from hardware.graph import operators
from pipeline.channels.rules import RULES

LISTS = {name: value for name, value in vars(operators).items() if isinstance(value, frozenset)}


def test_every_name_is_one_of_onnx() -> None:
    names = frozenset().union(*LISTS.values())

    assert [name for name in sorted(names) if not onnx.defs.has(name)] == []


def test_every_operator_that_is_not_random_has_a_rule_in_the_channel_analysis() -> None:
    names = frozenset().union(*LISTS.values()) - operators.RANDOM

    assert names - RULES.keys() == set()


def test_views_and_movements_are_apart() -> None:
    assert not operators.VIEWS & operators.MOVEMENTS
    assert not operators.VIEWS & operators.ELEMENTWISE
