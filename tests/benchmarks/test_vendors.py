"""What is said of our medians beside the vendors' own, and that their tools are read right."""

import sys

import pytest

from benchmarks import vendors
from benchmarks.gate.engines import Build
from benchmarks.vendors import note
from hardware.errors import RunError
from hardware.intervals import Interval


@pytest.mark.parametrize(
    ("plain", "less", "said"),
    [
        (Interval(1.0, 0.99, 1.01), Interval(1.02, 1.01, 1.03), "agrees"),
        (Interval(0.97, 0.96, 0.98), Interval(1.0, 0.99, 1.01), "agrees but for the 5.0 us"),
        (Interval(0.9, 0.89, 0.91), Interval(0.95, 0.94, 0.96), "differs by -5.0 % beyond"),
        (Interval(1.0, 0.9, 1.1), Interval(1.0, 0.9, 1.1), "unsure"),
    ],
)
def test_a_difference_is_explained_or_named(plain, less, said):
    assert note(plain, less, 0.005, 0.001).startswith(said)


@pytest.mark.runtime
@pytest.mark.parametrize("tool", vendors.TOOLS, ids=lambda tool: tool.runtime)
def test_every_tool_times_the_file(tool, tmp_path):
    engine = Build(size_px=4).engine_file(tool.runtime, tmp_path)

    ours, theirs = vendors.ours_ms(engine, 0.2), tool.median_ms(engine.path, 0.2)

    assert abs(vendors.turns_ms(engine)) < ours.estimate
    # Of one order of magnitude: what a busy machine leaves of two medians that agree.
    assert 0.05 < theirs / ours.estimate < 20


def test_a_tool_that_fails_is_an_error_with_its_words():
    with pytest.raises(RunError, match="no such model"):
        vendors._output([sys.executable, "-c", "raise SystemExit('no such model')"])
