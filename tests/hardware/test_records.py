import json
import subprocess
import sys

import pytest
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data

from hardware.errors import StorageError
from hardware.records import (
    Record,
    file_digest,
    load_record,
    model_digest,
    save_record,
    write_whole,
)


class Point(Record):
    x_ms: float
    name: str = "a"


def test_a_record_reads_back_as_it_was_saved(tmp_path):
    save_record(Point(x_ms=0.1), tmp_path / "deep" / "point.json")

    assert load_record(Point, tmp_path / "deep" / "point.json") == Point(x_ms=0.1)


def test_a_newer_schema_is_refused(tmp_path):
    (tmp_path / "point.json").write_text(json.dumps({"schema": 99, "x_ms": 1}))

    with pytest.raises(
        StorageError, match="has schema 99; this version of Espalier reads schema 1"
    ):
        load_record(Point, tmp_path / "point.json")


def test_an_unknown_key_is_refused(tmp_path):
    (tmp_path / "point.json").write_text(json.dumps({"schema": 1, "x_ms": 1, "y": 2}))

    with pytest.raises(StorageError, match="not a valid Point"):
        load_record(Point, tmp_path / "point.json")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"Cannot read .*none\.json"):
        load_record(Point, tmp_path / "none.json")


def test_half_a_file_never_replaces_a_whole_one(tmp_path):
    # A file size limit makes the operating system refuse the write half-way, as a full disk does.
    path = tmp_path / "table.json"
    path.write_text("whole")
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from hardware.errors import StorageError\n"
        "from hardware.records import write_whole\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n"
        "    write_whole(Path(sys.argv[1]), 'x' * 1000)\n"
        "except StorageError as error:\n"
        "    print(error)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )

    assert "Cannot write" in done.stdout and "Free space" in done.stdout
    assert path.read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageError, match="Free space or choose another output folder"):
        write_whole(tmp_path / "file" / "x.json", "{}")


def test_the_digest_of_a_model_covers_the_files_that_hold_its_weights(tmp_path):
    weight, constant = (TensorProto(name=n, data_type=TensorProto.FLOAT, dims=[4]) for n in "ab")
    paths = {name: tmp_path / name for name in ("a", "b", "net.onnx", "ir.xml", "ir.bin")}
    for tensor in (weight, constant):  # each in a file of its own name
        tensor.raw_data = bytes(16)
        set_external_data(tensor, tensor.name)
        tensor.ClearField("raw_data")
        paths[tensor.name].write_bytes(bytes(16))
    nodes = [
        helper.make_node("Constant", [], ["k"], value=constant),
        helper.make_node("Add", ["a", "k"], ["y"]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    model = helper.make_model(helper.make_graph(nodes, "sum", [], [output], [weight]))
    paths["net.onnx"].write_bytes(model.SerializeToString())
    paths["ir.xml"].write_text("<net/>")
    paths["ir.bin"].write_bytes(b"1")

    for file, changed in (("net.onnx", "a"), ("net.onnx", "b"), ("ir.xml", "ir.bin")):
        before = model_digest(paths[file])
        paths[changed].write_bytes(b"other")
        assert model_digest(paths[file]) != before
    paths["a"].unlink()
    with pytest.raises(StorageError, match=r"Cannot read .*/a: No such file"):
        model_digest(paths["net.onnx"])


def test_a_file_that_is_no_onnx_model_has_a_digest(tmp_path):
    (tmp_path / "net.onnx").write_text("a text")

    assert model_digest(tmp_path / "net.onnx") == file_digest(tmp_path / "net.onnx")
