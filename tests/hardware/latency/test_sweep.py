import subprocess
import sys
from dataclasses import replace

import numpy as np
import psutil
import pytest

from hardware.disturbance import Counters
from hardware.errors import BuildError, RuntimeMissingError
from hardware.graph.carve import carve, keep_first
from hardware.latency.predict import costs, predict_ms
from hardware.latency.references import narrow_widths
from hardware.latency.sweep import (
    DESIGN_S,
    LEAST_BUILDS,
    complete_widths,
    digest_of,
    measure,
    sweep,
)
from hardware.latency.table import LatencyTable, key_of, load_table
from hardware.latency.template_layers import layers_of
from hardware.runtimes import RUNTIMES, get_runtime
from hardware.runtimes.base import EngineSettings
from hardware.runtimes.fake import FakeRuntime, Staircase
from hardware.timing import Protocol
from tests.hardware import templates

SETTINGS = EngineSettings()
QUICK = Protocol(warmup_s=0.01, min_samples=10, max_samples=10, max_seconds=0.05)


class NeighbourlyRuntime(FakeRuntime):
    """The imagined device with a neighbour beside some of the variants, who slows them down."""

    def __init__(self, beside=range(0)):
        super().__init__()
        self.beside, self.profiled, self.readings = beside, 0, 0
        self.foreign_s, self.first = 0.0, set()

    def build(self, model, settings, *, profile=False):
        self.profiled += profile
        # An engine stays as slow as it was built. Those beside which variants are timed, which
        # outlive the neighbour, are spared.
        if not self.profiled:
            self.first.add(model.ByteSize())
        is_slow = self.profiled in self.beside and model.ByteSize() not in self.first
        self.stairs = Staircase(us_per_mac=1.3e-4 if is_slow else 1e-4)
        return super().build(model, settings, profile=profile)

    def counters(self):
        self.readings += 1  # a second passes between two readings
        self.foreign_s += self.profiled in self.beside
        return Counters(wall_s=float(self.readings), foreign_s=self.foreign_s)


class CountingRuntime(FakeRuntime):
    """The imagined device, counting the variants it profiles; may fail at one of them."""

    def __init__(self, fail_at=None, **properties):
        super().__init__(**properties)
        self.profiled, self.fail_at = 0, fail_at

    def build(self, model, settings, *, profile=False):
        self.profiled += profile
        if profile and self.profiled == self.fail_at:
            raise BuildError("Out of luck.")
        return super().build(model, settings, profile=profile)


class UnsteadyRuntime(FakeRuntime):
    """The imagined device, slower beside some of the variants; narrow networks suffer less."""

    def __init__(self, slow=range(0)):
        super().__init__()
        self.slow, self.profiled = slow, 0

    def build(self, model, settings, *, profile=False):
        self.profiled += profile
        return Unsteady(super().build(model, settings, profile=profile), self)

    @property
    def pace(self):
        return 1.5 if self.profiled in self.slow else 1.0


class Unsteady:
    """An engine as fast as its device is at the moment; 4 us of each inference are spared."""

    def __init__(self, engine, device):
        self.engine, self.device = engine, device

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def timer(self, feeds):
        timer = self.engine.timer(feeds)
        return lambda calls: self.device.pace * (timer(calls) - 0.004) + 0.004

    def node_times(self, feeds, runs):
        times = self.engine.node_times(feeds, runs)
        return tuple(replace(time, time_us=self.device.pace * time.time_us) for time in times)


def subject(make=templates.residual):
    template, channels = make()
    candidates = {}
    for group in channels.groups:
        in_branch = any(group.name in branch.groups for branch in channels.branches)
        candidates[group.name] = (0,) * in_branch + tuple(range(4, group.width + 1, 4))
    return template, channels, layers_of(template, channels), candidates


def empty_table(runtime):
    return LatencyTable(key=key_of(runtime, SETTINGS, 1))


def true_ms(runtime, template, channels, widths):
    engine = runtime.build(carve(template, channels, keep_first(channels, widths)), SETTINGS)
    return engine.timer(engine.random_feeds())(1)


