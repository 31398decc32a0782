import json

import pytest

from hardware.errors import DeviceMismatchError, MissingLatencyError, StorageError
from hardware.latency.layers import LayerKey
from hardware.latency.table import (
    LatencyTable,
    TableKey,
    Variant,
    load_table,
    merge,
    open_table,
    table_path,
)
from hardware.runtimes.base import EngineSettings
from hardware.runtimes.fake import FakeRuntime
from hardware.timing import Latency

KEY = TableKey(
    device="Oak board",
    fingerprint="oak123",
    folder="oak-board-oak123",
    runtime="fake",
    version="1",
    precision="fp32",
    batch=1,
    threads=1,
)


def conv(inputs, outputs):
    return LayerKey(operator="Conv", in_channels=inputs, out_channels=outputs, kernel=(3, 3))


def variant(times_us, *, width=8, full_ms=1.0, median_ms=None, template="t", predicted_ms=None):
    """A network that takes as long as its layers do, unless another time is given."""
    median_ms = median_ms or sum(times_us) / 1000
    return Variant(
        template=template,
        widths={"g": width},
        end_to_end=Latency(
            median_ms=median_ms, low_ms=median_ms, high_ms=median_ms, mad_ms=0.0, samples=9
        ),
        full_ms=full_ms,
        samples=20,
        entries=tuple(range(len(times_us))),
        times_us=tuple(times_us),
        predicted_ms=predicted_ms,
    )


def test_entries_are_medians_over_builds_with_their_spread():
    table = LatencyTable(key=KEY)
    for time_us in (10.0, 11.0, 18.0):
        table = table.adding(variant([time_us]), [conv(8, 8)])

    entry = table.entry(conv(8, 8))

    assert (entry.median_us, entry.mad_us, entry.builds) == (11.0, 1.0, 3)


def test_a_slow_down_of_the_device_is_taken_out_through_the_full_network():
    table = LatencyTable(key=KEY)
    # Three times at the usual speed, once while everything took twice as long.
    for full_ms, time_us in ((1.0, 10.0), (1.0, 10.0), (1.0, 10.0), (2.0, 80.0)):
        key = conv(8, 8) if time_us == 10.0 else conv(16, 16)
        table = table.adding(variant([time_us], full_ms=full_ms), [key])

    assert table.full_ms("t") == 1.0
    assert table.slowdown(table.variants[-1]) == 2.0
    assert table.usual_ms(table.variants[-1]) == 0.04
    assert table.entry(conv(16, 16)).median_us == 40.0


def test_a_network_that_was_never_measured_has_no_full_time():
    table = LatencyTable(key=KEY).adding(variant([10.0]), [conv(8, 8)])

    with pytest.raises(MissingLatencyError, match=r"no measurement of this network.*profile"):
        table.full_ms("another")


def test_a_table_survives_save_and_load(tmp_path):
    table = LatencyTable(key=KEY).adding(variant([10.0, 5.0]), [conv(3, 8), conv(8, 8)])
    path = tmp_path / "deep" / "table.json"

    table.save(path)

    assert load_table(path) == table
    assert load_table(path, KEY) == table
    assert json.loads(path.read_text())["schema"] == LatencyTable.SCHEMA


def test_a_table_of_another_device_is_refused_with_what_differs(tmp_path):
    path = tmp_path / "table.json"
    LatencyTable(key=KEY).save(path)
    here = KEY.model_copy(update={"device": "Elm board", "fingerprint": "elm9", "threads": 2})

    with pytest.raises(
        DeviceMismatchError, match=r"fingerprint elm9 against oak123 .*threads 2 against 1"
    ):
        load_table(path, here)


def test_tables_of_different_settings_are_not_merged():
    other = LatencyTable(key=KEY.model_copy(update={"precision": "bf16"}))

    with pytest.raises(DeviceMismatchError, match="precision fp32 against bf16"):
        merge(LatencyTable(key=KEY), other)


def test_merging_keeps_every_variant_once():
    shared = variant([10.0, 5.0])
    first = LatencyTable(key=KEY).adding(shared, [conv(3, 8), conv(8, 8)])
    second = LatencyTable(key=KEY).adding(variant([7.0], width=4), [conv(4, 4)])
    second = second.adding(shared, [conv(3, 8), conv(8, 8)])

    both = merge(first, second)

    assert [v.widths for v in both.variants] == [{"g": 8}, {"g": 4}]
    assert both.entry(conv(4, 4)).median_us == 7.0
    assert both.entry(conv(8, 8)).builds == 1
    assert merge(both, second) == both


def test_what_was_never_measured_is_an_error_that_names_what_was():
    table = LatencyTable(key=KEY).adding(variant([10.0]), [conv(8, 8)])

    with pytest.raises(MissingLatencyError, match=r"Conv 8 -> 16 .* \[\(8, 8\)\]"):
        table.entry(conv(8, 16))


def test_an_empty_table_has_no_additivity():
    with pytest.raises(MissingLatencyError, match="nothing has been measured"):
        _ = LatencyTable(key=KEY).additivity


def test_the_additivity_audit_is_end_to_end_over_the_sum():
    table = LatencyTable(key=KEY)
    for median_ms in (0.98, 1.0, 1.05):
        table = table.adding(variant([600.0, 400.0], median_ms=median_ms), [conv(3, 8), conv(8, 8)])

    assert table.additivity == pytest.approx((0.98, 1.0, 1.05))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: text.replace('"entries": [0]', '"entries": [7]'), "does not hold"),
        (lambda text: text.replace('"schema": 2', '"schema": 99'), "schema 99"),
        (lambda text: text.replace('"batch": 1', '"bath": 1'), "not a valid LatencyTable"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, damage, message):
    path = tmp_path / "table.json"
    LatencyTable(key=KEY).adding(variant([10.0]), [conv(8, 8)]).save(path)

    path.write_text(damage(path.read_text()))

    with pytest.raises(StorageError, match=message):
        load_table(path)


def test_tables_lie_under_their_device(tmp_path):
    table, path = open_table(tmp_path, None, FakeRuntime(), EngineSettings(threads=2), batch=4)

    assert not table.variants
    assert path == table_path(tmp_path, table.key)
    assert path.name == "fake-fp32-b4-t2.json"
    assert path.parent.parent == tmp_path


def test_a_table_of_an_older_runtime_is_set_aside(tmp_path):
    table, path = open_table(tmp_path, None, FakeRuntime(), EngineSettings(), batch=1)
    old = LatencyTable(key=table.key.model_copy(update={"version": "0.9"}))
    old.save(path)

    fresh, again = open_table(tmp_path, None, FakeRuntime(), EngineSettings(), batch=1)

    assert again == path and not path.exists()
    assert fresh.key.version == table.key.version
    assert load_table(path.with_name(f"{path.stem}-0.9.json")) == old


def test_a_table_named_by_its_path_is_never_set_aside(tmp_path):
    path = tmp_path / "mine.json"
    LatencyTable(key=KEY).save(path)

    with pytest.raises(DeviceMismatchError, match="measured elsewhere"):
        open_table(tmp_path, path, FakeRuntime(), EngineSettings(), batch=1)

    assert path.exists()
