"""The recipe: the one file a user writes. Unknown keys are refused, defaults are stated here."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import RecipeError

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Surgery = Literal["auto", "class", "graph"]


class Section(BaseModel):
    """A part of the recipe: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(Section):
    """Which network."""

    # timm:NAME | torchvision:NAME | package.module:factory | path/to/file.py:factory | FILE.onnx
    name: str
    arguments: dict[str, Any] = {}  # keyword arguments of the factory
    weights: Path | None = None  # safetensors; None keeps what the factory gives
    input_shape: tuple[Positive, Positive, Positive]  # channels, height, width

    @property
    def file(self) -> Path | None:
        """The ONNX file that is the network, None where the name is that of a class."""
        return Path(self.name) if self.name.endswith(".onnx") else None


class DataSection(Section):
    """Which images, and how they become inputs."""

    source: str  # "digits", or a folder that holds one folder of classes per split
    train: str = "train"
    test: str = "val"
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.05  # cut from the training images
    mean: tuple[float, ...] | None = None  # of pixels / 255; None: ImageNet's, grey images 0.5
    std: tuple[float, ...] | None = None  # likewise
    augment: tuple[Literal["flip", "shift", "crop"], ...] = ()
    resize: Positive | None = (
        None  # shorter side before the centre crop, test images; None: as input
    )
    batch: Positive = 128
    workers: Annotated[int, Field(ge=0)] = 2  # for sets too large to hold in memory
    memory_bytes: Positive = 2_000_000_000  # decoded sets up to this size are held in memory


class TargetSection(Section):
    """On what, and how fast. Give `latency_ms` or `latency_ratio`."""

    runtime: str
    precision: Literal["fp32"] = "fp32"
    threads: Positive = 1
    batch: Positive = 1
    latency_ms: Annotated[float, Field(gt=0)] | None = None
    latency_ratio: Share | None = None  # of the unpruned network on the same engine, same run
    table: Path | None = None  # a latency table to use and extend; None: under `profiles`
    table_minutes: Annotated[float, Field(gt=0)] = 0.5  # of measuring layers; more: predicts better
    device: str | None = None  # a folder under `profiles`: plan for that device; None: this one

    @model_validator(mode="after")
    def _one_target(self) -> "TargetSection":
        if (self.latency_ms is None) == (self.latency_ratio is None):
            raise ValueError("give exactly one of latency_ms and latency_ratio")
        return self

    @property
    def asked(self) -> str:
        """The latency that is asked for, as the recipe says it."""
        if self.latency_ms is not None:
            return f"target.latency_ms {self.latency_ms:g}"
        return f"target.latency_ratio {self.latency_ratio:g}"


class PlanSection(Section):
    """How widths are chosen."""

    redundancy: str = "graph"  # one of MEASURES
    criterion: str = "l2"  # one of CRITERIA
    objective: Literal["saliency", "sensitivity", "redundancy"] = "sensitivity"
    empty_branches: bool = True
    step: Positive | None = None  # widths are multiples of this; None: by the group's width
    calibration_images: Positive = 2048
    rounds_of_measuring: Positive = 8  # plan, measure, plan again: at most so often
    rounds: Positive = 1  # prune and fine-tune: so often, in equal steps of latency
    time_limit_s: Annotated[float, Field(gt=0)] = 60.0  # per solve


class TrainingSection(Section):
    """How a network is trained."""

    NAME: ClassVar[str]

    epochs: Annotated[int, Field(ge=0)] = 10
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    distill: Annotated[float, Field(ge=0, le=1)] = 0.7  # weight of the original network's outputs
    temperature: Annotated[float, Field(gt=0)] = 4.0
    clip_norm: Annotated[float, Field(gt=0)] = 5.0
    bf16: bool = True  # autocast, where the processor has bf16 instructions


class FinetuneSection(TrainingSection):
    """How the pruned network is trained."""

    NAME = "finetune"

    recalibrate: bool = True  # batch-norm statistics anew, before the first epoch


class SparsifySection(TrainingSection):
    """How the network is trained before it is pruned, so that pruning costs less."""

    NAME = "sparsify"

    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    method: Literal["none", "admm", "scp"] = "none"
    rho: Annotated[float, Field(gt=0)] = 0.1  # admm: weight of the penalty
    rho_growth: Annotated[float, Field(ge=1)] = 1.3  # admm: at every update
    update_epochs: Positive = 1  # admm: between two updates
    steps: Positive = 1  # admm: to the plan's widths in so many steps
    masked_share: Annotated[float, Field(ge=0, lt=1)] = 0.25  # admm: of a step's epochs, after it
    pressure: Annotated[float, Field(ge=0)] = 0.5  # scp: on the channels that are to go
    sharpness: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (
        10.0,
        200.0,
    )  # scp: slope of the masks, first and last epoch


class LimitsSection(Section):
    """What the verdict demands besides the latency."""

    accuracy_drop_points: Annotated[float, Field(ge=0)] = 1.0
    parity: Annotated[float, Field(gt=0)] = 1e-3
    prediction_error_pct: Annotated[float, Field(gt=0)] = 5.0


class Recipe(Section):
    """Everything `espalier compress` needs to know."""

    model: ModelSection
    data: DataSection
    target: TargetSection
    plan: PlanSection = PlanSection()
    sparsify: SparsifySection = SparsifySection()
    finetune: FinetuneSection = FinetuneSection()
    limits: LimitsSection = LimitsSection()
    surgery: Surgery = "auto"  # on the class, on the graph; auto: class, unless that loses much
    out: Path = Path("build/espalier")
    profiles: Path = Path("profiles")
    seed: int = 0

    @model_validator(mode="after")
    def _has_class(self) -> "Recipe":
        if self.surgery == "class" and self.model.file is not None:
            raise ValueError(
                f"surgery is 'class', but {self.model.file} has no class: say auto or graph"
            )
        return self


def read_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Return the recipe in a YAML file, with `key.sub=value` overrides applied.

    Relative paths stay relative to the current folder, as on a command line.

    Raises:
        RecipeError: unreadable file, not YAML, unknown key, missing key, or value out of range.
    """
    try:
        body = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"Cannot read the recipe {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(body, dict):
        raise RecipeError(f"{path} must hold sections (model, data, target, ...), see the README.")
    for override in overrides:
        _apply(body, override)
    try:
        return Recipe.model_validate(body)
    except ValidationError as error:
        raise RecipeError(f"{path} is not a valid recipe:\n{explain(error)}") from error


def explain(error: ValidationError) -> str:
    """Return one line per fault: where, what was given, what is allowed there."""
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"]) or "recipe"
        if fault["type"] == "extra_forbidden":
            allowed = ", ".join(_keys_at(fault["loc"][:-1]))
            lines.append(f"  {where}: unknown key. Known here: {allowed}")
        elif fault["type"] == "missing":
            lines.append(f"  {where}: missing, and has no default")
        else:
            lines.append(f"  {where}: {fault['msg']} (got {fault['input']!r})")
    return "\n".join(lines)


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location:
        annotation = section.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        section = annotation
    return sorted(section.model_fields)


def _apply(body: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(
            f"--set takes key=value, for example target.latency_ratio=0.6; got {override!r}."
        )
    *parents, last = key.split(".")
    place = body
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise RecipeError(f"--set {override}: {parent!r} is a value, not a section.")
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: {text!r} is not a YAML value ({error}).") from error


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