@pytest.mark.parametrize("make", [templates.residual, templates.depthwise])
def test_a_sweep_predicts_plans_it_never_saw(tmp_path, make):
    template, channels, layers, candidates = subject(make)
    runtime = FakeRuntime()

    table = sweep(
        template, channels, layers, candidates, runtime, SETTINGS,
        empty_table(runtime), tmp_path / "table.json",
    )  # fmt: skip

    known = costs(table, layers, candidates)
    generator = np.random.default_rng(3)
    for _ in range(10):
        plan = {name: int(generator.choice(widths)) for name, widths in candidates.items()}
        truth = true_ms(runtime, template, channels, plan)
        assert predict_ms(known, candidates, plan) == pytest.approx(truth, rel=3e-3)


def test_a_noisy_device_is_predicted_within_its_noise(tmp_path):
    template, channels, layers, candidates = subject()
    noisy = FakeRuntime(noise=0.03, seed=1)

    table = sweep(
        template, channels, layers, candidates, noisy, SETTINGS,
        empty_table(noisy), tmp_path / "table.json", builds=16,
    )  # fmt: skip

    known = costs(table, layers, candidates)
    generator = np.random.default_rng(3)
    errors = []
    for _ in range(10):
        plan = {name: int(generator.choice(widths)) for name, widths in candidates.items()}
        truth = true_ms(FakeRuntime(), template, channels, plan)
        errors.append(abs(predict_ms(known, candidates, plan) / truth - 1))
    assert np.median(errors) < 0.02


def test_a_sweep_killed_half_way_keeps_what_it_measured_and_goes_on(tmp_path):
    template, channels, layers, candidates = subject()
    path = tmp_path / "table.json"
    arguments = (template, channels, layers, candidates)
    failing, whole = CountingRuntime(fail_at=6), CountingRuntime()
    with pytest.raises(BuildError):
        sweep(*arguments, failing, SETTINGS, empty_table(failing), path, builds=9)
    kept = load_table(path)

    resumed = sweep(*arguments, whole, SETTINGS, kept, path, builds=9)

    assert len(kept.variants) == 5
    assert whole.profiled == 4
    straight = sweep(
        *arguments, whole, SETTINGS, empty_table(whole), tmp_path / "other.json", builds=9
    )
    assert [v.widths for v in resumed.variants] == [v.widths for v in straight.variants]
    assert resumed.entries == straight.entries


def test_a_second_sweep_builds_nothing(tmp_path):
    template, channels, layers, candidates = subject()
    path, runtime = tmp_path / "table.json", CountingRuntime()
    arguments = (template, channels, layers, candidates, runtime, SETTINGS)
    table = sweep(*arguments, empty_table(runtime), path)
    built = runtime.profiled

    again = sweep(*arguments, load_table(path), path)

    assert built == len(table.variants) and runtime.profiled == built
    assert again == table


def test_a_sweep_that_came_to_its_end_is_not_taken_up_again(tmp_path):
    # How many variants fit into a sweep's time differs: what was enough stays enough, for these
    # widths.
    template, channels, layers, candidates = subject()
    counting, path = CountingRuntime(), tmp_path / "table.json"
    arguments = (template, channels, layers)
    swept = sweep(*arguments, candidates, counting, SETTINGS, empty_table(counting), path)
    last = [v for v in swept.variants if not v.purpose][-1]
    keys = [entry.key for entry in swept.entries]
    shorter = empty_table(counting)
    for variant in swept.variants:
        shorter = shorter if variant == last else shorter.adding(variant, keys)
    before = counting.profiled

    finished = shorter.model_copy(update={"swept": load_table(path).swept})
    sweep(*arguments, candidates, counting, SETTINGS, finished, path)
    assert counting.profiled == before
    sweep(*arguments, candidates, counting, SETTINGS, shorter, path)
    assert counting.profiled > before
    before = counting.profiled
    finer = {name: tuple(range(min(w), max(w) + 1, 2)) for name, w in candidates.items()}
    sweep(*arguments, finer, counting, SETTINGS, load_table(path), path)
    assert counting.profiled > before
    assert len(load_table(path).swept) == 2


