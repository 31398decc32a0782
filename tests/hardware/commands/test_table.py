"""Looking at tables: staircases, what changed, what is stale; another device is never mixed in."""

import re

import pytest
import typer
from typer.testing import CliRunner

from hardware.commands.table import tables
from hardware.latency.compare import changes
from hardware.latency.predict import predict_keys_ms
from hardware.latency.staircase import label_of, staircases
from hardware.latency.sweep import Goal, Place, sweep
from hardware.latency.table import LatencyTable, key_of
from hardware.latency.template_layers import layers_of
from hardware.latency.variant import Template
from hardware.runtimes.base import EngineSettings
from hardware.runtimes.fake import FakeRuntime
from tests.hardware.holder import holder
from tests.hardware.latency.test_table import KEY, conv, variant
from tests.hardware.templates import residual
from tests.hardware.test_bundle import CANDIDATES

app = typer.Typer()
app.add_typer(tables, name="profile")


@app.command()
def other() -> None:
    """Make `profile` a command among others, as it is in `espalier`."""


def profile(*words: object) -> tuple[int, str]:
    runner = CliRunner()
    result = runner.invoke(app, ["profile", *(str(word) for word in words)], env={"COLUMNS": "160"})
    return result.exit_code, result.output


def table_of(times: dict[int, float], **key: object) -> LatencyTable:
    """A table with one convolution per width, and its time, measured twice."""
    table = LatencyTable(key=KEY.model_copy(update=key))
    for width, time_us in times.items():
        for again in (0.99, 1.01):
            table = table.adding(variant([again * time_us], width=width), [conv(3, width)])
    return table


STAIRS = {8: 10.0, 16: 10.0, 24: 20.0, 32: 20.0}


def test_a_staircase_has_a_row_per_measured_width_and_a_line_through_all():
    (stairs,) = staircases(table_of(STAIRS))

    assert [(row.width, row.time_us, row.exact) for row in stairs.rows] == [
        (width, pytest.approx(time_us), True) for width, time_us in STAIRS.items()
    ]
    assert [width for width, _ in stairs.curve] == list(range(1, 33))
    assert (stairs.axis, stairs.other) == ("out", 3)


def test_the_staircases_of_a_network_are_found_slowest_first(tmp_path):
    model, channels = residual()
    runtime, settings = FakeRuntime(), EngineSettings()
    empty = LatencyTable(key=key_of(runtime, settings, 1))
    template = Template(model=model, channels=channels, layers=layers_of(model, channels))
    place = Place(template=template, runtime=runtime, settings=settings, path=tmp_path / "t.json")

    found = staircases(sweep(place, Goal(candidates=CANDIDATES, builds=6), empty))

    tops = [max(us for _, us in stairs.curve) for stairs in found]
    assert tops == sorted(tops, reverse=True)
    assert {stairs.label.split(" ")[0].rstrip(",") for stairs in found} >= {"Conv", "Gemm"}


def test_a_classifier_is_drawn_over_its_inputs():
    keys = [conv(width, 10) for width in (16, 32, 64)]
    table = LatencyTable(key=KEY)
    for key in keys:
        table = table.adding(variant([0.1 * key.in_channels], width=key.in_channels), [key])

    (stairs,) = staircases(table)

    assert (stairs.axis, stairs.other) == ("in", 10)
    assert [row.width for row in stairs.rows] == [16, 32, 64]


def test_a_width_that_was_measured_beside_fewer_channels_only_is_estimated():
    table = table_of(STAIRS).adding(variant([5.0], width=1), [conv(2, 28)])

    (stairs,) = staircases(table)

    assert [row.width for row in stairs.rows if not row.exact] == [28]
    assert 10 < stairs.rows[3].time_us < 25


def test_what_is_drawn_is_what_plans_reckon_with():
    table = LatencyTable(key=KEY)
    for inputs in (8, 16, 32):
        for width in (8, 24, 64):
            time_us = 5 + 0.1 * inputs * width
            table = table.adding(variant([time_us], width=width), [conv(inputs, width)])

    (stairs,) = staircases(table)

    times_us = dict(stairs.curve)
    assert [(row.width, row.time_us) for row in stairs.rows] == [
        (width, times_us[width]) for width in (8, 24, 64)
    ]
    for width in (1, 8, 20, 24, 50, 64):
        executed = [conv(32, width)]
        assert times_us[width] == pytest.approx(1000 * predict_keys_ms(table, executed))


def test_show_draws_the_stairs(tmp_path):
    table_of(STAIRS).save(tmp_path / "t.json")

    code, said = profile("show", tmp_path / "t.json")

    assert code == 0, said
    bars = {int(m[1]): len(m[2]) for m in re.finditer(r"^(\d+) +[\d.]+ +(█+)", said, re.M)}
    assert list(bars) == [8, 16, 24, 32]
    assert bars[16] < 0.7 * bars[32]
    assert "Conv, 3x3" in said and "fake 1 on Oak board" in said
    assert "too few to say how far the table can be trusted" in said


def test_show_writes_a_page_of_one_file(tmp_path):
    table_of(STAIRS).save(tmp_path / "t.json")

    code, said = profile("show", tmp_path / "t.json", "--html", tmp_path / "t.html")

    page = (tmp_path / "t.html").read_text()
    assert code == 0, said
    assert page.count("<svg") == 1 and page.count("<circle") == 4
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert "3 in, 32 out: 20.0 µs" in page


