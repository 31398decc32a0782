import subprocess
import sys
from dataclasses import replace

import numpy as np
import psutil
import pytest

from hardware.disturbance import Counters
from hardware.errors import BuildError, RunError, RuntimeMissingError
from hardware.latency.predict import costs, predict_ms
from hardware.latency.sweep import LEAST_BUILDS, Goal, Place, measure, prediction_errors, sweep
from hardware.latency.table import LatencyTable, key_of, load_table
from hardware.latency.template_layers import layers_of
from hardware.latency.variant import Template, digest_of
from hardware.runtimes import RUNTIMES, get_runtime
from hardware.runtimes.base import EngineSettings
from hardware.runtimes.fake import FakeRuntime
from hardware.timing import Protocol
from tests.hardware import templates

SETTINGS = EngineSettings()
# The imagined device with stairs no wider than the step between candidates: what lies between two
# measured widths can be known.
FINE = {"in_tile": 4, "out_tile": 4}
QUICK = Protocol(warmup_s=0.01, min_samples=10, max_samples=10, max_seconds=0.05)


class CountingRuntime(FakeRuntime):
    """The imagined device, counting the variants it profiles; may fail at one of them."""

    def __init__(self, fail_at=None, **properties):
        super().__init__(**{**FINE, **properties})
        self.profiled, self.fail_at = 0, fail_at

    def build(self, model, settings, *, profile=False):
        self.profiled += profile
        if profile and self.profiled == self.fail_at:
            raise BuildError("Out of luck.")
        return super().build(model, settings, profile=profile)


def subject(make=templates.residual):
    model, channels = make()
    candidates = {}
    for group in channels.groups:
        in_branch = any(group.name in branch.groups for branch in channels.branches)
        candidates[group.name] = (0,) * in_branch + tuple(range(4, group.width + 1, 4))
    template = Template(model=model, channels=channels, layers=layers_of(model, channels))
    return template, candidates


def place_of(template, runtime, path):
    return Place(template=template, runtime=runtime, settings=SETTINGS, path=path)


def empty_table(runtime):
    return LatencyTable(key=key_of(runtime, SETTINGS, 1))


def true_ms(runtime, template, widths):
    engine = runtime.build(template.carved(widths), SETTINGS)
    return engine.timer(engine.random_feeds())(1)


def errors_on_random_plans(table, template, candidates, count=10):
    """How far plans that the table never saw are off on the undisturbed device, relative."""
    known = costs(table, template.layers, candidates)
    generator = np.random.default_rng(3)
    errors = []
    for _ in range(count):
        plan = {name: int(generator.choice(widths)) for name, widths in candidates.items()}
        truth = true_ms(FakeRuntime(**FINE), template, plan)
        errors.append(abs(predict_ms(known, candidates, plan) / truth - 1))
    return np.array(errors)


@pytest.mark.parametrize("make", [templates.residual, templates.depthwise])
def test_a_sweep_predicts_plans_it_never_saw(tmp_path, make):
    template, candidates = subject(make)
    runtime = FakeRuntime(**FINE)
    place = place_of(template, runtime, tmp_path / "table.json")

    table = sweep(place, Goal(candidates=candidates), empty_table(runtime))

    assert np.median(errors_on_random_plans(table, template, candidates)) < 0.03


def test_a_noisy_device_is_predicted_within_its_noise(tmp_path):
    template, candidates = subject()
    noisy = FakeRuntime(noise=0.03, seed=1, **FINE)
    place = place_of(template, noisy, tmp_path / "table.json")

    table = sweep(place, Goal(candidates=candidates, builds=16), empty_table(noisy))

    assert np.median(errors_on_random_plans(table, template, candidates)) < 0.03


def test_a_sweep_killed_half_way_keeps_what_it_measured_and_goes_on(tmp_path):
    template, candidates = subject()
    path, goal = tmp_path / "table.json", Goal(candidates=candidates, builds=9)
    failing, whole = CountingRuntime(fail_at=6), CountingRuntime()
    with pytest.raises(BuildError):
        sweep(place_of(template, failing, path), goal, empty_table(failing))
    kept = load_table(path)

    resumed = sweep(place_of(template, whole, path), goal, kept)

    assert len(kept.variants) == 5
    assert whole.profiled == 4
    straight = sweep(place_of(template, whole, tmp_path / "other.json"), goal, empty_table(whole))
    assert [v.widths for v in resumed.variants] == [v.widths for v in straight.variants]
    assert resumed.entries == straight.entries


