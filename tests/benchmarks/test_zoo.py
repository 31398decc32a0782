import argparse
import signal
import subprocess
import sys

import psutil
import pytest
import timm
from torchvision import models
from torchvision.models import regnet
from torchvision.models.regnet import BlockParams

from benchmarks.zoo import __main__ as zoo
from benchmarks.zoo import isolating
from benchmarks.zoo.isolating import run_module
from benchmarks.zoo.measuring import conv_share
from benchmarks.zoo.networks import DETECTORS, TIMM, TORCHVISION, make, names
from benchmarks.zoo.records import Entry, Peer, Zoo, summarize
from benchmarks.zoo.tables import to_markdown
from hardware.records import load_record, save_record
from pipeline.channels.find import find_groups
from tests.graphs import exported

DONE = Entry(name="own:yolo_heads", status="ok", prunable_share=0.5, groups=3, proof_error=1e-7)


def test_the_list_has_at_least_150_networks_and_each_once() -> None:
    assert len(names()) == len(set(names())) >= 150


def test_every_network_of_the_list_exists() -> None:
    assert set(TIMM) <= set(timm.list_models())
    assert {*TORCHVISION, *DETECTORS} <= set(models.list_models())


def test_the_narrowed_regnet_has_half_the_channels_of_the_published_one() -> None:
    # Dollar et al., arXiv:2103.06877: depth 27, w_0 456, w_a 160.83, w_m 2.52, group width 264.
    published = BlockParams.from_init_params(
        depth=27, w_0=456, w_a=160.83, w_m=2.52, group_width=264, se_ratio=0.25
    )
    made: list[BlockParams] = []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regnet, "RegNet", made.append)
        make("regnet_y_128gf")

    assert [2 * width for width in made[0].widths] == published.widths
    assert made[0].depths == published.depths
    assert [2 * width for width in made[0].group_widths] == published.group_widths


def test_the_share_counts_the_output_channels_of_convolutions() -> None:
    graph = exported("chain")
    channels = find_groups(graph)

    widths = [t.dims[0] for t in graph.graph.initializer if len(t.dims) == 4]
    free = sum(group.width for group in channels.groups)
    assert conv_share(graph, channels) == free / sum(widths)


def test_standardised_weights_count_like_plain_ones() -> None:
    graph = exported("standardised")
    channels = find_groups(graph)

    assert {group.width for group in channels.groups}
    assert conv_share(graph, channels) > 0


def test_a_convolution_that_runs_twice_counts_once() -> None:
    graph = exported("tied")
    kernels = {node.input[1] for node in graph.graph.node if node.op_type == "Conv"}
    assert len(kernels) < sum(node.op_type == "Conv" for node in graph.graph.node)
    channels = find_groups(graph)
    filters = {
        part.parameter: len(part.units)
        for group in channels.groups
        for part in group.slices
        if part.role == "filter" and part.parameter in kernels
    }
    widths = [t.dims[0] for t in graph.graph.initializer if t.name in kernels]

    assert conv_share(graph, channels) == sum(filters.values()) / sum(widths)


def test_a_network_that_crashes_counts_as_nothing_prunable() -> None:
    peers = [Peer(status="ok", prunable_share=0.4), Peer(status="timeout", prunable_share=0.9)]
    good = DONE.model_copy(update={"torch_pruning": peers[0]})
    bad = Entry(name="b", status="failed", torch_pruning=peers[1])

    summary = summarize((good, bad))

    assert summary is not None
    assert (summary.networks, summary.crashed, summary.prunable_pct) == (2, 1, 50)
    assert summary.mean_prunable_share == 0.25
    assert (summary.torch_pruning_ok, summary.torch_pruning_networks) == (1, 2)
    assert summary.torch_pruning_mean_prunable_share == 0.2


def test_a_tool_that_is_not_installed_is_not_judged() -> None:
    entry = DONE.model_copy(update={"torch_pruning": Peer(status="not installed")})

    summary = summarize((entry,))

    assert summary is not None and summary.torch_pruning_networks is None


def test_what_the_file_holds_is_not_run_again(tmp_path, monkeypatch, capsys) -> None:
    path, page = tmp_path / "zoo.json", tmp_path / "zoo.md"
    save_record(Zoo(networks=(DONE,)), path)
    arguments = ["zoo", "--filter", DONE.name, "--json", str(path), "--markdown", str(page)]
    monkeypatch.setattr(sys, "argv", arguments)

    zoo.main()

    assert "1 networks, 0 to run" in capsys.readouterr().out
    assert load_record(Zoo, path).networks == (DONE,)
    assert f"**1 of {len(names())}**" in page.read_text()


@pytest.mark.parametrize("status", ["timeout", "wrong proof"])
def test_what_crashed_or_was_wrong_is_run_again_when_asked(status) -> None:
    crashed = Entry(name="a", status=status)
    options = argparse.Namespace(retry=True, class_share=False, torch_pruning=False)

    assert zoo._is_open(crashed, options)
    assert not zoo._is_open(DONE, options)


def test_a_filter_that_matches_nothing_says_so(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["zoo", "--filter", "no such network"])

    with pytest.raises(SystemExit, match="matches 'no such network'"):
        zoo.main()


def test_a_table_shows_how_the_other_tool_ended() -> None:
    entry = DONE.model_copy(update={"torch_pruning": Peer(status="timeout")})

    table = to_markdown(Zoo(networks=(entry,), summary=summarize((entry,))), of=1)

    assert "| own:yolo_heads | ok |" in table
    assert "timeout" in table.splitlines()[-1]


def test_a_process_that_takes_too_long_is_killed() -> None:
    sleep = ["-n1", "-r1", "import time; time.sleep(600)"]

    assert run_module("timeit", sleep, timeout_s=0.5, memory_gib=4).status == "timeout"


def test_a_pause_of_a_process_is_not_held_against_it() -> None:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        process.send_signal(signal.SIGSTOP)
        psutil.wait_procs([psutil.Process(process.pid)], timeout=0.3)
        before = isolating._busy_s(isolating._family(process.pid))
        psutil.wait_procs([psutil.Process(process.pid)], timeout=0.3)

        assert not isolating._is_asleep(process.pid)
        assert isolating._busy_s(isolating._family(process.pid)) == before
    finally:
        process.kill()
        process.wait()


def test_a_process_that_computes_too_long_is_killed() -> None:
    spin = ["-n1", "-r1", "while True: pass"]

    assert run_module("timeit", spin, timeout_s=0.5, memory_gib=4).status == "timeout"


def test_a_process_that_takes_too_much_memory_is_killed() -> None:
    hoard = ["-n1", "-r1", "import time; data = b'x' * 10**8; time.sleep(600)"]

    assert run_module("timeit", hoard, timeout_s=60, memory_gib=0.05).status == "memory"


def test_a_process_that_fails_leaves_its_last_words() -> None:
    outcome = run_module("no_such_module", [], timeout_s=600, memory_gib=4)

    assert outcome.status == "failed"
    assert "no_such_module" in outcome.last_line
