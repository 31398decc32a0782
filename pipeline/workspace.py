"""The output folder of one run: what is finished stays, so that a killed run continues."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from hardware.lock import file_lock
from hardware.records import AnyRecord, Record, file_digest, load_record, model_digest, save_record
from pipeline.errors import RecipeError
from pipeline.recipe import Recipe


class RunKey(Record):
    """What a run's folder belongs to: the recipe and the weights that it began with."""

    recipe: str  # SHA-256 of the recipe, without the output folder
    weights: str  # SHA-256 of the weights file, or ""
    graph: str = ""  # SHA-256 of the ONNX file that is the network, with its external data, or ""


class Workspace:
    """The folder `recipe.out`: results at the top, what a resumed run needs under `state/`."""

    def __init__(self, recipe: Recipe, *, restart: bool = False) -> None:
        """Open or create the folder; with `restart`, what an earlier run left there is removed.

        Raises:
            StorageError: the folder cannot be written.
            RecipeError: it holds a run of another recipe.
        """
        self.folder = recipe.out
        self.state = self.folder / "state"
        if restart and self.state.exists():
            shutil.rmtree(self.state)
            (self.folder / "verdict.json").unlink(missing_ok=True)
        weights, file = recipe.model.weights, recipe.model.file
        key = RunKey(
            recipe=recipe_digest(recipe),
            weights=file_digest(weights) if weights else "",
            graph=model_digest(file) if file else "",
        )
        place = self.state / "run.json"
        if place.exists():
            if load_record(RunKey, place) != key:
                raise RecipeError(
                    f"{self.folder} holds a run of another recipe (or of other weights). Choose "
                    "another folder with --set out=FOLDER, or discard that run with --restart."
                )
        else:
            save_record(key, place)

    def load(self, kind: type[AnyRecord], name: str) -> AnyRecord | None:
        """Return a finished stage's record, or None where the stage is still to do."""
        path = self.state / f"{name}.json"
        return load_record(kind, path) if path.exists() else None

    def save(self, record: Record, name: str) -> None:
        """Mark a stage as finished by writing its record."""
        save_record(record, self.state / f"{name}.json")


@contextmanager
def open_workspace(recipe: Recipe, *, restart: bool = False) -> Iterator[Workspace]:
    """Hold the output folder for one run: two at once would write over each other's stages.

    Raises:
        BusyError: another process holds it.
        StorageError, RecipeError: see `Workspace`.
    """
    with file_lock(recipe.out, "writing the results of a run into it"):
        yield Workspace(recipe, restart=restart)


def recipe_digest(recipe: Recipe) -> str:
    """Return the SHA-256 of everything in the recipe but where the results go."""
    body = recipe.model_dump(mode="json", exclude={"out"})
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
