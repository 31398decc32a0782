"""Names to factories: of timm, of torchvision, or of the user's own code, by module or by file."""

import difflib
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

from pipeline.errors import NetworkError, first_line

Factory = Callable[..., object]

# Espalier's own packages are loaded long before a user's module could be found by such a name.
OWN = ("espalier", "hardware", "pipeline")
# Modules that users' code imported from its own folders, and from which: `sys.modules` has room
# for one module of a name.
NEIGHBOURS: dict[str, Path] = {}


def find_factory(name: str) -> Factory:
    """Return the function or class that builds the network of a name.

    Args:
        name: timm:NAME, torchvision:NAME, package.module:factory or path/to/file.py:factory.

    Raises:
        NetworkError: the name names nothing, or importing the user's code fails.
    """
    source, separator, rest = name.partition(":")
    if not (separator and source and rest):
        raise NetworkError(
            f"{name!r} names no network. Write timm:NAME, torchvision:NAME, "
            "package.module:factory, path/to/file.py:factory or FILE.onnx."
        )
    if source == "timm":
        return _timm_factory(rest)
    if source == "torchvision":
        return _torchvision_factory(rest)
    if (file := file_of(name)) is not None:
        return _factory_in_file(file, name.rpartition(":")[2])
    return _factory_in_module(source, rest)


def file_of(name: str) -> Path | None:
    """Return the Python file that a network's name names, None where it names none."""
    source = name.rpartition(":")[0]
    return Path(source) if source.endswith(".py") else None


def _timm_factory(name: str) -> Factory:
    try:
        import timm
    except ImportError as error:
        raise NetworkError(
            "timm is not installed: pip install timm, or name another network."
        ) from error
    if not timm.is_model(name.partition(".")[0]):
        raise NetworkError(_unknown("timm", name, timm.list_models()))
    return lambda **arguments: timm.create_model(name, **{"pretrained": False, **arguments})


def _torchvision_factory(name: str) -> Factory:
    try:
        from torchvision import models
    except ImportError as error:
        raise NetworkError(
            "torchvision is not installed: pip install torchvision, or name another network."
        ) from error
    if name not in (known := models.list_models()):
        raise NetworkError(_unknown("torchvision", name, known))
    return lambda **arguments: models.get_model(
        name,
        **{"weights": None, "weights_backbone": None, **arguments}
        if _takes_backbone(name)
        else {"weights": None, **arguments},
    )


def _takes_backbone(name: str) -> bool:
    # Dense-prediction builders fetch backbone weights unless told not to.
    from torchvision import models

    return "weights_backbone" in models.get_model_builder(name).__annotations__


def _factory_in_module(module_name: str, attribute: str) -> Factory:
    """Return a factory of an installed package, or of a module in the current folder."""
    if (top := module_name.partition(".")[0]) in OWN:
        raise NetworkError(
            f"`{top}` is Espalier's own package, so {module_name}:{attribute} cannot be yours. "
            "Name your file: path/to/file.py:factory, here perhaps "
            f"{module_name.replace('.', '/')}.py:{attribute}."
        )
    folders = (Path.cwd(),)
    try:
        with _importable(folders):
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise NetworkError(
            f"Cannot import {module_name!r} for {module_name}:{attribute}: {_reason(error)}. It is "
            f"looked for among the installed packages and in the current folder {Path.cwd()}; a "
            "file anywhere is named path/to/file.py:factory."
        ) from error
    return _attribute(module, module_name, attribute, folders)


def _factory_in_file(path: Path, attribute: str) -> Factory:
    """Return a factory in a Python file.

    The file belongs to a package of its own name, made here, whose folder is the first one above
    the file without an `__init__.py`: two files of one name do not collide, and relative imports
    work. What it imports is also looked for beside it, in that folder and in the current one.
    """
    file = path.resolve()
    if not file.is_file():
        raise NetworkError(
            f"There is no file {path} for {path}:{attribute}. A relative path is looked for in the "
            f"current folder, {Path.cwd()}."
        )
    if "." in file.stem:
        raise NetworkError(f"Python cannot import {path}: rename it without a dot in {file.stem}.")
    top = file.parent
    while (top / "__init__.py").is_file():
        top = top.parent
    folders = tuple(dict.fromkeys((file.parent, top, Path.cwd())))
    package = _package_of(top)
    name = ".".join((package, *file.relative_to(top).with_suffix("").parts))
    try:
        with _importable(folders):
            module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        reason = _reason(error).replace(f"{package}.", "")
        raise NetworkError(f"Cannot load {path}: {reason}.") from error
    return _attribute(module, str(path), attribute, folders)


def _package_of(folder: Path) -> str:
    """Return the name of the package that files in a folder belong to, made where it is missing."""
    name = f"espalier_files_{hashlib.sha256(bytes(folder)).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules[name] = module_from_spec(spec)
    return name


def _attribute(module: ModuleType, source: str, name: str, folders: tuple[Path, ...]) -> Factory:
    """Return a callable of a user's module, which finds its modules also while it builds."""
    found = getattr(module, name, None)
    if not callable(found):
        functions = [name for name in vars(module) if callable(getattr(module, name))]
        raise NetworkError(_unknown(source, name, functions))

    def build(**arguments: object) -> object:
        with _importable(folders):
            return found(**arguments)

    return build


@contextmanager
def _importable(folders: tuple[Path, ...]) -> Iterator[None]:
    """Let Python look into these folders first; modules of other folders make way for theirs."""
    for name, home in list(NEIGHBOURS.items()):
        if _home(name, folders) not in (None, home):
            del NEIGHBOURS[name]
            sys.modules.pop(name, None)
    before = set(sys.modules)
    sys.path[:0] = [str(folder) for folder in folders]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in folders:
            sys.path.remove(str(folder))
        found = {name: _home(name, folders) for name in set(sys.modules) - before}
        NEIGHBOURS.update((name, home) for name, home in found.items() if home is not None)


def _home(name: str, folders: tuple[Path, ...]) -> Path | None:
    """Return the first of the folders that holds a module of this name, None where none does."""
    top = name.partition(".")[0]
    return next((f for f in folders if (f / top).is_dir() or (f / f"{top}.py").is_file()), None)


def _reason(error: BaseException) -> str:
    """Return why importing a user's code failed, and what to do where a name is ours."""
    reason = f"{type(error).__name__}: {first_line(error)}"
    missing = (error.name or "") if isinstance(error, ImportError) else ""
    if (top := missing.partition(".")[0]) in OWN:
        reason += (
            f". `{top}` is Espalier's own package: import your own relatively, as "
            "`from .module import name`"
        )
    return reason


def _unknown(source: str, name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    hint = f"Did you mean {', '.join(close)}?" if close else f"It has {len(names)} others."
    return f"{source} has no network {name!r}. {hint}"
