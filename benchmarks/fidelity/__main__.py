"""How well a latency table predicts plans that it never saw, beside two other kinds of table.

    python -m benchmarks.fidelity measure --network resnet18 --runtime ov
    python -m benchmarks.fidelity measure --network timm:efficientnet_b0 --runtime ort --threads 2
    python -m benchmarks.fidelity judge [FOLDER] [--builds 12] [--json fidelity.json]

`measure` keeps the swept table and the measured plans (two minutes a network; a case that is there
already is left alone). `judge` predicts from what was kept: it needs no device, takes seconds, and
says the same every time, so a change of the model is judged without measuring anything.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.fidelity.judge import judge
from benchmarks.fidelity.measure import PLANS, Case, measure
from benchmarks.fidelity.records import Errors, Judgement
from benchmarks.fidelity.subjects import NETWORKS, subject_of, template_of
from hardware.device import this_device
from hardware.records import Record, save_record
from hardware.runtimes import RUNTIMES, get_runtime
from hardware.runtimes.base import EngineSettings
from pipeline.report.progress import StageProgress

KEEP = Path("build/fidelity")


class Judgements(Record):
    """What every kept case came to, as it is written to JSON."""

    device: str  # that judged; the cases may come from another
    cases: tuple[Judgement, ...]


def run_measure(options: argparse.Namespace) -> None:
    """Measure one case into its folder."""
    subject, candidates = subject_of(options.network, tuple(options.input_shape))
    case = Case(
        network=options.network,
        runtime=get_runtime(options.runtime),
        settings=EngineSettings(threads=options.threads),
        minutes=options.minutes,
        plans=options.plans,
        seed=options.seed,
        isolated=options.isolated,
    )
    folder = options.keep / case.name
    with (
        StageProgress(Console(stderr=True)) as shown,
        shown.stage(f"Measuring {case.name}") as progress,
    ):
        measure(case, template_of(subject), candidates, folder, progress)
    show([judge(folder)], Console())


def run_judge(options: argparse.Namespace) -> None:
    """Judge every kept case."""
    folders = sorted(path.parent for path in options.folder.glob(f"*/{PLANS}"))
    if not folders:
        sys.exit(
            f"{options.folder} holds no kept case. Make one: python -m benchmarks.fidelity measure"
        )
    found = [judge(folder, options.builds) for folder in folders]
    show(found, Console())
    if options.json is not None:
        save_record(Judgements(device=this_device().name, cases=tuple(found)), options.json)


def show(found: list[Judgement], console: Console) -> None:
    """Print the errors as a table: median and 95th percentile, percent."""
    table = Table(box=None, pad_edge=False)
    for heading in ("network", "runtime", "builds", "s", "table", "bias", "alone", "MACs", "twice"):
        table.add_column(heading, no_wrap=True)
    for one in found:
        table.add_row(
            one.network,
            f"{one.runtime}, {one.threads}",
            str(one.builds),
            f"{one.sweep_s:.0f}",
            _pair(one.table),
            f"{one.table.bias_pct:+.1f}",
            "" if one.isolated is None else _pair(one.isolated),
            _pair(one.macs),
            _pair(one.repeated),
        )
    console.print(table)
    console.print(
        f"mean over {len(found)} cases: median "
        f"{sum(one.table.median_pct for one in found) / len(found):.2f} %, 95th percentile "
        f"{sum(one.table.p95_pct for one in found) / len(found):.2f} %",
        highlight=False,
    )


def _pair(errors: Errors) -> str:
    return f"{errors.median_pct:.1f}, {errors.p95_pct:.1f}"


def main() -> None:
    """Measure a case, or judge those that were measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="sweep a network, measure plans, keep both")
    measuring.add_argument(
        "--network",
        required=True,
        help=f"{', '.join(NETWORKS)}, timm:NAME, torchvision:NAME, or an ONNX file",
    )
    measuring.add_argument("--input-shape", type=int, nargs=3, default=(3, 224, 224))
    measuring.add_argument("--runtime", choices=sorted(RUNTIMES), required=True)
    measuring.add_argument("--threads", type=int, default=1)
    measuring.add_argument("--minutes", type=float, default=1.0, help="of sweeping, at most")
    measuring.add_argument("--plans", type=int, default=20, help="random ones; three more on top")
    measuring.add_argument("--seed", type=int, default=0)
    measuring.add_argument(
        "--isolated", action="store_true", help="time the plans' layers alone, too"
    )
    measuring.add_argument("--keep", type=Path, default=KEEP, help="folder of kept cases")
    measuring.set_defaults(run=run_measure)
    judging = commands.add_parser("judge", help="predict kept plans from kept tables")
    judging.add_argument("folder", type=Path, nargs="?", default=KEEP)
    judging.add_argument("--builds", type=int, help="as if sweeps had ended after so many networks")
    judging.add_argument("--json", type=Path)
    judging.set_defaults(run=run_judge)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
