import gc
import itertools
import math
import time
from collections import Counter
from dataclasses import replace

import pytest

from hardware.errors import RunError
from hardware.records import load_record, save_record
from hardware.timing import (
    FILL_CALLS,
    FILL_MS,
    WINDOW_S,
    Latency,
    Protocol,
    Series,
    fill_caches,
    ratio,
    time_together,
    timer_of,
    warm_up,
)

QUICK = Protocol(warmup_s=0.2, min_samples=20, max_samples=60, max_seconds=2.0)


def quiet() -> float:
    return 0.0


def constant(milliseconds: float):
    return lambda calls: milliseconds


def series(samples, interrupted=(), shared=()) -> Series:
    marks = [tuple(i in bad for i in range(len(samples))) for bad in (interrupted, shared)]
    return Series(samples_ms=tuple(samples), interrupted=marks[0], shared=marks[1])


def test_steady_runs_stop_at_the_fewest_rounds_with_exact_medians():
    a, b = time_together([constant(2.0), constant(3.0)], QUICK, foreign_s=quiet)

    assert len(a.samples_ms) == len(b.samples_ms) == QUICK.min_samples
    assert (a.latency.median_ms, b.latency.median_ms) == (2.0, 3.0)
    assert ratio(b, a).estimate == 1.5


def test_noisy_runs_go_on_until_the_cap():
    noise = itertools.cycle([1.0, 5.0])

    (found,) = time_together([lambda calls: next(noise)], QUICK, foreign_s=quiet)

    assert len(found.samples_ms) == QUICK.max_samples


def test_sampling_stops_when_the_interval_is_tight_enough():
    # One sample in ten is slow: the median's interval closes on the fast value after a few rounds.
    noise = itertools.cycle([1.0] * 9 + [9.0])
    (found,) = time_together([lambda calls: next(noise)], QUICK, foreign_s=quiet)

    assert len(found.samples_ms) < QUICK.max_samples
    assert found.interval.relative_width <= QUICK.relative_width


def test_sampling_stops_when_the_time_is_spent():
    protocol = Protocol(warmup_s=0.0, max_samples=10_000, max_seconds=0.3, relative_width=0.0)
    noise = itertools.cycle([1.0, 2.0])

    def sleepy(calls: int) -> float:
        time.sleep(0.002)
        return next(noise)

    (found,) = time_together([sleepy], protocol, foreign_s=quiet)

    assert protocol.min_samples <= len(found.samples_ms) <= 0.3 / 0.002 + 1


def test_every_round_times_every_run_once_in_varying_order():
    order: list[str] = []

    def recording(name: str, milliseconds: float):
        def timer(calls: int) -> float:
            order.append(name)
            return milliseconds

        return timer

    once = replace(QUICK, fill_calls=1)
    time_together([recording(name, 1.0) for name in "abc"], once, foreign_s=quiet)
    sampled = order[-6 * QUICK.min_samples :]
    assert sampled[::2] == sampled[1::2]  # each is run untimed before it is timed
    rounds = [tuple(sampled[i : i + 6 : 2]) for i in range(0, len(sampled), 6)]

    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1


def test_the_first_inference_after_another_run_is_not_timed():
    last = {"name": ""}

    def cold_after_others(name: str):
        def timer(calls: int) -> float:
            was, last["name"] = last["name"], name
            return 1.0 if was == name else 3.0

        return timer

    a, b = time_together([cold_after_others("a"), cold_after_others("b")], QUICK, foreign_s=quiet)

    assert set(a.samples_ms) == set(b.samples_ms) == {1.0}


def test_the_order_follows_the_seed():
    def orders(seed: int) -> list[int]:
        order: list[int] = []
        timers = [lambda calls, i=i: order.append(i) or 1.0 for i in range(3)]
        time_together(timers, QUICK, seed=seed, foreign_s=quiet)
        return order

    assert orders(5) == orders(5)
    assert orders(5) != orders(6)


def test_a_slow_down_that_hits_all_alike_leaves_the_ratio():
    turn = itertools.count(1)

    def slowing(base: float):
        def timer(calls: int) -> float:
            return base * (1 + 0.001 * next(turn))

        return timer

    once = replace(QUICK, fill_calls=1)
    a, b = time_together([slowing(1.0), slowing(2.0)], once, foreign_s=quiet)

    assert a.samples_ms[-1] > 1.03 * a.samples_ms[0]
    # Two samples of one round lie two steps of 0.1 % apart, in either order.
    assert ratio(b, a).estimate == pytest.approx(2.0, rel=2.2e-3)