def test_show_of_an_empty_table_says_so(tmp_path):
    LatencyTable(key=KEY).save(tmp_path / "t.json")

    code, said = profile("show", tmp_path / "t.json")

    assert (code, "nothing has been measured yet" in said) == (2, True)


def test_diff_tells_what_is_more_than_spread(tmp_path):
    table_of(STAIRS).save(tmp_path / "a.json")
    table_of(STAIRS | {32: 30.0, 24: 20.1}, version="2").save(tmp_path / "b.json")

    code, said = profile("diff", tmp_path / "a.json", tmp_path / "b.json")

    assert code == 0, said
    rows = [line for line in said.splitlines() if "Conv" in line]
    assert "+50.0 %" in rows[0] and "within" not in rows[0]
    assert "+0.5 %" in rows[1] and "within their spread" in rows[1]
    assert "fake 1 to 2: 4 layers in both, 0 only before, 0 only after" in said


def test_what_only_one_table_holds_is_counted():
    found = changes(table_of(STAIRS), table_of({32: 20.0, 48: 30.0}))

    assert (len(found.changed), found.only_before, found.only_after) == (1, 3, 1)
    assert found.networks == ((1.0, "t"),)


@pytest.mark.parametrize("command", ["diff", "merge"])
@pytest.mark.parametrize("key", [{"fingerprint": "elm"}, {"threads": 2}, {"precision": "fp16"}])
def test_tables_of_two_devices_or_settings_are_not_mixed(tmp_path, command, key):
    table_of(STAIRS).save(tmp_path / "a.json")
    table_of(STAIRS, **key).save(tmp_path / "b.json")
    more = ["-o", tmp_path / "c.json"] if command == "merge" else []

    code, said = profile(command, tmp_path / "a.json", tmp_path / "b.json", *more)

    assert code == 2
    assert f"{next(iter(key))} " in said
    assert not (tmp_path / "c.json").exists()


def test_a_table_that_another_process_writes_is_not_merged_into(tmp_path):
    table_of({8: 10.0}).save(tmp_path / "a.json")
    before = (tmp_path / "a.json").read_bytes()

    with holder(str(tmp_path / "a.json")) as other:
        code, said = profile(
            "merge", tmp_path / "a.json", tmp_path / "a.json", "-o", tmp_path / "a.json"
        )

    assert code == 2
    assert f"process {other.pid}, holding it" in " ".join(said.split())
    assert (tmp_path / "a.json").read_bytes() == before


def test_merge_writes_a_table_of_both(tmp_path):
    table_of({8: 10.0}).save(tmp_path / "a.json")
    table_of({16: 11.0}).save(tmp_path / "b.json")

    code, said = profile(
        "merge", tmp_path / "a.json", tmp_path / "b.json", "-o", tmp_path / "c.json"
    )

    assert (code, "2 latencies from 4 networks" in said) == (0, True)


@pytest.fixture
def shelf(tmp_path):
    """A table in use, two that older versions left, and one of another setting."""
    table_of(STAIRS, version="3").save(tmp_path / "ov.json")
    table_of(STAIRS, version="1").save(tmp_path / "ov-1.json")
    table_of(STAIRS, version="2").save(tmp_path / "ov-2.json")
    table_of(STAIRS, threads=2, version="4").save(tmp_path / "ov-4.json")
    (tmp_path / "ov-notes.json").write_text("{}")
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_prune_lists_what_is_stale_and_deletes_only_when_told(shelf):
    before = names(shelf)

    code, said = profile("prune", shelf / "ov.json")

    assert code == 0 and names(shelf) == before
    assert "ov-1.json (1)" in said and "ov-2.json (2)" in said and "ov-4" not in said
    profile("prune", shelf / "ov.json", "--delete")
    assert names(shelf) == ["ov-4.json", "ov-notes.json", "ov.json"]


def test_prune_keeps_the_versions_that_are_named(shelf):
    profile("prune", shelf / "ov.json", "--keep-version", "2", "--delete")

    assert names(shelf) == ["ov-2.json", "ov-4.json", "ov-notes.json", "ov.json"]


def test_a_table_that_is_not_there_is_an_error(tmp_path):
    code, said = profile("show", tmp_path / "none.json")

    assert (code, "Cannot read" in said) == (2, True)


def test_a_kind_of_layer_is_told_in_words():
    key = conv(16, 16).model_copy(
        update={
            "conv_groups": 16,
            "group_channels": 1,
            "strides": (2, 2),
            "in_size": (8, 8),
            "tail": ("Relu",),
        }
    )

    assert label_of(key) == "Conv + Relu, 3x3, stride 2, depthwise, at 8x8 px"


def test_a_line_runs_where_layers_are():
    # An expansion and a projection are one kind; nothing has 960 inputs and 960 outputs.
    table = LatencyTable(key=KEY)
    for inputs, outputs in ((160, 960), (80, 480), (960, 160), (480, 80)):
        time_us = 1e-3 * inputs * outputs
        table = table.adding(variant([time_us], width=outputs), [conv(inputs, outputs)])

    (stairs,) = staircases(table)

    assert stairs.other == 160
    assert max(us for _, us in stairs.curve) == pytest.approx(153.6)
