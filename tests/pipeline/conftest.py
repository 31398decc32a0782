"""A report as a run of a ResNet-20 would give it, every number by arithmetic."""

import pytest

from hardware.device import Device
from hardware.graph.channel_map import Branch, ChannelMap, FrozenAxis, Group, ParameterSlice
from hardware.latency.layers import Layer, LayerKey
from pipeline.records import Choice, EpochRecord, Floor, Plan, Verdict
from pipeline.report.report import LayerRow, Report

STREAM = "conv1.weight"
BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]
FULL = {f"{block}.conv1.weight": 2 ** (3 + int(block[5])) for block in BLOCKS}
# One group per reason at least; the two blocks at width 0 are emptied.
KEPT = dict(zip(FULL, (8, 0, 16, 32, 16, 0, 48, 32, 16), strict=True))
REASONS = dict(
    zip(
        FULL,
        (
            ("saliency", "the next narrower width, 4, costs 0.031 of the loss and saves 5.1 µs"),
            ("emptied", "the branch takes 45.2 µs; emptying it costs 0.012 of the loss"),
            (
                "no measured gain below",
                "at 12 channels the group takes 45.3 µs, at 16 it takes 45.2 µs",
            ),
            (
                "saliency",
                "the first block of a stage: every narrower width costs more than it saves",
            ),
            ("saliency", "16 is the right edge of a stair: 20 channels take 10.1 µs more"),
            ("emptied", "the branch takes 38.0 µs; emptying it costs 0.009 of the loss"),
            ("redundancy floor", "48 of 64 filters are needed to cover the others"),
            ("saliency", "32 is the right edge of a stair: 40 channels take 7.2 µs more"),
            ("redundancy floor", "the solver would have gone to 8"),
        ),
        strict=True,
    )
)
FLOORS = dict(zip(FULL, (4, 4, 6, 12, 8, 8, 48, 24, 16), strict=True))
FROZEN = "Pad at node_pad_1 adds a fixed number of channels <16> & cannot follow"


def _slice(parameter: str, role: str, width: int, axis: int = 0) -> ParameterSlice:
    return ParameterSlice(parameter=parameter, axis=axis, role=role, units=tuple(range(width)))


def _groups() -> tuple[Group, ...]:
    seconds = [f"{block}.conv2.weight" for block in BLOCKS[:3]]
    stream = Group(
        name=STREAM,
        width=16,
        slices=tuple(_slice(name, "filter", 16) for name in (STREAM, *seconds)),
        frozen=FROZEN,
    )
    inner = (
        Group(
            name=name,
            width=width,
            slices=(
                _slice(name, "filter", width),
                _slice(name.replace("conv1", "bn1"), "norm", width),
                _slice(name.replace("conv1", "conv2"), "input", width, axis=1),
            ),
        )
        for name, width in FULL.items()
    )
    return (stream, *inner)


@pytest.fixture(scope="session")
def channels() -> ChannelMap:
    return ChannelMap(
        groups=_groups(),
        branches=tuple(
            Branch(
                name=block,
                groups=(f"{block}.conv1.weight",),
                layers=(f"{block}.conv1", f"{block}.conv2"),
                join=f"{block}.add",
                parameters=(f"{block}.conv1.weight", f"{block}.conv2.weight"),
            )
            for block in BLOCKS
            if block not in ("layer2.0", "layer3.0")
        ),
        frozen=(FrozenAxis(parameter="fc.weight", channels=10, reason="network output"),),
        unknown_operators={"com.vendor::FancyPool": 2},
    )


def _convolutions() -> list[tuple[str, str | None, str | None, int, int, int]]:
    """Name, group at the input, group at the output, channels in and out, output size."""
    rows: list[tuple[str, str | None, str | None, int, int, int]] = [
        ("conv1", None, STREAM, 3, 16, 32)
    ]
    width = 16
    for block in BLOCKS:
        stage = int(block[5])
        out, size = 2 ** (3 + stage), 2 ** (6 - stage)
        group = f"{block}.conv1.weight"
        rows.append((f"{block}.conv1", None, group, width, out, size))
        rows.append((f"{block}.conv2", group, None, out, out, size))
        width = out
    return rows


@pytest.fixture(scope="session")
def layers() -> tuple[Layer, ...]:
    return tuple(
        Layer(
            name=name,
            key=LayerKey(
                operator="Conv",
                in_channels=before,
                out_channels=out,
                kernel=(3, 3),
                out_size=(size, size),
            ),
            in_parts={source: 1} if source else {},
            in_fixed=0 if source else before,
            out_parts={group: 1} if group else {},
            out_fixed=0 if group else out,
        )
        for name, source, group, before, out, size in _convolutions()
    )


