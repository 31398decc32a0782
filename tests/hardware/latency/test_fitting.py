"""What one kind of layer takes at widths that were not measured, or measured once."""

from math import ceil

import numpy as np
import pytest

from hardware.latency.fitting import fit_families, settled_us
from hardware.latency.layers import LayerKey
from hardware.latency.table import Entry

ODD, DEARER = 56, 1.15  # seven blocks of eight do not divide among two threads
WIDTHS = range(8, 65, 8)


def conv(inputs, outputs, thinned=False):
    return LayerKey(
        operator="Conv",
        in_channels=inputs,
        out_channels=outputs,
        kernel=(3, 3),
        in_size=(8, 8),
        out_size=(8, 8),
        thinned=thinned,
    )


def exact_us(key):
    blocks = ceil(key.in_channels / 8) * ceil(key.out_channels / 8)
    return (2 + 3 * blocks) * (DEARER if key.out_channels == ODD else 1.0)


def entry(key, time_us, builds=1):
    return Entry(key=key, median_us=time_us, mad_us=0.0, samples=9, builds=builds)


def measured(pairs, scatter=0.0):
    generator = np.random.default_rng(0)
    keys = [conv(inputs, outputs) for inputs, outputs in pairs]
    return [entry(key, exact_us(key) * np.exp(scatter * generator.normal())) for key in keys]


def some_pairs(of_odd, seed=0):
    generator = np.random.default_rng(seed)
    pairs = [(a, b) for a in WIDTHS for b in WIDTHS if b != ODD]
    chosen = generator.permutation(len(pairs))[:32]
    return [pairs[i] for i in chosen] + [(a, ODD) for a in of_odd]


def test_a_width_that_takes_longer_does_so_beside_widths_it_was_not_measured_with():
    entries = measured(some_pairs(of_odd=(8, 24, 40, 64)), scatter=0.005)
    model = fit_families({entries[0].key.kind: entries})[entries[0].key.kind]

    unseen = [conv(inputs, ODD) for inputs in (16, 32, 48, 56)]
    others = [conv(inputs, outputs) for inputs in WIDTHS for outputs in WIDTHS if outputs != ODD]

    for keys in (unseen, others):
        true_us = np.array([exact_us(key) for key in keys])
        assert np.median(np.abs(model.predict(keys) / true_us - 1)) < 0.02


def test_what_was_measured_once_is_believed_half_and_what_was_measured_often_almost_all():
    entries = measured(some_pairs(of_odd=()))
    off = conv(40, 48)
    rest = [one for one in entries if one.key != off]
    kind = off.kind

    shares = []
    for builds in (1, 9):
        wrong = entry(off, 1.2 * exact_us(off), builds)
        expected_us = fit_families({kind: rest})[kind].predict([off])[0]
        told_us = settled_us([*rest, wrong], fit_families({kind: rest}))[-1]
        shares.append(np.log(told_us / expected_us) / np.log(wrong.median_us / expected_us))

    assert shares == pytest.approx([1 / 2, 9 / 10])


def test_few_measurements_of_a_kind_and_thinned_layers_are_believed():
    few = measured([(8, 8), (16, 16), (24, 64), (64, 8)])
    thinned = entry(conv(8, 8, thinned=True), 3.0)
    many = [*measured(some_pairs(of_odd=())), thinned]

    kept = settled_us(few, fit_families({few[0].key.kind: few}))
    all_kept = settled_us(many, fit_families({many[0].key.kind: many}))

    assert kept == pytest.approx([one.median_us for one in few])
    assert all_kept[-1] == thinned.median_us
