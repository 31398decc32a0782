"""A device has the base install: no torch, and perhaps no runtime."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNTIMES = {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"}  # each an extra of its own

IMPORT_ALL = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import pkgutil, importlib, hardware
for module in pkgutil.walk_packages(hardware.__path__, "hardware."):
    importlib.import_module(module.name)
"""


def import_all_without(*absent: str) -> None:
    subprocess.run([sys.executable, "-c", IMPORT_ALL.format(absent=set(absent))], check=True)


def test_hardware_imports_without_what_only_the_host_has():
    import_all_without("torch", "yaml", "pipeline")


def test_hardware_imports_without_any_runtime():
    import_all_without(*RUNTIMES)


def imported(source: str) -> set[str]:
    """Return the packages that a module imports anywhere, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
    return {name.partition(".")[0] for name in found} - sys.stdlib_module_names


def test_the_base_install_is_what_hardware_imports_and_nothing_else():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[^\w-]", words)[0].lower() for words in project["dependencies"]}

    found = set().union(*(imported(p.read_text()) for p in (ROOT / "hardware").rglob("*.py")))

    # onnx needs protobuf itself, and raises its errors.
    assert found - RUNTIMES - {"hardware", "google"} == needed
