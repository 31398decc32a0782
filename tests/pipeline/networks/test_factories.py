import sys
from pathlib import Path

import pytest
import torch

from pipeline.errors import NetworkError
from pipeline.networks.load import load_network
from pipeline.recipe import ModelSection
from pipeline.report.inspection import inspect_model, question_of

NET = """
from torch import nn

def build(width={width}):
    return nn.Conv2d(3, width, 3)
"""
IMPORTING = """
{line}
from torch import nn

def build():
    return nn.Conv2d(3, WIDTH, 3)
"""


def section(name: str, shape=(1, 32, 32), **fields) -> ModelSection:
    return ModelSection(name=name, input_shape=shape, **fields)


def width_of(name: str, **fields) -> int:
    """Return the channels of the convolution that a name builds."""
    return load_network(section(name, (3, 8, 8), **fields)).module.out_channels


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_factory_in_the_current_folder_is_found_and_the_path_left_alone(tmp_path, monkeypatch):
    (tmp_path / "my_own_nets.py").write_text(
        "from torch import nn\ndef tiny(width=2):\n    return nn.Conv2d(3, width, 3).half()\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    network = load_network(section("my_own_nets:tiny", (3, 8, 8), arguments={"width": 5}))

    assert network.module.out_channels == 5
    assert network.module.weight.dtype == torch.float32
    assert sys.path == before


def test_a_factory_is_found_in_a_file_wherever_it_lies(tmp_path, monkeypatch):
    file = write(tmp_path / "deep" / "my-nets.py", NET.format(width=4))
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)

    network = load_network(section("deep/my-nets.py:build", (3, 8, 8), arguments={"width": 7}))

    assert network.module.out_channels == 7 and network.spec == "deep/my-nets.py:build"
    assert width_of(f"{file}:build") == 4
    assert sys.path == before


def test_a_package_called_like_ours_is_reached_by_its_file(tmp_path, monkeypatch):
    line = "from .layers import WIDTH"
    write(tmp_path / "pipeline" / "__init__.py", "")
    write(tmp_path / "pipeline" / "layers.py", "WIDTH = 6")
    write(tmp_path / "pipeline" / "nets.py", IMPORTING.format(line=line))
    monkeypatch.chdir(tmp_path)

    with pytest.raises(
        NetworkError, match=r"`pipeline` is Espalier's own package.*pipeline/nets\.py:build"
    ):
        load_network(section("pipeline.nets:build", (3, 8, 8)))
    assert width_of("pipeline/nets.py:build") == 6


@pytest.mark.parametrize("name", ["hardware:build", "hardware.nets:build", "espalier.x:build"])
def test_a_name_that_is_ours_says_so(name):
    with pytest.raises(NetworkError, match=r"is Espalier's own package.*path/to/file\.py:factory"):
        load_network(section(name))


def test_a_file_that_imports_its_own_package_by_our_name_learns_what_to_write(tmp_path):
    line = "from pipeline.layers import WIDTH"
    write(tmp_path / "pipeline" / "layers.py", "WIDTH = 6")
    file = write(tmp_path / "pipeline" / "nets.py", IMPORTING.format(line=line))

    with pytest.raises(NetworkError, match=r"No module named 'pipeline\.layers'.*from \.module"):
        load_network(section(f"{file}:build", (3, 8, 8)))


def test_two_files_of_one_name_do_not_collide(tmp_path):
    one, other = (
        write(tmp_path / str(width) / "net.py", NET.format(width=width)) for width in (2, 3)
    )

    assert [width_of(f"{file}:build") for file in (one, other, one)] == [2, 3, 2]


@pytest.mark.parametrize("lazily", [False, True])
def test_every_file_imports_what_lies_beside_it(tmp_path, lazily):
    text = IMPORTING.format(line="from layers import WIDTH")
    if lazily:
        text = text.replace("from layers import WIDTH", "").replace(
            "def build():", "def build():\n    from layers import WIDTH"
        )
    files = [write(tmp_path / str(width) / "net.py", text) for width in (2, 3)]
    for width in (2, 3):
        write(tmp_path / str(width) / "layers.py", f"WIDTH = {width}")

    assert [width_of(f"{file}:build") for file in (*files, *files)] == [2, 3, 2, 3]
    sys.modules.pop("layers", None)


def test_a_module_of_one_name_in_two_current_folders_is_that_of_the_folder(tmp_path, monkeypatch):
    found = []
    for width in (2, 3):
        write(tmp_path / str(width) / "same_named_nets.py", NET.format(width=width))
        monkeypatch.chdir(tmp_path / str(width))
        found.append(width_of("same_named_nets:build"))

    assert found == [2, 3]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (None, "net.py:build", r"There is no file .*net\.py.*current folder"),
        (
            NET.format(width=2),
            "net.py:biuld",
            r"net\.py has no network 'biuld'. Did you mean build",
        ),
        (
            "from layers_that_are_not_there import X",
            "net.py:build",
            r"net\.py: ModuleNotFoundError",
        ),
        ("from .layers import X", "net.py:build", r"net\.py: .*No module named 'layers'"),
        ("def build(:", "net.py:build", r"Cannot load .*net\.py: SyntaxError: .*line 1"),
        ("import sys; sys.exit(3)", "net.py:build", r"Cannot load .*net\.py: SystemExit: 3"),
        ("build = 3", "net.py:build", r"net\.py has no network 'build'"),
        ("", "net.v2.py:build", r"rename it without a dot in net\.v2"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named_with_what_is_missing(tmp_path, text, name, message):
    if text is not None:
        write(tmp_path / name.rpartition(":")[0], text)

    with pytest.raises(NetworkError, match=message):
        load_network(section(f"{tmp_path}/{name}"))


def test_a_file_is_inspected_like_any_network(tmp_path):
    text = NET.replace("nn.Conv2d(3, width, 3)", "nn.Sequential(nn.Conv2d(3, width, 3), "
                       "nn.ReLU(), nn.Conv2d(width, 2, 3))")  # fmt: skip
    file = write(tmp_path / "net.py", text.format(width=4))

    found = inspect_model(question_of(f"{file}:build", input_shape="3,8,8"))

    assert [group.width for group in found.channels.prunable] == [4]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet81", "timm has no network 'resnet81'. Did you mean .*resnet18"),
        ("torchvision:mobilenetv2", "Did you mean .*mobilenet_v2"),
        ("benchmarks.networks:digit_resnet", "Did you mean digits_resnet"),
        ("no_such_package.nets:net", "Cannot import 'no_such_package.nets'"),
        ("resnet18", "names no network. Write timm:NAME"),
        ("builtins:dict", "returned dict, not a torch.nn.Module"),
    ],
)
def test_an_unknown_network_is_an_error_that_helps(name, message):
    with pytest.raises(NetworkError, match=message):
        load_network(section(name))