def _layer_rows() -> tuple[LayerRow, ...]:
    rows = []
    for name, source, group, before, out, size in _convolutions():
        block = name.rpartition(".")[0]
        gone = KEPT.get(f"{block}.conv1.weight") == 0
        kept_in = KEPT.get(source or "", before)
        kept_out = 0 if gone else KEPT.get(group or "", out)
        macs = 9 * size * size
        rows.append(
            LayerRow(
                layer=name,
                operator="Conv",
                in_before=before,
                in_after=kept_in,
                out_before=out,
                out_after=kept_out,
                macs_before=macs * before * out,
                macs_after=macs * kept_in * kept_out,
                before_us=7 + macs * before * out / 1.5e5,
                after_us=0 if gone else 7 + macs * kept_in * kept_out / 1.5e5,
                measured=name != "layer3.2.conv2",
            )
        )
    pool = {"in_before": 64, "in_after": 64, "out_before": 64, "out_after": 64}
    head = {"in_before": 64, "in_after": 64, "out_before": 10, "out_after": 10}
    for name, operator, widths, macs in (
        ("pool", "GlobalAveragePool", pool, 0),
        ("fc", "Gemm", head, 640),
    ):
        times = {"before_us": 1.5, "after_us": 1.5, "macs_before": macs, "macs_after": macs}
        rows.append(LayerRow(layer=name, operator=operator, measured=True, **widths, **times))
    return tuple(rows)


@pytest.fixture(scope="session")
def floors() -> tuple[Floor, ...]:
    return tuple(
        Floor(
            group=name,
            width=width,
            floor=FLOORS[name],
            score=1 - FLOORS[name] / width,
            detail=f"{FLOORS[name]} of {width} filters cover the rest; of random ones {width - 1}",
        )
        for name, width in FULL.items()
    )


@pytest.fixture(scope="session")
def plan() -> Plan:
    choices = [
        Choice(
            group=name,
            full=width,
            floor=FLOORS[name],
            width=KEPT[name],
            reason=REASONS[name][0],
            detail=REASONS[name][1],
        )
        for name, width in FULL.items()
    ]
    frozen = Choice(group=STREAM, full=16, floor=16, width=16, reason=f"frozen: {FROZEN}")
    return Plan(
        target_ms=0.2472,
        predicted_ms=0.2431,
        baseline_ms=0.4108,
        gap=0.00042,
        objective="sensitivity",
        value=-0.2173,
        solver_s=0.41,
        measured=True,
        choices=(frozen, *choices),
        keep={name: tuple(range(KEPT[name])) for name in FULL},
    )


@pytest.fixture(scope="session")
def epochs() -> tuple[EpochRecord, ...]:
    return tuple(
        EpochRecord(
            epoch=epoch,
            learning_rate=0.05 * (9 - epoch) / 8,
            train_loss=1.3 - 0.09 * epoch,
            val_loss=0.9 - 0.06 * epoch + (0.05 if epoch == 4 else 0),
            val_accuracy_pct=82 + 9.5 * (1 - 0.6**epoch) - (1.5 if epoch == 4 else 0),
            seconds=31.5,
        )
        for epoch in range(1, 9)
    )


@pytest.fixture(scope="session")
def verdict() -> Verdict:
    return Verdict(
        passed=True,
        reasons=(
            "ok: latency 0.2410 ms, target 0.2472 ms",
            "ok: accuracy drop 0.33 points, allowed 1.00",
            "ok: parity 2.1e-06, allowed 1.0e-03",
            "ok: prediction error +0.9 %, allowed 5.0 %",
        ),
        runtime="ov",
        precision="fp32",
        batch=1,
        threads=1,
        baseline_ms=0.4120,
        baseline_interval_ms=(0.4105, 0.4138),
        target_ms=0.2472,
        measured_ms=0.2410,
        measured_interval_ms=(0.2402, 0.2419),
        predicted_ms=0.2431,
        prediction_error_pct=0.87,
        speedup=0.4120 / 0.2410,
        speedup_interval=(1.698, 1.722),
        baseline_accuracy_pct=91.73,
        accuracy_pct=91.40,
        torch_accuracy_pct=91.41,
        test_images=10_000,
        parity=2.1e-6,
        proof_error=3.4e-16,
        parameters=(269_722, 171_034),
        macs=(40_551_040, 19_612_288),
        engine="build/resnet20/engine/model.xml",
        report="build/resnet20/report.html",
    )


@pytest.fixture(scope="session")
def report(
    channels: ChannelMap,
    floors: tuple[Floor, ...],
    plan: Plan,
    epochs: tuple[EpochRecord, ...],
    verdict: Verdict,
) -> Report:
    return Report(
        title="ResNet-20 on CIFAR-10",
        device=Device(
            name="Intel Xeon Platinum 8481C",
            processor="Intel Xeon Platinum 8481C, family 6, stepping 8",
            architecture="x86_64",
            cores=1,
            threads=2,
            memory_bytes=8 * 2**30,
            system="Linux 6.1.0",
            features=("avx2", "avx512_bf16", "avx512f", "fma"),
        ),
        conditions={
            "governor": "unknown",
            "load": "0.12 over one minute",
            "frequency": "2,700 MHz",
        },
        channels=channels,
        floors=floors,
        plan=plan,
        layers=_layer_rows(),
        loop=((0.2398, 0.2512, 0.2472), (0.2436, 0.2447, 0.2472), (0.2431, 0.2410, 0.2472)),
        epochs=epochs,
        verdict=verdict,
        recipe_yaml="model:\n  name: benchmarks.networks:cifar_resnet\n  arguments: {depth: 20}\n"
        "target:\n  runtime: ov  # <one thread> & batch 1\n  latency_ratio: 0.6\n",
        versions={"espalier-cnn": "0.1.0", "torch": "2.14.1", "openvino": "2026.4.1"},
        command="espalier compress benchmarks/cifar10.yaml --set model.arguments.depth=20",
    )
