"""`fedpeft audit`: attack one's own training, and print what the attack proves beside what the ledger states."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.cli import output
from fedpeft.cli.changes import table

if TYPE_CHECKING:
    from fedpeft.audits import Membership, Subject
    from fedpeft.tasks import Row
    from fedpeft.training.config import CentralConfig

app = typer.Typer(help="Attack your own training here, on your own rows: an empirical lower bound on epsilon.", no_args_is_help=True)
Job = Annotated[Path, typer.Argument(help="A central job's TOML: base, method, training and the task's rows.", metavar="JOB.TOML")]
Task = Annotated[str | None, typer.Option(help="Which task; the first when left out.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change one setting, as in --set training.steps=50.", metavar="A.B=VALUE")
]
ATTACKS = {"canaries": "rows with a wrong label", "rows": "the rows as they are", "shadows": "the same, calibrated by 4 shadow adapters"}
COLUMNS = ("attack", "candidates", "guesses", "right", "epsilon >=", "AUC", "advantage")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


DELTA = 1e-5
CANDIDATES, READ = 64, 4
"""Rows that an audit takes where the task's ``data.limit`` does not say."""
STEPS = 20
"""Steps that an audit trains where the file has more and ``--set training.steps`` does not ask for them; the output says how many."""


@app.command()
def membership(
    job: Job,
    task: Task = None,
    attack: Annotated[str, typer.Option(help=f"One of {', '.join(ATTACKS)}: {'; '.join(ATTACKS.values())}.")] = "canaries",
    stated: Annotated[float | None, typer.Option(help=f"The epsilon that the ledger states for one example at delta {DELTA:g}.")] = None,
    overrides: Overrides = None,
    json: AsJson = False,
) -> None:
    """Train on a random half of the rows, guess which, and say what epsilon that refutes with 95 % confidence."""
    from fedpeft.audits import Coins, audit_membership, mislabelled
    from fedpeft.errors import ConfigError

    if attack not in ATTACKS:
        raise ConfigError(f"audit: attack {attack!r} is not known; choose one of {list(ATTACKS)}")
    subject, found = _subject(job, task, overrides, CANDIDATES)
    candidates = mislabelled(subject.task, found, subject.seed) if attack == "canaries" else found
    done = audit_membership(subject, candidates, Coins(subject.seed, 4 if attack == "shadows" else 0, DELTA))
    _say(done, stated, subject.task.name, json)


@app.command()
def inversion(
    job: Job,
    task: Task = None,
    per_update: Annotated[int, typer.Option(min=1, help="Rows in one update.")] = 1,
    roles: Annotated[str, typer.Option(help="What trains and travels, as in B,head.")] = "B,head",
    overrides: Overrides = None,
    json: AsJson = False,
) -> None:
    """Read tokens out of one step's update as the coordinator sees it: plain, clipped, with noise, under a mask."""
    from dataclasses import replace

    from fedpeft.audits import invert

    subject, found = _subject(job, task, overrides, READ)
    names = frozenset(roles.split(",")) & subject.spec.layout.roles
    settings = replace(subject.settings, steps=1, batch_size=per_update, accumulate=1, warmup=0)
    done = invert(replace(subject, roles=names, settings=settings), found, per_update=per_update)
    if json:
        return output.emit([vars(line) for line in done])
    title = f"{subject.task.name}: tokens read from one step of {', '.join(sorted(names))} on {per_update} row(s), {settings.optimizer}"
    cells = [(line.view, f"{line.recovered:.1%}", f"{line.chance:.2%}", line.tokens) for line in done]
    return output.table(title, ("the coordinator sees", "read", "by chance", "tokens"), cells)


def _say(done: Membership, stated: float | None, task: str, json: bool) -> None:
    """Print what was found. Raises `PrivacyError` when it refutes what is ``stated``."""
    lines, count = [vars(finding) for finding in done.findings], done.findings[-1].candidates
    if json:
        output.emit({"epsilon": done.epsilon, "stated": stated, "delta": DELTA, "confidence": done.confidence, "attacks": lines})
    else:
        output.table(
            f"{task}: {done.done.steps} steps on {done.members} of {count} candidates", COLUMNS, [tuple(line.values()) for line in lines]
        )
        print(f"with {done.confidence:.0%} confidence epsilon >= {done.epsilon:.3f} at delta {DELTA:g}; {_stated(stated)}")
    _refute(done.epsilon, stated)


def _stated(stated: float | None) -> str:
    return f"the ledger states {stated:.3f}" if stated is not None else "no epsilon is stated: this training promises none"


def _refute(found: float, stated: float | None) -> None:
    from fedpeft.errors import PrivacyError

    if stated is not None and found > stated:
        raise PrivacyError(
            f"audit: epsilon is at least {found:.3f}, the ledger states {stated:.3f}; "
            "noise, sampling or accounting is broken, stop releasing"
        )


def _subject(job: Path, task: str | None, overrides: list[str] | None, rows: int) -> tuple[Subject, list[Row]]:
    """What the job's file describes, and its training rows: the source's ``limit``, or ``rows``, spread over the file."""
    from dataclasses import replace

    from fedpeft.adapters import make_spec
    from fedpeft.audits import Subject
    from fedpeft.bases import load_base
    from fedpeft.tasks import read_rows
    from fedpeft.training.config import load_central

    changes = table(overrides)
    config = load_central(job, changes)
    settings = config.training if "training.steps" in changes else replace(config.training, steps=min(config.training.steps, STEPS))
    entry = config.tasks[_named(config, task)]
    found = read_rows(entry.data.model_copy(update={"limit": entry.data.limit or rows}), "train")
    base = load_base(config.base)
    spec = make_spec(entry.task.name, base, config.method, entry.task.head)
    return Subject(base, entry.task, spec, settings, seed=config.seed), found


def _named(config: CentralConfig, task: str | None) -> str:
    from fedpeft.errors import ConfigError

    if task is not None and task not in config.tasks:
        raise ConfigError(f"audit: task {task!r} is not in the file; choose one of {sorted(config.tasks)}")
    return task or next(iter(config.tasks))
