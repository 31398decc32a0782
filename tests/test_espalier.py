"""The public names: all of them work, each says what it is, and there are no others."""

import inspect

import espalier


def test_every_public_name_is_there_and_says_what_it_is():
    silent = [name for name in espalier.__all__ if not inspect.getdoc(getattr(espalier, name))]

    assert not silent


def test_nothing_else_is_public():
    there = {name for name in vars(espalier) if not name.startswith("_")}

    assert there == set(espalier.__all__)


def test_names_are_in_order_and_there_once():
    assert sorted(set(espalier.__all__)) == espalier.__all__


def test_what_a_public_function_takes_and_returns_of_ours_is_public():
    public = [getattr(espalier, name) for name in espalier.__all__]
    kinds = {
        kind
        for function in filter(inspect.isfunction, public)
        for kind in inspect.get_annotations(function, eval_str=True).values()
        if isinstance(kind, type) and kind.__module__.startswith(("hardware", "pipeline"))
    }

    assert kinds and kinds <= set(public)
