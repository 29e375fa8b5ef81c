"""An adapter: method, base, head and named tensors for one task; on disk, in memory, and live on a warm base.

Importing this imports no torch; `make_spec`, `initial` and `attach` do when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedpeft.adapters.folder import load, save
from fedpeft.adapters.spec import Adapter, AdapterSpec

if TYPE_CHECKING:
    from fedpeft.adapters.live import Live
    from fedpeft.bases import Base, HeadSpec
    from fedpeft.methods.protocol import Method

__all__ = ["Adapter", "AdapterSpec", "attach", "initial", "load", "make_spec", "save"]


def make_spec(task: str, base: Base, method: Method, head: HeadSpec) -> AdapterSpec:
    """The spec of ``method`` with ``head`` on ``base``; a meta base is enough. Raises `AdapterError` when nothing matches."""
    from fedpeft.adapters.making import make_spec as make

    return make(task, base, method, head)


def initial(base: Base, spec: AdapterSpec, seed: int) -> Adapter:
    """The round-0 adapter, a function of ``spec`` and ``seed``. Raises `AdapterError` when it needs weights and there are none."""
    from fedpeft.adapters.making import initial as make

    return make(base, spec, seed)


def attach(base: Base, spec: AdapterSpec) -> Live:
    """`Live.attach`, for callers that import no torch themselves."""
    from fedpeft.adapters.live import Live

    return Live.attach(base, spec)
