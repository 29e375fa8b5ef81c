"""The members of `Method` that do not differ among grafts, as functions that the classes of this room take over; no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedpeft.config import describe
from fedpeft.methods import values
from fedpeft.tensors import Layout

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.bases.spec import HeadSpec
    from fedpeft.methods.protocol import Entries, Method


def leaf_of(kind: str) -> str:
    """The attribute of a host that holds the tensors of ``kind``: its first word."""
    return kind.partition("-")[0]


def entries(method: Method, model: nn.Module) -> Entries:
    """What was hung on the model, its role being the first part of the name after the host's, and the head."""
    from fedpeft.methods.attached import attached_to, head_entries

    mark = f".{leaf_of(method.kind)}."
    own = attached_to(model).own
    found: Entries = {f"{values.PREFIX}{name}": (f".{name}".rpartition(mark)[2].partition(".")[0], p) for name, p in own.items()}
    return found | head_entries(model)


def unscaled(method: Method, role: str) -> float:
    """Nothing is folded."""
    return 1.0


def peft_config(method: Method, base_model: str, head: HeadSpec, layout: Layout) -> dict[str, Any]:
    """A type that peft refuses, since it has no such method, with the settings and the hosts: only fedpeft loads it."""
    mark = f".{leaf_of(method.kind)}."
    hosts = dict.fromkeys(name.rpartition(mark)[0].removeprefix(values.PREFIX) for name in layout.names if mark in name)
    settings = {key: value for key, value in describe(method).items() if key not in ("kind", "targets")}
    return (
        values.common(base_model, head, layout)
        | settings
        | {
            "peft_type": f"FEDPEFT_{method.kind.upper().replace('-', '_')}",
            "target_modules": list(hosts),
            "modules_to_save": values.head_modules(layout),
        }
    )


def detach(method: Method, model: nn.Module) -> None:
    """Take hooks and tensors away."""
    from fedpeft.methods.attached import end

    end(model)
