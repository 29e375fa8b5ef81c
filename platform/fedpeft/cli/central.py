"""`fedpeft central ...`: many tasks' adapters trained at once where their data may be pooled, over ranks with DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.cli.changes import table

if TYPE_CHECKING:
    from fedpeft.central.job import Trained
    from fedpeft.central.launch import Rank
    from fedpeft.central.world import World
    from fedpeft.training.config import CentralConfig

app = typer.Typer(help="Train many tasks' adapters at once with DeepSpeed, on one machine or many.", no_args_is_help=True)

Job = Annotated[Path, typer.Argument(help="The job's TOML (`fedpeft example central` prints one).", metavar="JOB.TOML")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Change a setting: training.steps=50; may be given again.")]
From = Annotated[list[str] | None, typer.Option("--from", help="Go on from a version: version:TASK@3, TASK, sha256:PREFIX; one a task.")]
Launcher = Annotated[str, typer.Option(help="Who starts the ranks: local, torchrun, slurm or hostfile.")]
Ranks = Annotated[int | None, typer.Option(help="With local: how many; default: one a GPU, or one.")]
Pairs = Annotated[bool, typer.Option("--pairs", help="Train every two tasks as well: T (T - 1) / 2 more jobs.")]
Hostfile = Annotated[Path | None, typer.Option(help="With hostfile: lines HOST slots=N; reached by ssh.")]


@dataclass(frozen=True)
class Asked:
    """What the ranks of a job are asked for: its file with its changes, the versions to go on from, and what to do."""

    job: Path
    overrides: list[str] | None = None
    refs: list[str] | None = None
    verb: str = "train"

    def load(self) -> CentralConfig:
        """The job. Raises `ConfigError`."""
        from fedpeft.training.config import load_central

        return load_central(self.job, table(self.overrides))

    @property
    def arguments(self) -> list[str]:
        """What tells a rank all of it."""
        given = [("--set", pair) for pair in self.overrides or []] + [("--from", ref) for ref in self.refs or []]
        return [str(self.job), *(part for pair in given for part in pair), "--verb", self.verb]

    def checked(self, places: list[Rank] | None) -> CentralConfig:
        """The job, refused where that can be before any rank starts; how many there will be is known with ``places``."""
        from fedpeft.central.publish import starts
        from fedpeft.central.zero import zero_of

        config = self.load()
        starts(config, self.refs or [])
        for tracker in config.track:
            tracker.check()
        if places is not None:
            zero_of(config, len(places))
        return config

    def rank(self, world: World) -> int:
        """Do it, as one rank of ``world``."""
        from fedpeft.bases.quiet import hush
        from fedpeft.cli import transfers
        from fedpeft.processes import mortal

        mortal()
        hush()  # before transformers, which DeepSpeed's engine imports, and with it torchao
        if self.verb in ("transfer", "pairs"):
            return transfers.show(self.load(), world, self.verb == "pairs")
        return _rank(self.load(), self.refs or [], world, self.verb == "resume")


@app.command()
def train(  # noqa: PLR0913, PLR0917 - one an option
    job: Job,
    launcher: Launcher = "local",
    ranks: Ranks = None,
    hostfile: Hostfile = None,
    start: From = None,
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--print", help="With local and hostfile: print what each rank would be started with.")] = False,
) -> int:
    """Train, score and publish; a job that was interrupted goes on from its last checkpoint."""
    from fedpeft.central import launch
    from fedpeft.errors import ConfigError

    asked, places = Asked(job, overrides, start), _places(launcher, ranks, hostfile)
    asked.checked(places)
    if not show:
        return _started(asked, launcher, places)
    if places is None:
        raise ConfigError(f"--print: with --launcher {launcher} the ranks are started by others; use local or hostfile")
    print("\n".join(launch.line(place, asked.arguments) for place in places))
    return 0


@app.command()
def resume(
    job: Job, launcher: Launcher = "local", ranks: Ranks = None, hostfile: Hostfile = None, start: From = None, overrides: Overrides = None
) -> int:
    """As `train`, but an error when there is no checkpoint of this very job; ranks and ZeRO stage may be others than before.

    Of another job it is when settings, base, method or the versions of --from are others.
    """
    from fedpeft.errors import StorageError
    from fedpeft.training import checkpoint

    asked, places = Asked(job, overrides, start, "resume"), _places(launcher, ranks, hostfile)
    config = asked.checked(places)
    if checkpoint.read(config.state) is None:
        raise StorageError(f"{config.state}: holds no whole checkpoint to go on from; use `fedpeft central train`")
    return _started(asked, launcher, places)


@app.command()
def export(job: Job, overrides: Overrides = None) -> None:
    """Publish what the last checkpoint holds, of a job that is under way or ended, without its ranks and rows."""
    from fedpeft.bases import meta_base
    from fedpeft.bases.quiet import hush

    hush()  # as `Asked.rank`
    from fedpeft.central.job import beginning, trained

    config = Asked(job, overrides).load()
    _publish(config, trained(config, beginning(config, {}, meta_base(config.base))), {})


@app.command()
def estimate(  # noqa: PLR0913, PLR0917 - one an option
    job: Job,
    ranks: Annotated[int | None, typer.Option(help="Ranks of each machine; default: one a GPU, or one.", min=1)] = None,
    nodes: Annotated[int, typer.Option(help="Machines.", min=1)] = 1,
    gpu_memory: Annotated[float | None, typer.Option(help="GiB of each GPU; default: those of the GPU here.", min=0.1)] = None,
    cpu_memory: Annotated[float | None, typer.Option(help="GiB of host memory of each machine; default: not asked.", min=0.1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, each part in bytes.")] = False,
    overrides: Overrides = None,
) -> int:
    """Say what each rank needs under every ZeRO stage and offload, from the base's config.json alone, and which to take.

    Exit code 1: nothing fits.
    """
    from fedpeft.central.estimate import Room
    from fedpeft.cli import estimates
    from fedpeft.training.config import load_central

    local = ranks if ranks is not None else _gpus()
    room = Room(_bytes(gpu_memory) or _gpu_memory(), _bytes(cpu_memory), local)
    return estimates.show(load_central(job, table(overrides)), local * nodes, room, as_json)


@app.command()
def transfer(
    job: Job,
    pairs: Pairs = False,
    launcher: Launcher = "local",
    ranks: Ranks = None,
    hostfile: Hostfile = None,
    overrides: Overrides = None,
) -> int:
    """Train each task alone and all together, and say what each gains or loses; as JSON in OUTPUT/transfer.json.

    The same command goes on where it was interrupted.
    """
    asked, places = Asked(job, overrides, verb="pairs" if pairs else "transfer"), _places(launcher, ranks, hostfile)
    asked.load()
    return _started(asked, launcher, places)


@app.command(hidden=True)
def rank(job: Job, start: From = None, verb: str = "train", overrides: Overrides = None) -> int:
    """One rank of a job; the launcher says which in RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
    return Asked(job, overrides, start, verb).rank(_given("torchrun"))


