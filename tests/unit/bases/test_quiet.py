"""What stands in for `torch.compile` while bitsandbytes is imported."""

from __future__ import annotations

import torch

from fedpeft.bases.quiet import later


def test_a_function_is_compiled_once_and_when_it_is_called(monkeypatch):
    asked = []

    def compile(function, **settings):
        asked.append(settings)
        return lambda *arguments: ("compiled", function(*arguments))

    monkeypatch.setattr(torch, "compile", compile)

    @later(dynamic=False)
    def twice(value):
        """Double."""
        return 2 * value

    assert (asked, twice.__doc__) == ([], "Double.")
    assert [twice(3), twice(4)] == [("compiled", 6), ("compiled", 8)]
    assert asked == [{"dynamic": False}]
    assert later(abs)(-1) == ("compiled", 1)
    assert asked == [{"dynamic": False}, {}]
