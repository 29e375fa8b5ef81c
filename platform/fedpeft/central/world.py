"""Ranks: who they are, how they meet, and DeepSpeed's start without the traps that it has on machines without MPI or compiler."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from fedpeft.errors import ConfigError, FedpeftError, LinkError

if TYPE_CHECKING:
    import torch

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What every launcher sets for each rank, torchrun too."""


@dataclass(frozen=True)
class World:
    """This process's number among all and on its machine, how many there are, and where rank 0 listens."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    address: str = "127.0.0.1"
    port: int = 0

    @staticmethod
    def of(environment: Mapping[str, str]) -> World | None:
        """What a launcher said; None when it said nothing. Raises `ConfigError` when it said half of it."""
        found = {name: environment[name] for name in NAMES if environment.get(name)}
        if "RANK" not in found and "WORLD_SIZE" not in found:
            return None
        missing = [name for name in NAMES if name not in found]
        if missing:
            raise ConfigError(f"environment: {sorted(found)} are set, {missing} are not; unset all, or start with torchrun or --launcher")
        try:
            numbers = [int(found[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")]
        except ValueError:
            raise ConfigError(f"environment: {found} holds no whole numbers; start with torchrun or --launcher") from None
        return World(numbers[0], numbers[1], numbers[2], found["MASTER_ADDR"], numbers[3])

    def environment(self) -> dict[str, str]:
        """Inverse of `of`."""
        values = (self.rank, self.local_rank, self.size, self.address, self.port)
        return {name: str(value) for name, value in zip(NAMES, values, strict=True)}

    @property
    def device(self) -> str:
        """This rank's own GPU, or the CPU; where a launcher shows each rank one GPU alone, that is number 0."""
        import torch

        count = torch.cuda.device_count()
        return f"cuda:{self.local_rank if count > 1 else 0}" if count else "cpu"


@contextmanager
def joined(world: World, seconds: float) -> Iterator[None]:
    """Within, the ranks of ``world`` can talk, over NCCL or gloo; each wait ends after ``seconds``.

    One meeting lasts as long as the process needs it: DeepSpeed remembers its groups. Within it others may be opened, which are the same.

    Raises:
        LinkError: not all ranks came, or one was lost on the way.
        ConfigError: DeepSpeed is not installed.
    """
    import torch.distributed as dist

    start_deepspeed(world)
    first = not dist.is_initialized()
    if first:
        _meet(world, seconds)
    try:
        yield
    except FedpeftError:
        raise
    except RuntimeError as fault:
        if _of_the_link(fault):
            raise LinkError(
                f"rank {world.rank} of {world.size}: another rank was lost ({str(fault).splitlines()[0][:160]}); "
                "look at what it said, then run the same command again: it goes on from the last checkpoint"
            ) from None
        raise
    finally:
        if first:
            dist.destroy_process_group()


def _meet(world: World, seconds: float) -> None:
    import deepspeed

    os.environ.update(world.environment())
    backend = "nccl" if world.device != "cpu" else "gloo"
    try:
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError, OSError) as fault:
        raise LinkError(
            f"rank {world.rank} of {world.size}: not all ranks met at {world.address}:{world.port} within {seconds:.0f} s "
            f"({str(fault).splitlines()[0][:160]}); start all of them, and look whether the address can be reached"
        ) from None


def start_deepspeed(world: World) -> None:
    """Import DeepSpeed so that it neither asks for MPI, nor compiles, nor waits for another process's lock. Raises `ConfigError`."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if world.device != "cpu" else "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    try:
        import deepspeed
        import deepspeed.ops as ops
    except ImportError as fault:
        raise ConfigError(f"central training needs DeepSpeed ({fault}); run pip install 'fedpeft[central]'") from None
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # DeepSpeed calls it by its old names
    ops.__compatible_ops__ = {}  # lazily probed; empty means that nothing is built at start, where a lock left behind waits for ever
    deepspeed.utils.logger.setLevel("ERROR")


def place(world: World) -> torch.device:
    """This rank's device, made current."""
    import torch

    device = torch.device(world.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _of_the_link(fault: RuntimeError) -> bool:
    said = str(fault).lower()
    return any(word in said for word in ("connection", "gloo", "nccl", "timed out", "timeout", "socket", "peer"))