def test_more_minutes_measure_more_and_count_those_before(tmp_path, monkeypatch):
    for name in ("DESIGN_S", "STAIRS_S"):
        monkeypatch.setattr(f"hardware.latency.sweep.{name}", 1e9)
    for name, count in (("LEAST_BUILDS", 2), ("MOST_BUILDS", 3), ("STAIR_BUILDS", 0)):
        monkeypatch.setattr(f"hardware.latency.sweep.{name}", count)
    template, channels, layers, candidates = subject()
    runtime, path = CountingRuntime(), tmp_path / "table.json"
    arguments = (template, channels, layers, candidates, runtime, SETTINGS)

    counts = []
    table = empty_table(runtime)
    for minutes in (1.0, 1.0, 3.0, 2.0, 3.0, 4.0):
        table = sweep(*arguments, table, path, minutes=minutes)
        counts.append(len(table.variants))

    assert counts == [3, 3, 9, 9, 9, 12]
    assert runtime.profiled == 12 and load_table(path) == table


def test_a_longer_sweep_has_the_time_that_the_one_before_left(tmp_path, monkeypatch):
    template, channels, layers, candidates = subject()
    runtime, path = CountingRuntime(), tmp_path / "table.json"
    # A clock that stands still but for ten seconds per variant.
    monkeypatch.setattr("hardware.latency.sweep.time.monotonic", lambda: 10.0 * runtime.profiled)
    monkeypatch.setattr("hardware.latency.sweep.STAIR_BUILDS", 0)
    arguments = (template, channels, layers, candidates, runtime, SETTINGS)

    short = sweep(*arguments, empty_table(runtime), path, minutes=5)
    longer = sweep(*arguments, short, path, minutes=10)
    straight = sweep(*arguments, empty_table(runtime), tmp_path / "other.json", minutes=10)

    designed = [len(table.variants) for table in (short, longer, straight)]
    assert designed[0] == pytest.approx(5 * DESIGN_S / 10, abs=2)
    assert designed[1] == pytest.approx(designed[0] + (10 * DESIGN_S - 300) / 10, abs=2)
    assert designed[2] == pytest.approx(10 * DESIGN_S / 10, abs=2)


def test_a_related_network_needs_fewer_builds(tmp_path):
    template, channels, layers, candidates = subject()
    path, runtime = tmp_path / "table.json", CountingRuntime()
    table = sweep(
        template, channels, layers, candidates, runtime, SETTINGS, empty_table(runtime), path
    )
    first, runtime.profiled = runtime.profiled, 0
    template, channels, layers, candidates = subject(lambda: templates.residual(blocks=3))

    table = sweep(template, channels, layers, candidates, runtime, SETTINGS, table, path)

    assert 0 < runtime.profiled <= first / 3
    known = costs(table, layers, candidates)
    generator = np.random.default_rng(3)
    for _ in range(5):
        plan = {name: int(generator.choice(widths)) for name, widths in candidates.items()}
        truth = true_ms(FakeRuntime(), template, channels, plan)
        assert predict_ms(known, candidates, plan) == pytest.approx(truth, rel=1e-2)


def test_a_related_network_that_was_hardly_measured_saves_nothing(tmp_path):
    template, channels, layers, candidates = subject(lambda: templates.residual(blocks=1))
    path, runtime = tmp_path / "table.json", CountingRuntime()
    table = sweep(
        template, channels, layers, candidates, runtime, SETTINGS, empty_table(runtime), path,
        builds=2,
    )  # fmt: skip
    template, channels, layers, candidates = subject()
    runtime.profiled = 0

    sweep(template, channels, layers, candidates, runtime, SETTINGS, table, path)

    assert runtime.profiled >= LEAST_BUILDS


def test_a_sweep_covers_emptied_branches_and_both_ends(tmp_path):
    template, channels, layers, candidates = subject()
    runtime = FakeRuntime()

    table = sweep(
        template, channels, layers, candidates, runtime, SETTINGS,
        empty_table(runtime), tmp_path / "table.json", builds=5,
    )  # fmt: skip

    widths = [variant.widths for variant in table.variants]
    assert complete_widths(channels, {}) in widths
    assert {name: min(w for w in ws if w) for name, ws in candidates.items()} in widths
    for branch in channels.branches:
        assert any(all(w[group] == 0 for group in branch.groups) for w in widths)


