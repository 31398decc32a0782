"""The tables that come with the project: real measurements, small, and good for planning."""

from pathlib import Path

import pytest

from benchmarks.fidelity.subjects import subject_of, template_of
from hardware.latency.predict import predict_plan_ms
from hardware.latency.table import load_table, table_path
from hardware.latency.trust import trust_of

PROFILES = Path(__file__).parents[1] / "profiles"
TABLES = sorted(PROFILES.glob("*/*.json"))
MOST_BYTES = 200_000


def test_there_is_a_table_of_each_cpu_runtime() -> None:
    assert {load_table(path).key.runtime for path in TABLES} == {"ov", "ort"}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_is_small_lies_where_its_key_says_and_tells_how_far_to_trust_it(path) -> None:
    table = load_table(path)

    assert path.stat().st_size < MOST_BYTES
    assert table_path(PROFILES, table.key) == path
    assert len(trust_of(table).errors_pct) >= 5


@pytest.mark.parametrize("name", ["demo", "mobilenet_v2"])
def test_the_tables_know_the_network_of_the_demo_and_a_mobilenet(name) -> None:
    subject, candidates = subject_of(name)
    template = template_of(subject)
    narrow = {group: min(w for w in widths if w) for group, widths in candidates.items()}

    for path in TABLES:
        table = load_table(path)
        full_ms = table.full_ms(template.digest)

        assert predict_plan_ms(table, template.layers, {}) == pytest.approx(full_ms, rel=0.1)
        assert predict_plan_ms(table, template.layers, narrow) < 0.7 * full_ms
