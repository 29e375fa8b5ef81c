"""The one training loop: order, seeds, counting, checkpoints. What a step does is the engine's."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedpeft.errors import DataError, UpdateError
from fedpeft.training import checkpoint
from fedpeft.training.checkpoint import Checkpoint, Tally
from fedpeft.training.dp import DpEngine
from fedpeft.training.engine import Ending, Engine, LocalEngine, Private, Run
from fedpeft.training.modes import evaluating, training
from fedpeft.training.settings import TrainJob, TrainResult, TrainSettings

if TYPE_CHECKING:
    from fedpeft.adapters.live import Live
    from fedpeft.tasks import Batch, Encoded, Task
    from fedpeft.update import Counters

ENGINES: dict[str, type[Engine]] = {"local": LocalEngine, "dp": DpEngine}


def train(live: Live, task: Task, data: Encoded, settings: TrainSettings, job: TrainJob, engine: Engine | None = None) -> TrainResult:
    """Train ``job.roles`` of ``live`` for ``settings.steps`` optimizer steps, in place; fewer where the run says that it ended.

    The outcome is the same bits whether or not the job was killed and resumed from ``job.checkpoint`` on the way (but for an
    engine whose sampling and noise are secret, and so fresh), and the global random state is left as it was found. The
    checkpoint stays; `checkpoint.clear` removes it once the result is safe.

    Raises:
        UpdateError: a loss or gradient is not finite, all steps were skipped, or the adapter has no such role.
        DataError: ``data`` holds no example.
        StorageError: the checkpoint cannot be written or read.
        PrivacyError: the engine cannot give the privacy that it is for.
    """
    live.train_roles(job.roles)
    engine = engine or LocalEngine()
    identity = job_digest(live, settings, job, engine)
    with training(live.model, settings), own_randomness(live.flat.device):
        run = engine.begin(live, task, settings, job)
        start = tally = _resume(run, job, identity)
        clock = time.perf_counter() - start.seconds
        source = islice(_source(run, task, data, settings, job.seed), start.step, settings.steps)
        while not _ended(run) and (window := next(source, None)) is not None:
            tally = replace(_step(run, window, tally, job), seconds=time.perf_counter() - clock)
            if job.checkpoint and (tally.step % settings.save_every == 0 or tally.step == settings.steps or _ended(run)):
                _save(job.checkpoint, identity, tally, run)
                if job.saved:
                    job.saved(tally.step, identity)
    return _result(tally, start, run)


def evaluate(live: Live, task: Task, data: Encoded) -> Counters:
    """Counters of ``task`` on ``data``, as sums that add over sites; no dropout, no gradients, modes restored."""
    with evaluating(live.model), torch.no_grad():
        return task.evaluate(live.model, data, live.base)


def job_digest(live: Live, settings: TrainSettings, job: TrainJob, engine: Engine) -> str:
    """SHA-256 over settings, job, engine, adapter schema and the values at the start: equal for a job and its resumption."""
    values = live.flat.detach().cpu().numpy()
    head = repr((settings.digest, job.digest, engine, live.spec.schema))
    return hashlib.sha256(head.encode() + hashlib.sha256(values.data).digest()).hexdigest()


def windows(task: Task, data: Encoded, settings: TrainSettings, seed: int) -> Iterator[Sequence[Batch]]:
    """The micro-batches of each optimizer step, endless; a pure function of seed, epoch and position.

    Raises:
        DataError: an epoch holds no batch.
    """
    stream = _stream(task, data, settings.batch_size, seed)
    while True:
        yield list(islice(stream, settings.accumulate))


def _source(run: Run, task: Task, data: Encoded, settings: TrainSettings, seed: int) -> Iterator[Sequence[Batch]]:
    """The windows of a job from its first step on; what was drawn in secret for steps done is not drawn again, but skipped all the same."""
    return run.windows(data) if isinstance(run, Private) else windows(task, data, settings, seed)


def _stream(task: Task, data: Encoded, size: int, seed: int) -> Iterator[Batch]:
    for epoch in count():
        empty = True
        for batch in task.batches(data, size, seed, epoch):
            empty = False
            yield batch
        if empty:
            raise DataError(f"task {task.name}: no example to train on; give the source rows of the train split")


def _step(run: Run, window: Sequence[Batch], tally: Tally, job: TrainJob) -> Tally:
    """One optimizer step under its own random seed, and the tally after it."""
    torch.manual_seed(_step_seed(job.seed, tally.step))
    sums = run.step(tally.step, window)
    if job.progress:
        job.progress(tally.step + 1, sums.loss / max(sums.count, 1))
    return replace(
        tally,
        step=tally.step + 1,
        loss_sum=tally.loss_sum + sums.loss,
        count=tally.count + sums.count,
        examples=tally.examples + sum(batch.examples for batch in window),
        tokens=tally.tokens + sum(batch.tokens for batch in window),
        skipped=tally.skipped + sums.skipped,
    )


def _ended(run: Run) -> bool:
    return isinstance(run, Ending) and run.ended


def _save(folder: Path, identity: str, tally: Tally, run: Run) -> None:
    arrays = run.state()
    if arrays is not None:
        checkpoint.save(folder, Checkpoint(identity, tally, arrays))


def _resume(run: Run, job: TrainJob, identity: str) -> Tally:
    found = checkpoint.load(job.checkpoint, identity) if job.checkpoint else None
    if found is None:
        return Tally()
    run.restore(found.arrays)
    return found.tally


def _result(tally: Tally, start: Tally, run: Run) -> TrainResult:
    """What may leave: of a private run no sum over the examples that were drawn. Raises `UpdateError` when no step was done."""
    if tally.skipped and tally.skipped == tally.step:
        raise UpdateError(
            f"training: all {tally.step} steps were skipped, since their gradients overflow fp16; "
            "set training.precision = 'bf16' or 'fp32', more training.steps, or look for broken rows"
        )
    private = run.spent(tally.step) if isinstance(run, Private) else None
    fields = asdict(Tally(step=tally.step, seconds=tally.seconds) if private else tally)
    steps, gradient = fields.pop("step"), run.gradient(tally.step - tally.skipped)
    return TrainResult(steps=steps, **fields, resumed_from=start.step, gradient=gradient, private=private)


def _step_seed(seed: int, step: int) -> int:
    """A 63-bit seed of dropout for one step; close seeds and steps give unrelated streams."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:8], "big") >> 1


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Leave torch's global generators as they were found."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
