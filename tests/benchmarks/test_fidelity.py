import sys

import pytest

from benchmarks.fidelity import __main__ as fidelity
from benchmarks.fidelity.isolated import IsolatedTable, layer_model
from benchmarks.fidelity.judge import judge
from benchmarks.fidelity.measure import PLANS, TABLE
from benchmarks.fidelity.records import errors_of, load_kept, save_kept
from benchmarks.fidelity.subjects import NETWORKS, held_out
from hardware.latency.layers import LayerKey, macs_of
from hardware.latency.table import load_table
from hardware.latency.template_layers import layers_of
from hardware.records import load_record
from hardware.runtimes.base import EngineSettings
from hardware.runtimes.fake import FakeRuntime
from pipeline.recipe import ModelSection
from tests.hardware import templates

TINY = ModelSection(
    name="benchmarks.networks:digits_resnet",
    arguments={"width": 8, "blocks": 1},
    input_shape=(1, 16, 16),
)
EVERY_GROUP = {"stream": (4, 16, 32), "inner0": (0, 4, 32), "inner1": (0, 4, 32), "wide": (8, 64)}


def test_errors_are_percent_of_what_was_measured_and_the_bias_keeps_its_sign() -> None:
    found = errors_of([0.9, 1.0, 2.2, 4.4], [1.0, 1.0, 2.0, 4.0])

    assert (found.median_pct, found.worst_pct) == (10.0, 10.0)
    assert found.bias_pct == 5.0
    assert found.p95_pct == pytest.approx(10.0)


def test_held_out_plans_draw_every_width_and_end_with_uniform_ones() -> None:
    _, channels = templates.residual()

    plans = held_out(EVERY_GROUP, channels, count=60, seed=0)

    random = [widths for name, widths in plans if name == "random"]
    assert len(random) == 60
    for group, widths in EVERY_GROUP.items():
        assert {plan[group] for plan in random} == set(widths)
    assert [name for name, _ in plans[60:]] == ["25% of all", "50% of all", "75% of all"]
    assert plans[61][1] == {"stream": 16, "inner0": 4, "inner1": 4, "wide": 8}


@pytest.mark.parametrize(
    "key",
    [
        LayerKey(operator="Conv", in_channels=3, out_channels=8, kernel=(7, 7), strides=(2, 2),
                 in_size=(32, 32), out_size=(16, 16)),
        LayerKey(operator="Conv", in_channels=6, out_channels=6, kernel=(3, 3), conv_groups=6,
                 in_size=(8, 8), out_size=(8, 8)),
        LayerKey(operator="Conv", in_channels=4, out_channels=5, kernel=(3, 3), dilations=(2, 2),
                 in_size=(9, 9), out_size=(9, 9)),
        LayerKey(operator="Gemm", in_channels=12, out_channels=10),
    ],
)  # fmt: skip
def test_a_layer_alone_has_the_sizes_of_its_key(key) -> None:
    engine = FakeRuntime().build(layer_model(key), EngineSettings())

    (output,) = engine.run(engine.random_feeds()).values()

    assert output.shape == (1, key.out_channels, *key.out_size)


def test_layers_that_no_network_of_one_layer_can_show_are_refused() -> None:
    key = LayerKey(operator="Conv", in_channels=3, out_channels=8, kernel=(3, 3), in_size=(8, 8),
                   out_size=(99, 99))  # fmt: skip

    with pytest.raises(ValueError, match="not a MaxPool"):
        layer_model(LayerKey(operator="MaxPool", in_channels=3, out_channels=3))
    with pytest.raises(ValueError, match="No symmetric padding"):
        layer_model(key.model_copy(update={"kernel": (4, 4), "out_size": (8, 8)}))


def test_isolated_layers_are_measured_once_and_added() -> None:
    template, channels = templates.residual()
    layers = layers_of(template, channels)
    # Each layer alone costs 2 us as a node, 5 us around it, and its padded multiply-adds.
    alone = IsolatedTable(FakeRuntime(us_per_mac=0.0), EngineSettings())

    whole_ms = alone.sum_ms(layers, {})
    emptied_ms = alone.sum_ms(layers, {"inner0": 0, "inner1": 0})

    assert whole_ms == pytest.approx(7 * 0.007)  # stem, two of each block, strided one, linear
    assert emptied_ms == pytest.approx(3 * 0.007)
    assert len(alone.known_ms) == 4  # the blocks' four convolutions are one key
    assert macs_of(layers, {}) > macs_of(layers, {"inner0": 0})


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of one measured case, on the imagined device."""
    folder = tmp_path_factory.mktemp("fidelity")
    words = ["fidelity", "measure", "--network", "tiny", "--runtime", "fake", "--plans", "4"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(NETWORKS, "tiny", TINY)
        patched.setattr(sys, "argv", [*words, "--isolated", "--keep", str(folder)])
        fidelity.main()
    return folder / "tiny-fake-t1"


def test_what_was_measured_is_judged_without_measuring_and_always_the_same(kept) -> None:
    found = judge(kept)

    assert found.builds == len(load_table(kept / TABLE).variants)
    assert found.table.median_pct < 2.0 < found.macs.median_pct
    assert found.isolated is not None and found.isolated.median_pct > found.table.median_pct
    assert found.repeated.worst_pct == 0.0
    assert judge(kept) == found


def test_a_shorter_sweep_is_judged_from_the_same_files(kept) -> None:
    assert judge(kept, builds=6).builds == 6
    assert judge(kept, builds=6).table.p95_pct >= judge(kept).table.p95_pct


def test_a_case_that_is_there_is_not_measured_again(kept, monkeypatch, capsys) -> None:
    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    monkeypatch.setattr(FakeRuntime, "build", None)
    words = ["fidelity", "measure", "--network", "tiny", "--runtime", "fake"]
    monkeypatch.setattr(sys, "argv", [*words, "--keep", str(kept.parent)])

    fidelity.main()

    assert "tiny" in capsys.readouterr().out


def test_judging_a_folder_writes_every_case(kept, tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["fidelity", "judge", str(kept.parent), "--json", str(path)])

    fidelity.main()

    (case,) = load_record(fidelity.Judgements, path).cases
    assert case == judge(kept)
    assert "mean over 1 cases" in capsys.readouterr().out


def test_kept_plans_survive_save_and_load(kept, tmp_path) -> None:
    found = load_kept(kept / PLANS)

    save_kept(found, tmp_path / PLANS)

    assert load_kept(tmp_path / PLANS) == found
    assert [len(plan.passes) for plan in found.plans] == [2, 1, 1, 2, 1, 1, 2]


def test_a_folder_without_cases_says_how_to_make_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fidelity", "judge", str(tmp_path)])

    with pytest.raises(SystemExit, match="fidelity measure"):
        fidelity.main()
