"""`fedpeft ledger ...`: what was spent of the privacy budgets, whether the record holds, and what comes next."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedpeft.cli import output
from fedpeft.config import read_toml
from fedpeft.control.place import FEDERATIONS

app = typer.Typer(help="Show, verify and forecast what differential privacy has cost.", no_args_is_help=True)

HERE = Path("ledger")
FILES = ("site.toml", *FEDERATIONS)
"""Whose state folder may hold it."""


def _found(given: Path) -> Path:
    """``given``; where nothing was and no such folder is here, the ledger of the site or the federation that is. Raises `ConfigError`."""
    if given != HERE or given.is_dir():
        return given
    files = (Path(name) for name in FILES if Path(name).is_file())
    places = (file.parent / Path(str(read_toml(file).get("state", "state"))).expanduser() / HERE for file in files)
    return next((place for place in places if place.is_dir()), given)


Folder = Annotated[
    Path,
    typer.Option(
        "--ledger", envvar="FEDPEFT_LEDGER", callback=_found, help="Folder of the ledger; without, that of the site or federation here."
    ),
]
Delta = Annotated[float, typer.Option(min=1e-300, max=0.999, help="Delta at which epsilon is told.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _open(folder: Path) -> Any:
    from fedpeft.errors import StorageError
    from fedpeft.privacy.ledger import Ledger

    ledger = Ledger(folder)
    if not ledger.path.is_file():
        raise StorageError(f"{folder}: no ledger there; give --ledger or set FEDPEFT_LEDGER (a federation keeps it in its state folder)")
    return ledger


@app.command()
def show(ledger: Folder = HERE, delta: Delta = 1e-5, json: AsJson = False) -> None:
    """Print what every task and every site has spent, of every kind of release."""
    opened = _open(ledger)
    tasks, sites = _rows(opened, delta, "task"), _rows(opened, delta, "site")
    if json:
        return output.emit({"delta": delta, "tasks": tasks, "sites": sites, "head": list(opened.head())})
    for what, rows in (("task", tasks), ("site", sites)):
        columns = (what, "protects", "releases", "of which", "epsilon")
        output.table(f"{ledger} by {what}, delta {delta:g}", columns, [tuple(row.values()) for row in rows])
    return None


@app.command()
def verify(
    ledger: Folder = HERE,
    head: Annotated[str | None, typer.Option(help="NUMBER:HASH that was seen before and must still be there.")] = None,
) -> None:
    """Check every number, hash and signature; with --head, that no entry was taken away."""
    from fedpeft.errors import PrivacyError

    opened = _open(ledger)
    faults = opened.verify(_head(head) if head else None)
    if faults:
        raise PrivacyError("\n".join(faults))
    number, mark = opened.head()
    print(f"{ledger}: {number} entries, every hash and signature holds; the head is {number}:{mark}")


@app.command()
def forecast(
    ledger: Folder = HERE,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to come, each with the last round's releases.")] = 1,
    delta: Delta = 1e-5,
    json: AsJson = False,
) -> None:
    """Print what every task will have spent after more rounds like its last."""
    from fedpeft.privacy.accounting import epsilon

    rows = []
    for (task, unit), charges in sorted(_by(_open(ledger), "task").items()):
        last = {charge.kind: charge.event for charge in charges}
        spent = [charge.event for charge in charges]
        steps = [epsilon([*spent, *(event.times(count) for event in last.values() if count)], delta) for count in (0, 1, rounds)]
        rows.append(dict(zip(("task", "protects", "epsilon", "after one", f"after {rounds}"), (task, unit, *steps), strict=True)))
    if json:
        return output.emit(rows)
    columns = ("task", "protects", "epsilon now", "after one more round", f"after {rounds} more")
    return output.table(f"{ledger}, delta {delta:g}", columns, [tuple(row.values()) for row in rows])


def _rows(opened: Any, delta: float, by: str) -> list[dict[str, Any]]:
    from collections import Counter

    from fedpeft.privacy.accounting import epsilon

    rows = []
    for (name, unit), charges in sorted(_by(opened, by).items()):
        kinds = Counter(charge.kind for charge in charges)
        of = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        spent = epsilon([charge.event for charge in charges], delta)
        rows.append({by: name, "protects": unit, "releases": len(charges), "of which": of, "epsilon": spent})
    return rows


def _by(opened: Any, what: str) -> dict[tuple[str, str], list[Any]]:
    """Charges by task or by site, and by what they protect; one without sites costs every site that is named anywhere."""
    charges = [entry.charge for entry in opened.entries()]
    everyone = sorted({site for charge in charges for site in charge.sites})
    found: dict[tuple[str, str], list[Any]] = {}
    for charge in charges:
        for name in (charge.task,) if what == "task" else charge.sites or everyone:
            found.setdefault((name, charge.unit), []).append(charge)
    return found


def _head(text: str) -> tuple[int, str]:
    """Raises `ConfigError` on another form."""
    from fedpeft.errors import ConfigError

    number, _, mark = text.partition(":")
    if not number.isdigit() or len(mark) != 64:
        raise ConfigError(f"--head {text}: write NUMBER:HASH as `fedpeft ledger verify` prints it")
    return int(number), mark
