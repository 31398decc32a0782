"""How the packages are built: the order of their folders, and the rules that every module keeps.

Lists of offenders, so that a failure says what to change and where.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("hardware", "pipeline")

# From the ground up. A module imports its own folder and the floors below, so two folders of one
# floor never import each other. A floor names folders and files of the package.
FLOORS = {
    "hardware": (
        {"errors"},
        {"records", "intervals", "pages"},
        {"device", "lock"},
        {"disturbance", "timing"},
        {"graph"},
        {"runtimes"},
        {"latency", "gate"},
        {"bundle"},
        {"remote"},
        {"commands"},
    ),
    "pipeline": (
        {"errors"},
        {"records", "processor", "recipe"},
        {"wording", "workspace"},
        {"channels"},
        {"surgery"},
        {"networks", "tasks"},
        {"evidence", "rig"},
        {"criteria", "redundancy"},
        {"diagnosis"},
        {"planning", "training", "report"},
        {"delivery"},
        {"run"},
        {"cli"},
    ),
}
MOST_ARGUMENTS = 7
LEAST_LINES = 100  # of a module that only one other imports
# One rule, criterion, measure, runtime or command is a module of its own, however short it is.
KINDS = (
    r"pipeline\.channels\.rules",
    r"pipeline\.criteria\.",
    r"pipeline\.redundancy\.",
    r"pipeline\.training\.sparsifying\.",
    r"hardware\.runtimes\.",
    r"hardware\.commands\.",
)


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the packages by its name, parsed."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text())
    return found


def lines_of(module: str) -> int:
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return len(path.read_text().splitlines())


def imports_of(module: str) -> Iterator[str]:
    """What a module imports anywhere in it, by module name."""
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None  # imports are absolute
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in modules() else node.module


def importers() -> dict[str, set[str]]:
    """By module of the packages the others of the packages that import it."""
    found: dict[str, set[str]] = {name: set() for name in modules()}
    for name in modules():
        for imported in imports_of(name):
            if imported in found and imported != name:
                found[imported].add(name)
    return found


def floor_of(module: str) -> int | None:
    package, _, rest = module.partition(".")
    if not rest:
        return None
    part = rest.partition(".")[0]
    [floor] = [i for i, floor in enumerate(FLOORS[package]) if part in floor] or [None]
    return floor


def test_every_folder_has_its_floor():
    parts = {name.split(".")[1] for name in modules() if "." in name}

    known = {part for floors in FLOORS.values() for floor in floors for part in floor}

    assert parts == known


def test_a_folder_imports_only_the_floors_below_it():
    upwards = []
    for name in modules():
        package, _, rest = name.partition(".")
        for imported in imports_of(name):
            above, _, other = imported.partition(".")
            if above != package or not rest or not other:
                continue
            if rest.split(".")[0] == other.split(".")[0]:
                continue
            if floor_of(imported) >= floor_of(name):
                upwards.append(f"{name} imports {imported}")

    assert not upwards


def test_only_the_command_line_imports_the_whole_flow():
    assert importers()["pipeline.run"] == {"pipeline.cli"}


def test_no_function_takes_more_than_seven_arguments():
    long = []
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                names = [argument.arg for argument in arguments]
                count = len(names) - (names[:1] in (["self"], ["cls"]))
                if count > MOST_ARGUMENTS:
                    long.append(f"{name}.{node.name}: {count}")

    assert not long


def test_no_short_module_has_a_single_importer():
    short = [
        f"{name} ({lines_of(name)} lines), imported by {next(iter(users))}"
        for name, users in importers().items()
        if len(users) == 1
        and lines_of(name) < LEAST_LINES
        and not (ROOT.joinpath(*name.split("."))).is_dir()
        and not any(re.match(kind, name) for kind in KINDS)
    ]

    assert not short


def test_a_name_is_imported_from_the_module_that_defines_it():
    borrowed = []
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.module not in modules():
                continue
            for alias in node.names:
                is_module = f"{node.module}.{alias.name}" in modules()
                if not is_module and alias.name not in defined_in(node.module):
                    borrowed.append(f"{name} takes {alias.name} from {node.module}")

    assert not borrowed


@cache
def defined_in(module: str) -> frozenset[str]:
    """The names that a module gives a meaning itself."""
    found: set[str] = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return frozenset(found)


def test_files_are_named_after_what_is_in_them():
    names = [name.rpartition(".")[2] for name in modules() if "." in name]

    assert not {"utils", "util", "helpers", "common", "misc"} & set(names)
    assert not sys.stdlib_module_names & set(names)