def test_a_measured_plan_enters_the_table():
    template, channels, layers, _ = subject()
    runtime = FakeRuntime(outside_us=7.0)
    widths = {"inner0": 12, "stream": 20}

    table, variant = measure(
        template, channels, layers, widths, runtime, SETTINGS, empty_table(runtime)
    )

    assert table.holds(digest_of(template), complete_widths(channels, widths))
    assert all(layer.key_at(widths) in table.by_key for layer in layers)
    assert variant.end_to_end.median_ms == pytest.approx((variant.sum_us + 7.0) / 1000, rel=1e-4)
    assert variant.anchor_ms == pytest.approx(true_ms(runtime, template, channels, {}))
    narrow_ms = true_ms(runtime, template, channels, narrow_widths(channels))
    assert variant.narrow_ms == pytest.approx(narrow_ms)
    assert narrow_ms < 0.5 * variant.anchor_ms


def test_the_digest_tells_structure_and_not_weights():
    template, _ = templates.residual()
    other, _ = templates.residual()
    other.graph.initializer[0].raw_data = bytes(len(other.graph.initializer[0].raw_data))

    assert digest_of(other) == digest_of(template)
    assert digest_of(templates.residual(blocks=3)[0]) != digest_of(template)


def test_what_was_measured_beside_a_neighbour_is_measured_again_when_it_has_gone(tmp_path):
    template, channels, layers, candidates = subject(lambda: templates.residual(blocks=1))
    runtime, path = NeighbourlyRuntime(beside=range(5, 8)), tmp_path / "table.json"
    arguments = (template, channels, layers, candidates)

    table = sweep(*arguments, runtime, SETTINGS, empty_table(runtime), path, builds=9)

    assert runtime.profiled == 9 + 3
    assert len(table.variants) == 9 and not any(v.is_crowded for v in table.variants)
    assert load_table(path) == table
    quiet = FakeRuntime()
    straight = sweep(
        *arguments, quiet, SETTINGS, empty_table(quiet), tmp_path / "quiet.json", builds=9
    )
    assert [e.median_us for e in table.entries] == [e.median_us for e in straight.entries]


def test_a_neighbour_that_stays_is_told_and_tried_once_per_sweep(tmp_path, caplog):
    template, channels, layers, candidates = subject(lambda: templates.residual(blocks=1))
    runtime, path = NeighbourlyRuntime(beside=range(3, 1000)), tmp_path / "table.json"
    arguments = (template, channels, layers, candidates, runtime, SETTINGS)

    table = sweep(*arguments, empty_table(runtime), path, builds=6)

    assert runtime.profiled == 6 + 1
    assert [v.is_crowded for v in table.variants] == [False] * 2 + [True] * 4
    assert "Profile again when it is quiet" in caplog.text
    runtime.beside = range(0)
    quiet = sweep(*arguments, load_table(path), path, builds=6)
    assert runtime.profiled == 7 + 4
    assert not any(v.is_crowded for v in quiet.variants)


def test_what_was_measured_while_the_device_was_slower_is_measured_again(tmp_path):
    template, channels, layers, candidates = subject(lambda: templates.residual(blocks=1))
    runtime, path = UnsteadyRuntime(slow=range(5, 8)), tmp_path / "table.json"
    arguments = (template, channels, layers, candidates)

    table = sweep(*arguments, runtime, SETTINGS, empty_table(runtime), path, builds=9)

    assert runtime.profiled == 9 + 3
    assert all(table.is_at_pace(variant) for variant in table.variants)
    assert load_table(path) == table


