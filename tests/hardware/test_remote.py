"""From a bundle to a table on the device, without torch, and the table back on the host."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hardware.bundle import Contents, pack, read_bundle, write_bundle
from hardware.device import this_device
from hardware.errors import BuildError, BusyError, DeviceMismatchError, StorageError
from hardware.latency.table import LatencyTable, TableKey, key_of, load_table
from hardware.latency.template_layers import layers_of
from hardware.latency.variant import digest_of
from hardware.remote import bring_home, measure_bundle
from hardware.runtimes import get_runtime
from hardware.runtimes.base import EngineSettings
from hardware.runtimes.fake import FakeRuntime
from tests.hardware.holder import holder
from tests.hardware.templates import residual
from tests.hardware.test_bundle import CANDIDATES

WITHOUT_TORCH = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        absent = {"torch", "torchvision", "timm", "sklearn", "matplotlib", "yaml"}
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from pipeline.cli import main
sys.argv[0] = "espalier"
main()
"""
TEMPLATE, CHANNELS = residual()
LAYERS = layers_of(TEMPLATE, CHANNELS)
WANTED = TableKey(
    device="",
    fingerprint="",
    folder="",
    runtime="fake",
    version="",
    precision="fp32",
    batch=1,
    threads=1,
)


def bundle_at(path: Path):
    contents = Contents(
        network="residual",
        template=TEMPLATE,
        channels=CHANNELS,
        candidates=CANDIDATES,
        settings=EngineSettings(),
        batch=1,
    )
    manifest, parts = pack(contents)
    write_bundle(path, manifest, parts)
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return bundle_at(tmp_path_factory.mktemp("host") / "bundle.zip")


@pytest.fixture(scope="module")
def measured(bundle, tmp_path_factory):
    """A table that came from the device."""
    folder = tmp_path_factory.mktemp("device")
    path = folder / "table.json"
    measure_bundle(read_bundle(bundle), FakeRuntime(), path, builds=8)
    return path