def test_very_short_runs_are_repeated_within_a_sample():
    calls_seen = []

    def short(calls: int) -> float:
        calls_seen.append(calls)
        return 0.004  # ms, twelve and a half of which make the 50 us a sample must last

    (found,) = time_together([short], QUICK, foreign_s=quiet)

    assert found.calls == 13
    assert calls_seen[-1] == 13


def test_warm_up_goes_on_while_the_run_gets_faster():
    times = itertools.chain([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0], itertools.repeat(1.0))
    seen = []

    def warming(calls: int) -> float:
        seen.append(next(times))
        return seen[-1]

    first_ms, now_ms = warm_up(warming, QUICK.warmup_s)

    assert (first_ms, now_ms) == (8.0, 1.0)
    # The first two blocks of three whose medians agree are (2, 1, 1) and (1, 1, 1).
    assert seen[6:] == [2.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_a_run_that_never_becomes_stable_is_warm_after_its_time():
    seen = []
    noise = itertools.cycle([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])

    def restless(calls: int) -> float:
        seen.append(next(noise))
        return seen[-1]

    warm_up(restless, 0.015)

    assert sum(seen[1:]) == 15.0  # ms; what the first inference takes is another matter
    seen.clear()
    warm_up(restless, 0.0)
    assert len(seen) == 1


def test_the_caches_hold_an_engine_after_so_much_time_or_so_many_inferences():
    def untimed(milliseconds: float) -> int:
        calls = []
        fill_caches(lambda count: calls.append(count) or milliseconds)
        return sum(calls)

    assert untimed(1.0) == FILL_CALLS
    assert untimed(FILL_MS / 2) == 2
    assert untimed(FILL_MS * 9) == 1


def test_the_garbage_collector_rests_while_timing_and_wakes_after():
    states = []
    time_together([lambda calls: states.append(gc.isenabled()) or 1.0], QUICK, foreign_s=quiet)

    assert not any(states)
    assert gc.isenabled()


def test_the_garbage_collector_wakes_after_a_failure():
    def failing(calls: int) -> float:
        raise RunError("the engine broke")

    with pytest.raises(RunError, match="the engine broke"):
        time_together([failing], QUICK, foreign_s=quiet)

    assert gc.isenabled()


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_timer_must_return_a_time(bad):
    with pytest.raises(RunError, match="must be positive and finite"):
        time_together([constant(bad)], QUICK, foreign_s=quiet)


def test_a_busy_neighbour_marks_the_samples_of_its_time_and_no_others():
    used = {"s": 0.0}
    rounds = itertools.count()
    protocol = Protocol(warmup_s=0.0, min_samples=40, max_samples=40, max_seconds=60)

    def run(calls: int) -> float:
        start = time.monotonic()
        time.sleep(WINDOW_S / 8)
        if 10 <= next(rounds) < 20:
            used["s"] += time.monotonic() - start  # one processor, all the time
        return 1.0

    (found,) = time_together([run], protocol, foreign_s=lambda: used["s"])

    assert all(found.shared[12:17])  # a window is eight rounds at most
    assert not any(found.shared[28:])
    assert len(found.samples_ms) == 40


def test_a_neighbour_is_noticed_in_a_measurement_shorter_than_a_window():
    used = {"s": 0.0}
    protocol = Protocol(warmup_s=0.0, min_samples=10, max_samples=10, max_seconds=60)

    def run(calls: int) -> float:
        start = time.monotonic()
        time.sleep(WINDOW_S / 15)
        used["s"] += time.monotonic() - start
        return 1.0

    (found,) = time_together([run], protocol, foreign_s=lambda: used["s"])

    assert all(found.shared)


def test_engines_of_one_run_take_turns_and_each_fills_the_caches_itself():
    calls = []

    def timer(name, milliseconds):
        return lambda count: calls.append(name) or milliseconds

    one, other = time_together(
        [[timer("a", 1.0), timer("b", 2.0)], timer("c", 4.0)],
        replace(QUICK, fill_ms=3.5, fill_calls=3),
        foreign_s=quiet,
    )

    rounds = len(one.samples_ms)
    assert one.samples_ms == (1.0, 2.0) * (rounds // 2)
    assert set(other.samples_ms) == {4.0}
    # In two rounds a has three untimed inferences (three at most), b two, c twice one (3.5 ms or
    # more), and each run its samples.
    taken = Counter(calls[-11 * (rounds // 2) :])
    assert taken == Counter(a=4 * (rounds // 2), b=3 * (rounds // 2), c=4 * (rounds // 2))


def test_a_run_that_loses_the_processor_is_marked():
    turns: list[bool] = []

    def spinning(calls: int) -> float:
        turns.append(len(turns) % 5 == 4)
        start = time.process_time()
        while time.process_time() - start < 0.003:  # even when others keep the processor busy
            pass
        if turns[-1]:
            time.sleep(0.01)  # as if another process ran
        return 1.0

    (found,) = time_together([spinning], QUICK, foreign_s=quiet)
    slept = turns[-len(found.samples_ms) :]

    assert all(marked for marked, gone in zip(found.interrupted, slept, strict=True) if gone)


def test_disturbed_samples_are_kept_but_not_trusted_while_others_suffice():
    found = series([1.0] * 12 + [7.0] * 20, shared=range(12, 32))

    assert len(found.samples_ms) == 32
    assert found.latency.median_ms == 1.0
    assert (found.latency.samples, found.latency.disturbed) == (12, 20)


def test_samples_beside_others_are_trusted_before_interrupted_ones():
    found = series([2.0] * 12 + [7.0] * 20, interrupted=range(12, 32), shared=range(32))

    assert found.latency.median_ms == 2.0


def test_all_samples_count_when_too_few_are_clean():
    found = series([1.0] * 5 + [7.0] * 20, interrupted=range(5, 25), shared=range(5, 25))

    assert found.latency.median_ms == 7.0
    assert (found.latency.samples, found.latency.disturbed) == (25, 20)


def test_a_round_disturbed_for_one_run_counts_for_neither():
    a = series([2.0] * 20 + [50.0] * 12, interrupted=range(20, 32))
    b = series([1.0] * 32)

    assert ratio(a, b).estimate == 2.0


def test_runs_not_timed_together_have_no_ratio():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ratio(series([1.0] * 20), series([1.0] * 19))


def test_progress_is_reported_and_ends_at_one():
    reported = []
    time_together(
        [constant(1.0)],
        QUICK,
        progress=lambda done, text: reported.append((done, text)),
        foreign_s=quiet,
    )

    assert all(0 <= done <= 1 for done, _ in reported)
    assert reported[-1] == (1.0, f"{QUICK.min_samples} rounds")


def test_a_plain_function_is_timed_per_call():
    per_call = timer_of(lambda: time.sleep(0.002))(5)

    assert per_call >= 2.0


def test_nothing_to_time_gives_nothing():
    assert time_together([], QUICK, foreign_s=quiet) == ()


def test_too_few_samples_for_the_confidence_are_refused():
    with pytest.raises(
        ValueError, match=r"confidence of 0.99 needs at least 8 samples; got min_sam"
    ):
        Protocol(confidence=0.99, min_samples=7)


@pytest.mark.parametrize(
    "wrong", [{"median_ms": 0.0}, {"median_ms": math.nan}, {"mad_ms": -1.0}, {"samples": 0}]
)
def test_an_impossible_latency_is_refused(wrong):
    right = {"median_ms": 2.0, "low_ms": 1.0, "high_ms": 3.0, "mad_ms": 0.1, "samples": 9}

    with pytest.raises(ValueError, match="Latency needs median > 0"):
        Latency(**(right | wrong))


def test_a_median_outside_its_interval_is_refused():
    with pytest.raises(ValueError, match="median must lie in its interval"):
        Latency(median_ms=4.0, low_ms=1.0, high_ms=3.0, mad_ms=0.1, samples=9)


def test_a_latency_survives_save_and_load(tmp_path):
    latency = series([1.0, 2.0, 3.0]).latency  # too few samples: the interval is open above
    save_record(latency, tmp_path / "latency.json")

    assert load_record(Latency, tmp_path / "latency.json") == latency
    assert latency.high_ms == math.inf


def test_a_latency_of_an_older_file_is_read(tmp_path):
    latency = series([1.0] * 20, shared=range(3)).latency
    save_record(latency, tmp_path / "latency.json")
    old = (tmp_path / "latency.json").read_text().replace("disturbed", "tainted")
    (tmp_path / "latency.json").write_text(old)

    assert load_record(Latency, tmp_path / "latency.json") == latency
    assert latency.disturbed == 3
