"""What all ranks must agree on: that each one's part went well, and that they hold the same data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fedpeft.central.world import World
from fedpeft.errors import DataError, FedpeftError, LinkError, kind_of

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def together(world: World, work: Callable[[], T]) -> T:
    """``work()`` on every rank; a fault of one ends all, each with that fault's exit code.

    Raises:
        FedpeftError: what ``work`` raised here, or on the first rank where it failed.
    """
    result, fault = None, None
    try:
        result = work()
    except FedpeftError as found:
        fault = found
    said = gathered(world, None if fault is None else (type(fault).exit_code, str(fault)))
    if fault is not None:
        raise fault
    for rank, other in enumerate(said):
        if other is not None:
            raise (kind_of(other[0]) or LinkError)(f"rank {rank}: {other[1]}")
    return result  # type: ignore[return-value]


def require_equal(world: World, what: str, value: str) -> None:
    """Raise `DataError` on all ranks unless ``value`` is the same on all of them."""
    said = gathered(world, value)
    other = next((rank for rank, seen in enumerate(said) if seen != said[0]), None)
    if other is not None:
        raise DataError(
            f"{what}: rank 0 has {str(said[0])[:40]}, rank {other} has {str(said[other])[:40]}; "
            "every rank must read the same files, put them where all machines see them"
        )


def add_up(world: World, values: Tensor) -> None:
    """Sum ``values`` over all ranks, in place; they lie in one piece, since gloo adds others wrongly and says nothing."""
    if world.size > 1:
        import torch.distributed as dist

        dist.all_reduce(values)


def gathered(world: World, value: Any) -> list[Any]:
    """Every rank's ``value``: text, numbers and None, as JSON."""
    import json

    import torch
    import torch.distributed as dist

    if world.size == 1:
        return [value]
    body = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=world.device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=world.device) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(body)], device=world.device))
    room = max(int(size) for size in sizes)
    bodies = [torch.zeros(room, dtype=torch.uint8, device=world.device) for _ in range(world.size)]
    dist.all_gather(bodies, torch.nn.functional.pad(body, (0, room - len(body))))
    return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(bodies, sizes, strict=True)]
