"""Modules that have moved are found under the names that they had."""

from importlib import import_module

import pytest

import philens


@pytest.mark.parametrize("old", philens._MOVED)
def test_a_module_is_the_same_under_both_names(old: str) -> None:
    new = import_module(f"philens.{philens._MOVED[old]}")
    assert import_module(f"philens.{old}") is new
    assert new.__name__ == new.__spec__.name == f"philens.{philens._MOVED[old]}"  # pyright: ignore[reportOptionalMemberAccess]


def test_others_are_not_there() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"philens\.hubs"):
        import_module("philens.hubs")
    from philens.hub import load_pretrained  # pyright: ignore[reportMissingImports]

    assert load_pretrained is philens.load_pretrained
