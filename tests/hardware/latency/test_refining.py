from hardware.latency.refining import widths_at_stairs
from hardware.latency.table import LatencyTable
from hardware.latency.template_layers import layers_of
from tests.hardware import templates
from tests.hardware.latency.test_predict import add_variant
from tests.hardware.latency.test_table import KEY

WIDTHS = tuple(range(4, 33, 4))


def table_at(inner_widths):
    """A table of variants whose only block has these inner widths, all else whole."""
    layers = layers_of(*templates.residual(blocks=1))
    table = LatencyTable(key=KEY)
    measured = [{"stream": 32, "inner0": width, "wide": 64} for width in inner_widths]
    for widths in measured:
        table = add_variant(table, layers, widths)
    return widths_at_stairs(table, layers, {"inner0": WIDTHS}, measured)


def test_the_middle_between_measured_widths_of_different_time_comes_next() -> None:
    # Outputs are padded to 16 and inputs to 8: 4 and 32 differ.
    assert table_at([4, 32]) == {"inner0": 16}


def test_where_every_width_is_measured_nothing_is_left_to_look_at() -> None:
    assert table_at(WIDTHS) == {}


def test_neighbours_of_equal_time_leave_no_stair_between_them() -> None:
    layers = layers_of(*templates.residual(blocks=1))
    measured = [{"stream": 32, "inner0": 32, "wide": width} for width in (4, 20, 24, 32, 48, 64)]
    table = LatencyTable(key=KEY)
    for widths in measured:
        table = add_variant(table, layers, widths)

    found = widths_at_stairs(table, layers, {"wide": (4, 20, 24, 28, 32, 48, 64)}, measured)

    # 28 is not measured, but 24 and 32 take the same; they are padded to 32 outputs alike.
    assert found == {}


def test_of_several_gaps_the_one_with_the_largest_jump_comes_first() -> None:
    # From 12 to 28 two stairs lie between, from 4 to 12 half of one.
    assert table_at([4, 12, 28, 32]) == {"inner0": 20}
