"""Shape a CNN to the device it will run on: the public names.

What is imported from here keeps its name and its meaning; everything else in `hardware` and
`pipeline` may change. Importing it takes the host's installation, torch among it. A device without
torch has the command line: `espalier devices`, `measure`, `bench` and `build` do not import this.
"""

from hardware.errors import HardwareError
from hardware.gate.bench import Rules as BenchRules
from hardware.gate.outcome import Outcome as BenchOutcome
from hardware.gate.run import Request as BenchRequest
from hardware.gate.run import gate as bench
from hardware.gate.sample import Schedule
from hardware.gate.sequential_test import Limit
from hardware.latency.table import LatencyTable, load_table
from hardware.runtimes.base import EngineSettings
from pipeline.errors import PipelineError
from pipeline.networks.store import load_pruned
from pipeline.recipe import (
    DataSection,
    FinetuneSection,
    LimitsSection,
    ModelSection,
    PlanSection,
    Recipe,
    SparsifySection,
    TargetSection,
    dump_recipe,
    read_recipe,
)
from pipeline.records import FittedPlan, Network, Plan, Verdict
from pipeline.report.inspection import Inspection, Question
from pipeline.report.inspection import inspect_model as inspect
from pipeline.report.progress import StageProgress
from pipeline.run import compress, make_plan, make_table

__all__ = [
    "BenchOutcome",
    "BenchRequest",
    "BenchRules",
    "DataSection",
    "EngineSettings",
    "FinetuneSection",
    "FittedPlan",
    "HardwareError",
    "Inspection",
    "LatencyTable",
    "Limit",
    "LimitsSection",
    "ModelSection",
    "Network",
    "PipelineError",
    "Plan",
    "PlanSection",
    "Question",
    "Recipe",
    "Schedule",
    "SparsifySection",
    "StageProgress",
    "TargetSection",
    "Verdict",
    "bench",
    "compress",
    "dump_recipe",
    "inspect",
    "load_pruned",
    "load_table",
    "make_plan",
    "make_table",
    "read_recipe",
]