def espalier(folder: Path, *words: str) -> subprocess.Popen[str]:
    code = [sys.executable, "-c", WITHOUT_TORCH]
    return subprocess.Popen(
        [*code, *words],
        env={"TMPDIR": str(folder), "PATH": "", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def home(path, profiles, **changes):
    given = {
        "digests": load_table(path).bundles,
        "template": digest_of(TEMPLATE),
        "layers": LAYERS,
        "wanted": WANTED,
        "profiles": profiles,
    }
    return bring_home(path, **(given | changes))


def test_a_device_without_torch_measures_a_bundle(bundle, tmp_path):
    table = tmp_path / "table.json"
    words = ("measure", str(bundle), "--runtime", "fake", "-o", str(table), "--builds", "4")

    process = espalier(tmp_path, *words)
    said, told = process.communicate(timeout=120)

    assert process.returncode == 0, told
    loaded = load_table(table)
    assert loaded.bundles == (read_bundle(bundle).manifest.digest,)
    assert len(loaded.variants) == 4
    assert loaded.key == key_of(FakeRuntime(), EngineSettings(), 1)
    assert "measuring: 4/4" in told
    assert "were predicted before they were measured" in said
    assert "espalier profile RECIPE --import table.json" in said


@pytest.mark.runtime
def test_a_real_runtime_measures_a_bundle_without_torch(bundle, tmp_path):
    get_runtime("ov")
    table = tmp_path / "table.json"
    words = ("measure", str(bundle), "--runtime", "ov", "-o", str(table), "--builds", "2")

    process = espalier(tmp_path, *words)
    _, told = process.communicate(timeout=240)

    assert process.returncode == 0, told
    assert len(load_table(table).variants) == 2


def test_a_measurement_that_was_killed_is_continued(bundle, tmp_path):
    table = tmp_path / "table.json"
    words = ("measure", str(bundle), "--runtime", "fake", "-o", str(table))
    process = espalier(tmp_path, *words)
    while not table.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = load_table(table).variants

    process = espalier(tmp_path, *words)
    _, told = process.communicate(timeout=120)

    assert process.returncode == 0, told
    after = load_table(table)
    assert len(after.variants) > len(before) >= 1
    kept = {variant.model_dump_json(exclude={"entries"}) for variant in after.variants}
    assert {v.model_dump_json(exclude={"entries"}) for v in before} <= kept


def test_a_runtime_without_node_times_is_refused_before_anything_is_built(
    bundle, tmp_path, monkeypatch
):
    monkeypatch.setattr(FakeRuntime, "tells_node_times", False)
    monkeypatch.setattr(FakeRuntime, "build", None)

    with pytest.raises(BuildError, match="fake does not tell what each node of a network takes"):
        measure_bundle(read_bundle(bundle), FakeRuntime(), tmp_path / "t.json")


def test_a_second_measurement_at_a_time_is_refused(bundle, tmp_path):
    with holder("machine"), pytest.raises(BusyError, match="measures on this machine: process"):
        measure_bundle(read_bundle(bundle), FakeRuntime(), tmp_path / "t.json")


def test_a_table_that_another_process_writes_is_left_alone(bundle, measured, tmp_path):
    place = tmp_path / this_device().slug / "fake-fp32-b1-t1.json"

    with holder(str(tmp_path / "t.json")), pytest.raises(BusyError, match=r"uses .*t\.json"):
        measure_bundle(read_bundle(bundle), FakeRuntime(), tmp_path / "t.json")
    with holder(str(place)), pytest.raises(BusyError, match=r"uses .*fake-fp32"):
        home(measured, tmp_path)

    assert not list(tmp_path.iterdir())


def test_a_table_of_another_setting_is_not_continued(bundle, measured, tmp_path):
    table = load_table(measured)
    other = table.model_copy(update={"key": table.key.model_copy(update={"threads": 4})})
    other.save(tmp_path / "t.json")

    with pytest.raises(DeviceMismatchError, match="threads 1 against 4"):
        measure_bundle(read_bundle(bundle), FakeRuntime(), tmp_path / "t.json")


def test_a_table_comes_home(measured, tmp_path):
    place, table = home(measured, tmp_path)

    assert place == tmp_path / this_device().slug / "fake-fp32-b1-t1.json"
    assert load_table(place) == table
    assert table.variants == load_table(measured).variants


def test_a_table_that_comes_home_twice_is_the_same(measured, tmp_path):
    _, first = home(measured, tmp_path)
    _, again = home(measured, tmp_path)

    assert again == first


def test_a_table_of_an_older_version_is_set_aside(measured, tmp_path):
    place, table = home(measured, tmp_path)
    old = table.model_copy(update={"key": table.key.model_copy(update={"version": "0.9"})})
    old.save(place)

    home(measured, tmp_path)

    assert load_table(place).key.version == "1"
    assert load_table(place.with_name("fake-fp32-b1-t1-0.9.json")).key.version == "0.9"


def test_a_table_of_another_bundle_is_refused(measured, tmp_path):
    with pytest.raises(StorageError, match="not measured from this recipe's bundle"):
        home(measured, tmp_path, digests=("a" * 64,))
    assert not list(tmp_path.iterdir())


def test_a_table_of_another_runtime_is_refused(measured, tmp_path):
    wanted = WANTED.model_copy(update={"runtime": "ov"})

    with pytest.raises(DeviceMismatchError, match="runtime fake, where the recipe says ov"):
        home(measured, tmp_path, wanted=wanted)


def test_a_table_of_another_device_than_the_one_named_is_refused(measured, tmp_path):
    wanted = WANTED.model_copy(update={"folder": "jetson-123456"})

    with pytest.raises(DeviceMismatchError, match="where the recipe says jetson-123456"):
        home(measured, tmp_path, wanted=wanted)


def edited(measured: Path, path: Path, change) -> Path:
    body = json.loads(measured.read_text())
    change(body)
    path.write_text(json.dumps(body))
    return path


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda b: b["key"].update(folder="../../home"), "odd key"),
        (lambda b: b["key"].update(runtime="../x"), "odd key"),
        (lambda b: b["variants"][0]["times_us"].__setitem__(0, -5.0), "times that are none"),
        (lambda b: b["variants"][1].update(widths={}), "executed other layers"),
        (lambda b: b.update(variants=[]), "interrupted before the first"),
    ],
)
def test_a_table_that_was_tampered_with_is_refused(measured, tmp_path, change, match):
    path = edited(measured, tmp_path / "t.json", change)

    with pytest.raises(StorageError, match=match):
        home(path, tmp_path / "profiles")
    assert not (tmp_path / "profiles").exists()


def test_entries_are_computed_anew_from_the_variants(measured, tmp_path):
    def change(body):
        body["entries"][0]["median_us"] = 1e6

    _, table = home(edited(measured, tmp_path / "t.json", change), tmp_path / "profiles")

    assert isinstance(table, LatencyTable)
    assert max(entry.median_us for entry in table.entries) < 1e6