def test_a_second_sweep_builds_nothing_whatever_widths_are_wanted(tmp_path):
    template, candidates = subject()
    runtime, path = CountingRuntime(), tmp_path / "table.json"
    place = place_of(template, runtime, path)
    table = sweep(place, Goal(candidates=candidates), empty_table(runtime))
    built = runtime.profiled

    again = sweep(place, Goal(candidates=candidates), load_table(path))
    finer = {name: tuple(range(min(w), max(w) + 1, 2)) for name, w in candidates.items()}
    sweep(place, Goal(candidates=finer), load_table(path))

    assert built == len(table.variants) and runtime.profiled == built
    assert again == table


def test_a_sweep_ends_when_its_last_predictions_were_close(tmp_path):
    template, candidates = subject()
    fine, coarse = FakeRuntime(**FINE), FakeRuntime()
    goal = Goal(candidates=candidates, minutes=0.1)

    close, far = (
        sweep(place_of(template, runtime, tmp_path / f"{number}.json"), goal, empty_table(runtime))
        for number, runtime in enumerate((fine, coarse))
    )

    assert LEAST_BUILDS <= len(close.variants) < len(far.variants)
    assert np.median(np.abs(prediction_errors(close, close.variants)[-5:])) <= 0.05


def test_more_minutes_measure_more_and_count_those_before(tmp_path, monkeypatch):
    template, candidates = subject()
    runtime, path = CountingRuntime(), tmp_path / "table.json"
    monkeypatch.setattr("hardware.latency.sweep.CLOSE", 0.0)  # only the time ends a sweep
    # A clock that stands still but for four seconds per variant.
    monkeypatch.setattr("hardware.latency.sweep.time.monotonic", lambda: 4.0 * runtime.profiled)
    place = place_of(template, runtime, path)

    counts = []
    table = empty_table(runtime)
    for minutes in (1.0, 1.0, 2.0, 1.5, 2.0, 3.0):
        table = sweep(place, Goal(candidates=candidates, minutes=minutes), table)
        counts.append(len(table.variants))

    assert counts == [16, 16, 32, 32, 32, 48]
    assert runtime.profiled == 48 and load_table(path) == table


def test_a_sweep_whose_time_is_up_still_measures_enough_to_start_from(tmp_path):
    template, candidates = subject()
    noisy = FakeRuntime(noise=0.3)
    place = place_of(template, noisy, tmp_path / "table.json")

    table = sweep(place, Goal(candidates=candidates, minutes=1e-6), empty_table(noisy))

    assert len(table.variants) == LEAST_BUILDS


def test_a_related_network_needs_no_more_than_the_least(tmp_path):
    template, candidates = subject()
    runtime, path = CountingRuntime(), tmp_path / "table.json"
    place = place_of(template, runtime, path)
    table = sweep(place, Goal(candidates=candidates), empty_table(runtime))
    template, candidates = subject(lambda: templates.residual(blocks=3))
    runtime.profiled = 0

    table = sweep(place_of(template, runtime, path), Goal(candidates=candidates), table)

    assert 0 < runtime.profiled <= LEAST_BUILDS
    assert np.median(errors_on_random_plans(table, template, candidates)) < 0.03


def test_a_sweep_covers_emptied_branches_and_both_ends(tmp_path):
    template, candidates = subject()
    runtime = FakeRuntime()
    place = place_of(template, runtime, tmp_path / "table.json")

    table = sweep(place, Goal(candidates=candidates, builds=5), empty_table(runtime))

    widths = [variant.widths for variant in table.variants]
    assert template.complete({}) in widths
    assert {name: min(w for w in ws if w) for name, ws in candidates.items()} in widths
    for branch in template.channels.branches:
        assert any(all(w[group] == 0 for group in branch.groups) for w in widths)


def test_a_network_with_few_variants_is_swept_to_its_end(tmp_path):
    template, _ = subject(lambda: templates.residual(blocks=1))
    candidates = {"inner0": (0, 32), "stream": (32,), "wide": (64,)}
    noisy = FakeRuntime(noise=0.5)
    place = place_of(template, noisy, tmp_path / "table.json")

    table = sweep(place, Goal(candidates=candidates, minutes=1000), empty_table(noisy))

    assert {variant.widths["inner0"] for variant in table.variants} == {0, 32}
    assert len(table.variants) == 2


class NeighbourlyRuntime(FakeRuntime):
    """The imagined device with a neighbour who keeps a core busy from some reading on."""

    def __init__(self, since):
        super().__init__(**FINE)
        self.since, self.readings, self.foreign_s = since, 0, 0.0

    def counters(self):
        self.readings += 1  # a second passes between two readings
        self.foreign_s += self.readings > self.since
        return Counters(wall_s=float(self.readings), foreign_s=self.foreign_s)


