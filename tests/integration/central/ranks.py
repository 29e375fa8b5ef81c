"""The ranks of a world of one and of a world of two, each with several central jobs: ``python ranks.py FOLDER PART``.

All run at the same time, forked from one process that has loaded torch and DeepSpeed; each leaves a half-done job for the other to go on
with. PART is ``first`` or, for what takes minutes, ``more``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

import torch
from playing import RUNS, elsewhere, noted, play, waited

from fedpeft.bases import meta_base
from fedpeft.bases.spec import BaseSpec
from fedpeft.central.engine import ZeroEngine
from fedpeft.central.joint import JointModel
from fedpeft.central.pool import Part
from fedpeft.central.world import World, joined, start_deepspeed
from fedpeft.cli.transfers import show
from fedpeft.locks import NAME, held
from fedpeft.processes import free_port, hold
from fedpeft.training.config import load_central

STREAMED = {"training__save_every": "1", "tasks__animals__stream": "true", "tasks__colours__stream": "true"}
BALANCED = {
    "uncertainty": {"balance": '{kind = "uncertainty", lr = 0.2}'},
    "coba": {
        "balance": '{kind = "coba", warmup = 2}',
        "validation__every": "1",
        "validation__examples": "6",
        "tasks__animals__stream": "true",
    },
    "pcgrad": {
        "shared": "true",
        "conflicts": "pcgrad",
        "training__steps": "6",
        "training__lr": "0.02",
        "training__warmup": "0",
        "tasks__animals__data__path": "yes.jsonl",
        "tasks__colours__data__path": "no.jsonl",
    },
    "ending": {
        "validation__every": "1",
        "validation__examples": "8",
        "validation__patience": "2",
        "validation__min_delta": "0.3",
        "validation__metric": '{ animals = "perplexity" }',
        "tasks__animals__stream": "true",
        "training__steps": "30",
        "training__lr": "0.02",
        "tasks__colours__data__path": "noise.jsonl",
    },
    "hydra": {"shared": "true", "shared_method": '{kind = "hydralora", r = 2, experts = 2, targets = ["all"]}', "conflicts": "report"},
}
"""Jobs whose tasks weigh against each other in other ways than by default."""


def balanced(folder: Path, world: World, stage: str, *kinds: str) -> dict[str, object]:
    """``kinds`` of ``BALANCED`` from end to end, and on one rank once cut short after three steps and gone on with."""
    found: dict[str, object] = {}
    for kind in kinds:
        found[kind] = play(folder, world, f"{kind}{world.size}", deepspeed__stage=stage, **BALANCED[kind])
    for kind in {"uncertainty", "coba", "pcgrad"} & set(kinds) if world.size == 1 else ():
        every = {"deepspeed__stage": stage, "training__save_every": "1", **BALANCED[kind]}
        play(folder, world, f"{kind}-cut{world.size}", stop=3, **every)
        with elsewhere():
            found[f"{kind}-resumed"] = play(folder, world, f"{kind}-cut{world.size}", **every)
    return found


def ending(folder: Path, world: World, stage: str) -> dict[str, object]:
    """The job one of whose tasks ends early, and the same left at that step."""
    found = balanced(folder, world, stage, "ending")
    steps = found["ending"]["losses"]  # type: ignore[index]
    ended = next(number for number, step in enumerate(steps) if "animals" not in step)
    play(folder, world, f"ending-cut{world.size}", stop=ended, deepspeed__stage=stage, training__save_every="1", **BALANCED["ending"])
    return found


BYTES = {"training__optimizer": "adamw8bit", "training__save_every": "1", "method": '{ kind = "lora", r = 16, targets = ["all"] }'}
"""Wide enough that moments are held in codes: below 4096 values they are not."""


def bytewise(folder: Path, world: World, stage: str, after: str) -> dict[str, object]:
    """A job whose moments are a byte each, and one cut short after two steps in ``stage`` that goes on in stage ``after``."""
    name = f"bytes{world.size}"
    found: dict[str, object] = {"bytes": play(folder, world, name, deepspeed__stage=stage, **BYTES)}
    play(folder, world, f"{name}-cut", stop=2, deepspeed__stage=stage, **BYTES)
    return found | {"bytes-resumed": play(folder, world, f"{name}-cut", deepspeed__stage=after, **BYTES)}


FP16 = {"training__precision": "fp16", "training__save_every": "1"}
OVERFLOWS = 1
"""The step, from 0, whose gradients overflow in jobs of ``FP16``: on the last rank alone."""
forward = JointModel.forward


def overflowing(self: JointModel, part: Part) -> torch.Tensor:
    """`JointModel.forward`, whose backward may overflow as that of fp16 does."""
    found, run = forward(self, part), RUNS[-1]
    last = run.world.rank == run.world.size - 1
    if run.scaler is not None and last and run._steps == OVERFLOWS and run.settings.save_every == 1 and found.requires_grad:
        found.register_hook(lambda gradient: gradient * torch.inf)  # type: ignore[no-untyped-call]
    return found


def scaled(folder: Path, world: World, stage: str, cut: bool = False) -> dict[str, object]:
    """A job in fp16, and one left after three steps and gone on with."""
    name = f"scaled{world.size}-{stage}"
    found: dict[str, object] = {f"scaled{stage}": play(folder, world, name, deepspeed__stage=stage, **FP16)}
    if not cut:
        return found
    play(folder, world, f"{name}-cut", stop=3, deepspeed__stage=stage, **FP16)
    return found | {f"scaled{stage}-resumed": play(folder, world, f"{name}-cut", deepspeed__stage=stage, **FP16)}


def half(folder: Path, world: World, **changes: str) -> None:
    """Leave a job, whose rows are streamed, after two of its steps, and say so."""
    play(folder, world, f"half{world.size}", stop=2, **STREAMED, **changes)
    (folder / f"half{world.size}" / "left").touch()


def compared(folder: Path, world: World) -> None:
    """The table of each task alone and with the other, from a job that shares nothing."""
    table = {"output": str(folder / f"compared{world.size}"), "mixing": "equal", "training.steps": "2"}
    show(load_central(folder / "job.toml", table), world, pairs=True)


SCORED = {
    "tasks__animals__metrics": '["perplexity", "exact_match"]',
    "tasks__animals__max_new_tokens": "3",
    "evaluate__every": "1",
    "training__save_every": "1",
    "checkpoints": '{ keep = 2, best = "colours" }',
}


def others(folder: Path) -> dict[str, dict[str, str]]:
    """Jobs on other kinds of base: an encoder that classifies, with a head for each task, one in 8 bit, and an encoder-decoder."""
    encoder = json.loads((folder / "encoder.json").read_text())
    return {"encoder": encoder, "int8": {"base.quantization": "int8", "training.steps": "2"}, "paired": {"base.model": "t5"}}


def one(folder: Path, world: World) -> dict[str, object]:
    """A world of one: what `make test` looks at."""
    found: dict[str, object] = {"stage0": play(folder, world, "one0", deepspeed__stage="0")}
    half(folder, world, deepspeed__stage="1")
    found["single"] = play(folder, world, "single1", deepspeed__stage="2", **json.loads((folder / "single.json").read_text()))
    found["full"] = play(folder, world, "full1", full=2, deepspeed__stage="0", training__save_every="1")
    with held(folder / "full1" / NAME, "trains", ""):
        found["taken"] = play(folder, world, "full1", deepspeed__stage="0", training__save_every="1")
    found["changed"] = play(folder, world, "full1", resume=True, deepspeed__stage="0", training__lr="0.5")
    found["diverged"] = play(folder, world, "diverged1", deepspeed__stage="0", training__lr="1e38", training__clip="0.0")
    found |= balanced(folder, world, "0", "uncertainty") | scaled(folder, world, "0", cut=True)
    waited(folder / "half2" / "left")
    found["resumed"] = play(folder, world, "half2", deepspeed__stage="0", **STREAMED)
    return found


def two(folder: Path, world: World) -> dict[str, object]:
    """A world of two: what `make test` looks at."""
    half(folder, world, deepspeed="own.json")
    found: dict[str, object] = {"stage3": play(folder, world, "two3", deepspeed__stage="3")}
    found["nf4.3"] = play(folder, world, "nf4-3", deepspeed__stage="3", base__quantization="nf4")
    missing = {"tasks__animals__data__path": "nowhere.jsonl"} if world.rank else {}
    found["missing"] = play(folder, world, "missing2", deepspeed__stage="2", **missing)
    other = {"tasks__animals__data__path": "colours.jsonl"} if world.rank else {}
    found["other"] = play(folder, world, "other2", deepspeed__stage="2", **other)
    found |= balanced(folder, world, "2", "uncertainty") | scaled(folder, world, "2") | bytewise(folder, world, "2", "2")
    waited(folder / "half1" / "left")
    found["resumed"] = play(folder, world, "half1", deepspeed__stage="2", **STREAMED)
    return found


def one_more(folder: Path, world: World) -> dict[str, object]:
    """A world of one: the other stages, bases, packings, balances, and scores."""
    found: dict[str, object] = {f"stage{stage}": play(folder, world, f"one{stage}", deepspeed__stage=stage) for stage in "123"}
    found |= {name: play(folder, world, f"{name}1", deepspeed__stage="0", **changes) for name, changes in others(folder).items()}
    found["padded"] = play(folder, world, "padded1", deepspeed__stage="0", training__packing="false")
    found["shared"] = play(folder, world, "shared1", shared="true", deepspeed__stage="0")
    found["scored"] = play(folder, world, "scored1", deepspeed__stage="0", **SCORED)
    found["again"] = play(folder, world, "scored1", deepspeed__stage="0", **SCORED)
    found |= balanced(folder, world, "0", "coba", "pcgrad", "hydra") | ending(folder, world, "0")
    found |= scaled(folder, world, "1") | scaled(folder, world, "3", cut=True) | bytewise(folder, world, "1", "0")
    found["floats"] = play(folder, world, "floats1", deepspeed__stage="0", **BYTES | {"training__optimizer": "adamw"})
    compared(folder, world)
    for name, changes in others(folder).items():
        waited(folder / f"{name}-half2" / "left")
        every = {"deepspeed__stage": "0", "training__save_every": "1", **changes}
        found[f"{name}-resumed"] = play(folder, world, f"{name}-half2", **every)
    return found


def two_more(folder: Path, world: World) -> dict[str, object]:
    """A world of two: the other stages, bases, packings, balances, and scores."""
    for name, changes in others(folder).items():
        play(folder, world, f"{name}-half2", stop=1, deepspeed__stage="3", training__save_every="1", **changes)
        (folder / f"{name}-half2" / "left").touch()
    found: dict[str, object] = {f"stage{stage}": play(folder, world, f"two{stage}", deepspeed__stage=stage) for stage in "012"}
    found |= {name: play(folder, world, f"{name}2", deepspeed__stage="3", **changes) for name, changes in others(folder).items()}
    found["padded"] = play(folder, world, "padded2", deepspeed__stage="2", training__packing="false")
    found["shared"] = play(folder, world, "shared2", shared="true", deepspeed__stage="3")
    found["scored"] = play(folder, world, "scored2", deepspeed__stage="3", **SCORED)
    found["again"] = play(folder, world, "scored2", deepspeed__stage="3", **SCORED)
    found["offloaded"] = play(folder, world, "offloaded2", deepspeed__stage="2", deepspeed__offload="cpu")
    found["nf4.2"] = play(folder, world, "nf4-2", deepspeed__stage="2", base__quantization="nf4")
    for kind in ("bf16", "fp16"):
        found[kind] = play(folder, world, kind, deepspeed__stage="3", base__quantization=kind, training__steps="1")
    found |= scaled(folder, world, "0") | scaled(folder, world, "3")
    found |= balanced(folder, world, "2", "coba", "pcgrad", "hydra") | ending(folder, world, "2")
    compared(folder, world)
    return found


PARTS = {"first": (one, two), "more": (one_more, two_more)}


def main(folder: Path, part: str) -> int:
    """Fork the ranks and wait for them; the first that fails ends all, and its exit code is ours."""
    import peft  # noqa: F401

    start_deepspeed(World())
    meta_base(BaseSpec(str(folder / "model")))
    os.chdir(folder)
    assert threading.active_count() == 1, "a fork would lose the others"
    ports, started = {1: free_port(), 2: free_port()}, set()
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        pid = os.fork()
        if not pid:
            os._exit(rank_of(World(rank, rank, size, port=ports[size]), folder, part))
        started.add(pid)
    hold()
    while started:
        pid, status = os.wait()
        started.discard(pid)
        if status:
            for other in started:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


def rank_of(world: World, folder: Path, part: str) -> int:
    """One rank, which ends with whoever started its parent; its exit code."""
    hold()
    log = os.open(folder / f"{part}{world.size}.{world.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(world.environment())
    ZeroEngine.begin = noted  # type: ignore[method-assign]
    JointModel.forward = overflowing  # type: ignore[method-assign]
    try:
        with joined(world, 60):
            found = PARTS[part][world.size - 1](folder, world)
        (folder / f"{part}{world.size}.{world.rank}.json").write_text(json.dumps(found))
    except BaseException:  # noqa: BLE001 - a fork must not go on as its parent
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
