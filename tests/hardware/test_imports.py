"""A device has the base install: no torch, and perhaps no runtime."""

import subprocess
import sys

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


def test_hardware_imports_without_torch_and_the_pipeline():
    import_all_without("torch", "pipeline")


def test_hardware_imports_without_any_runtime():
    import_all_without("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")