@pytest.mark.parametrize(("since", "is_told"), [(0, True), (10**6, False)])
def test_a_table_that_was_measured_beside_others_says_so(tmp_path, caplog, since, is_told):
    template, candidates = subject(lambda: templates.residual(blocks=1))
    runtime = NeighbourlyRuntime(since)
    place = place_of(template, runtime, tmp_path / "table.json")

    table = sweep(place, Goal(candidates=candidates, builds=6), empty_table(runtime))

    assert all(v.disturbance.is_disturbed is is_told for v in table.variants)
    assert ("Others used this device while 6 of 6" in caplog.text) is is_told


def test_a_measured_plan_enters_the_table_with_what_was_predicted(tmp_path):
    template, candidates = subject()
    runtime = FakeRuntime(outside_us=7.0, **FINE)
    place = place_of(template, runtime, tmp_path / "table.json")
    table = sweep(place, Goal(candidates=candidates, builds=12), empty_table(runtime))
    widths = {"inner0": 12, "stream": 20}

    planned, variant = measure(place, widths, table)

    assert planned.holds(template.digest, template.complete(widths))
    assert all(layer.key_at(widths) in planned.by_key for layer in template.layers)
    assert variant.end_to_end.median_ms == pytest.approx((variant.sum_us + 7.0) / 1000, rel=1e-4)
    assert variant.full_ms == pytest.approx(true_ms(runtime, template, {}))
    assert variant.purpose == "plan"
    assert variant.predicted_ms == pytest.approx(variant.end_to_end.median_ms, rel=0.05)


class SilentRuntime(FakeRuntime):
    """The imagined device with a profiler that says nothing took any time."""

    def build(self, model, settings, *, profile=False):
        engine = super().build(model, settings, profile=profile)
        told = tuple(replace(cost, time_us=0.0) for cost in engine.costs)
        engine.node_times = lambda feeds, runs: told
        return engine


def test_a_profiler_that_says_nothing_took_time_is_an_error(tmp_path):
    template, candidates = subject()
    runtime = SilentRuntime()
    place = place_of(template, runtime, tmp_path / "table.json")

    with pytest.raises(RunError, match="none of 8 layers took any time"):
        sweep(place, Goal(candidates=candidates), empty_table(runtime))


def test_the_digest_tells_structure_and_not_weights():
    template, _ = templates.residual()
    other, _ = templates.residual()
    other.graph.initializer[0].raw_data = bytes(len(other.graph.initializer[0].raw_data))

    assert digest_of(other) == digest_of(template)
    assert digest_of(templates.residual(blocks=3)[0]) != digest_of(template)


def test_a_spinning_process_beside_a_real_runtime_is_recorded(tmp_path):
    pytest.importorskip("onnxruntime")
    template, _ = subject(lambda: templates.residual(blocks=1))
    runtime = get_runtime("ort")
    place = place_of(template, runtime, tmp_path / "table.json")
    long = Protocol(
        warmup_s=0.01, min_samples=10, max_samples=10**5, max_seconds=0.6, relative_width=1e-9
    )
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        while psutil.Process(spinning.pid).cpu_times().user < 0.05:  # it has started
            pass
        _, variant = measure(place, {}, empty_table(runtime), protocol=long)
    finally:
        spinning.kill()
        spinning.wait()

    assert variant.disturbance.is_disturbed
    assert variant.end_to_end.disturbed > 0


@pytest.mark.runtime
@pytest.mark.parametrize("name", sorted(set(RUNTIMES) - {"fake"}))
def test_every_layer_of_a_real_runtime_is_found(name, tmp_path):
    template, _ = subject(lambda: templates.residual(size=32))
    try:
        runtime = get_runtime(name)
    except RuntimeMissingError as error:
        pytest.skip(str(error))
    place = place_of(template, runtime, tmp_path / "table.json")
    table = empty_table(runtime)

    for widths in ({}, {"inner0": 8, "stream": 16}, {"inner1": 0}):
        table, variant = measure(place, widths, table, protocol=QUICK)
        spent = zip(variant.entries, variant.times_us, strict=True)
        executed = [(table.entries[index].key, us) for index, us in spent]
        # Every convolution that is not emptied took time, and nothing is counted twice.
        assert all(us > 0 for key, us in executed if key.operator == "Conv")
        assert len(executed) <= len(template.layers)
    assert len(table.variants) == 3
