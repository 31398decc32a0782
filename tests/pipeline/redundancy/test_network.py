"""The redundancy of a network as a whole."""

import pytest
import torch

from pipeline.redundancy.network import linear_cka, network_redundancy
from tests.pipeline.maps import draw, seen, view


def test_a_network_as_a_whole_has_a_maximum_compression_and_groups_that_respond_alike() -> None:
    values = torch.randn(40, 6, generator=draw())
    turned = 3 * values @ torch.linalg.qr(torch.randn(6, 6, generator=draw()))[0] + 1
    other = torch.randn(40, 6, generator=torch.Generator().manual_seed(99))
    views = [
        view(torch.eye(6, 8)[None], name=name, seen=(seen(one),))
        for name, one in (("a", values), ("b", turned), ("c", other))
    ]

    found = network_redundancy(views)

    assert found.groups == ("a", "b", "c")
    assert found.similarity[0] == pytest.approx([1, 1, found.similarity[2][0]])
    assert found.similarity[0][2] < 0.5
    assert [(one.count, one.share) for one in found.compression] == [
        ("energy", 0), ("threshold", 0), ("entropy", pytest.approx(0, abs=1e-6))
    ]  # fmt: skip


def test_a_network_whose_compression_cannot_be_told_says_why() -> None:
    few = view(torch.randn(2, 9, 4, generator=draw()), seen=(seen(torch.randn(20, 9)),))

    found = network_redundancy([few])

    assert found.compression == () and "too few to tell 9 filters apart" in found.note


def test_cka_ignores_rotation_and_scale_and_sees_independence() -> None:
    values = torch.randn(50, 4, generator=draw())
    turn = torch.linalg.qr(torch.randn(4, 4, generator=draw()))[0]
    apart = torch.linalg.qr(torch.cat([torch.ones(50, 1), values, values.roll(7, 0)], dim=1))[0]

    assert linear_cka(values, 3 * values @ turn) == pytest.approx(1, abs=1e-5)
    assert linear_cka(apart[:, 1:5], apart[:, 5:9]) == pytest.approx(0, abs=1e-5)