def test_a_device_that_stays_slower_is_told_and_counts_less(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("hardware.latency.sweep.PAUSES_S", (0.0, 0.0))
    template, channels, layers, candidates = subject(lambda: templates.residual(blocks=1))
    runtime, path = UnsteadyRuntime(slow=range(10, 1000)), tmp_path / "table.json"
    arguments = (template, channels, layers, candidates, runtime, SETTINGS)

    table = sweep(*arguments, empty_table(runtime), path, builds=16)

    assert runtime.profiled == 16 + 3
    assert [table.is_at_pace(v) for v in table.variants] == [True] * 9 + [False] * 7
    assert "slower than usual" in caplog.text
    known = costs(table, layers, candidates)
    runtime.slow = range(0)
    for variant in table.variants[9:]:
        truth = true_ms(runtime, template, channels, variant.widths)
        assert predict_ms(known, candidates, variant.widths) == pytest.approx(truth, rel=0.01)


def test_stairs_that_no_variant_shows_are_looked_for_but_not_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("hardware.latency.sweep.DESIGN_S", 0.0)
    template, channels, layers, candidates = subject(lambda: templates.residual(blocks=1))
    candidates["wide"] = tuple(range(2, 65, 2))  # more than the design can visit
    runtime, path = CountingRuntime(), tmp_path / "table.json"
    arguments = (template, channels, layers, candidates, runtime, SETTINGS)

    table = sweep(*arguments, empty_table(runtime), path)
    built = runtime.profiled

    extra = [v for v in table.variants if v.purpose == "stair"]
    designed = {v.widths["wide"] for v in table.variants if not v.purpose}
    assert extra and all(v.widths["wide"] not in designed for v in extra)
    assert sweep(*arguments, load_table(path), path) == table
    assert runtime.profiled == built


def test_a_sweep_whose_time_is_up_ends(tmp_path, monkeypatch):
    for name in ("DESIGN_S", "STAIRS_S"):
        monkeypatch.setattr(f"hardware.latency.sweep.{name}", 0.0)
    template, channels, layers, candidates = subject()
    noisy = FakeRuntime(noise=0.3)

    table = sweep(
        template, channels, layers, candidates, noisy, SETTINGS,
        empty_table(noisy), tmp_path / "table.json",
    )  # fmt: skip

    assert len(table.variants) == LEAST_BUILDS


def test_every_sample_and_the_state_of_the_device_are_kept(tmp_path):
    template, channels, layers, _ = subject(lambda: templates.residual(blocks=1))
    runtime = FakeRuntime(noise=0.02)

    table, variant = measure(
        template, channels, layers, {"inner0": 8}, runtime, SETTINGS, empty_table(runtime)
    )
    table.save(tmp_path / "table.json")

    raw = load_table(tmp_path / "table.json").variants[0].raw
    assert len(raw.variant_us()) == len(raw.anchor_us()) == variant.end_to_end.samples
    assert np.median(raw.variant_us()) / 1000 == pytest.approx(variant.end_to_end.median_ms)
    assert (raw.engines, raw.anchors) == (2, 3)
    assert variant.conditions["usable threads"]
    assert variant.purpose == "plan"


def test_a_spinning_process_beside_a_real_runtime_is_recorded():
    pytest.importorskip("onnxruntime")
    template, channels, layers, _ = subject(lambda: templates.residual(blocks=1))
    runtime = get_runtime("ort")
    long = Protocol(
        warmup_s=0.01, min_samples=10, max_samples=10**5, max_seconds=0.6, relative_width=1e-9
    )
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        while psutil.Process(spinning.pid).cpu_times().user < 0.05:  # it has started
            pass
        _, variant = measure(
            template, channels, layers, {}, runtime, SETTINGS, empty_table(runtime), protocol=long
        )
    finally:
        spinning.kill()
        spinning.wait()

    assert variant.is_crowded
    assert variant.end_to_end.tainted > 0


@pytest.mark.runtime
@pytest.mark.parametrize("name", sorted(set(RUNTIMES) - {"fake"}))
def test_every_layer_of_a_real_runtime_is_found(name):
    template, channels, layers, _ = subject(lambda: templates.residual(size=32))
    try:
        runtime = get_runtime(name)
    except RuntimeMissingError as error:
        pytest.skip(str(error))
    table = empty_table(runtime)

    for widths in ({}, {"inner0": 8, "stream": 16}, {"inner1": 0}):
        table, variant = measure(
            template, channels, layers, widths, runtime, SETTINGS, table, protocol=QUICK
        )
        spent = zip(variant.entries, variant.times_us, strict=True)
        executed = [(table.entries[place].key, us) for place, us in spent]
        # Every convolution that is not emptied took time, and nothing is counted twice.
        assert all(us > 0 for key, us in executed if key.operator == "Conv")
        assert sum(variant.times_us) == pytest.approx(variant.sum_us, abs=0.02 * len(layers))
    assert len(table.variants) == 3
