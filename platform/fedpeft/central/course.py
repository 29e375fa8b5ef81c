"""What happens between a job's steps: scores are taken, checkpoints kept, and progress is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedpeft.central.engine import ZeroEngine, ZeroRun
from fedpeft.central.keeping import Keeper
from fedpeft.central.progress import Clock, Progress, Report, Scores, most_memory
from fedpeft.central.scoring import Scorer
from fedpeft.central.world import World

if TYPE_CHECKING:
    from fedpeft.training.config import CentralConfig


@dataclass(eq=False)
class Watched:
    """An engine whose run can be asked while the loop has it."""

    engine: ZeroEngine
    run: ZeroRun | None = None

    def __repr__(self) -> str:
        return repr(self.engine)

    def begin(self, *arguments: Any) -> ZeroRun:
        """See `Engine.begin`."""
        self.run = self.engine.begin(*arguments)
        return self.run


@dataclass(eq=False)
class Course:
    """What happens between steps: scores are taken when they are due, checkpoints kept, and progress is told."""

    config: CentralConfig
    world: World
    engine: Watched
    scorer: Scorer
    progress: Progress | None
    clock: Clock = field(default_factory=Clock)
    scores: Scores = field(default_factory=dict)
    saved: tuple[str, int] | None = None

    def step(self, step: int, loss: float) -> None:
        """The loop did ``step`` steps."""
        run, steps, every = self._run, self.config.training.steps, self.config.evaluate.every
        speed, seconds = self.clock.step(run.tokens), self.clock.seconds
        with self.clock.paused():
            self.scores = self.scorer() if step == steps or (every and step % every == 0) else {}
            if self.progress is not None:
                self.progress(Report(step, steps, loss, run.losses, seconds, speed, most_memory(), self.scores, run.told))

    def save(self, step: int, job: str) -> None:
        """The loop wrote a checkpoint."""
        self.saved = (job, step)
        if self.world.rank == 0:
            Keeper.of(self.config).save(job, step, self.scores)

    def final(self) -> Scores:
        """Scores of what the job gives; taken now where the job ended early, or a resumed one had no step left to do."""
        if not self.scores:
            self._run.started()
            self.scores = self.scorer()
            if self.saved:
                self.save(self.saved[1], self.saved[0])
        best = Keeper.of(self.config).chosen()
        return best.scores if best is not None else self.scores

    @property
    def _run(self) -> ZeroRun:
        assert self.engine.run is not None
        return self.engine.run