def _started(asked: Asked, launcher: str, places: list[Rank] | None) -> int:
    """Start all ranks; where others did, be the one that this process is."""
    from fedpeft.central import launch

    return asked.rank(_given(launcher)) if places is None else launch.supervise(places, asked.arguments)


def _rank(config: CentralConfig, refs: list[str], world: World, resume: bool) -> int:
    from fedpeft.central.job import run, trained
    from fedpeft.central.progress import scores_text, shown
    from fedpeft.central.publish import starts

    given, parents = starts(config, refs)
    with shown(config, world) as progress:
        outcome = run(config, world, given, progress, resume=resume)
    if world.rank:
        return 0
    result = outcome.result
    print(f"{result.steps} steps, {result.tokens} tokens, {result.seconds:.0f} s, mean loss {result.loss:.4f}")
    for name, found in outcome.scores.items():
        print(f"{name}: {scores_text(found)}")
    if config.registry is not None:
        _publish(config, replace(trained(config, outcome.ready.every), scores=outcome.scores), parents)
    return 0


def _publish(config: CentralConfig, trained: Trained, parents: Mapping[str, str]) -> None:
    from fedpeft.central.publish import publish

    for version in publish(config, trained, parents):
        print(f"published {version.task}@{version.number} {version.digest[:12]}")


def _places(launcher: str, ranks: int | None, hostfile: Path | None) -> list[Rank] | None:
    """The ranks to start; None where they are started by others."""
    from fedpeft.central import launch
    from fedpeft.errors import ConfigError

    if launcher not in launch.LAUNCHERS:
        raise ConfigError(f"--launcher {launcher}: choose one of {list(launch.LAUNCHERS)}")
    if (launcher == "hostfile") != (hostfile is not None):
        raise ConfigError("--hostfile FILE goes with --launcher hostfile; give both or none")
    if ranks is not None and launcher != "local":
        raise ConfigError(f"--ranks {ranks}: with --launcher {launcher} others say how many; leave it out")
    if launcher in ("torchrun", "slurm"):
        return None
    return launch.hosts(hostfile) if hostfile else launch.here(ranks if ranks is not None else _gpus())


def _given(launcher: str) -> World:
    from fedpeft.central.launch import slurm
    from fedpeft.central.world import World
    from fedpeft.errors import ConfigError

    found = slurm(os.environ) if launcher == "slurm" else World.of(os.environ)
    if found is None:
        raise ConfigError(f"--launcher {launcher}: RANK and WORLD_SIZE are not set; start with torchrun, or use --launcher local")
    return found


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * 2**30)


def _gpu_memory() -> int | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _gpus() -> int:
    import torch

    return max(torch.cuda.device_count(), 1)
