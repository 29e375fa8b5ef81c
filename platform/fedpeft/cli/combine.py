"""`fedpeft combine`: what may stand in for the mean of the sites' parts when some of them lie, and what that costs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fedpeft.cli import output
from fedpeft.cli.explaining import explain

app = typer.Typer(
    help="List the rules that may stand in for the mean: what they hold against, what they cost, what secure aggregation allows.",
    invoke_without_command=True,
)


@app.callback()
def combine(context: typer.Context, json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the rules; `fedpeft combine show NAME` explains one."""
    if context.invoked_subcommand is not None:
        return
    rows = [_mean(), *_rows()]
    if json:
        return output.emit(rows)
    cells = [(r["rule"], r["against"], str(r["least"]), r["cost"], r["masks"], "yes" if r["two_factors"] else "no") for r in rows]
    columns = ("rule", "holds against", "sites", "time", "masks", "two factors at once")
    output.listing(columns, {"sites: the fewest, with default settings; time: for n parts of d values; masks: what they can hide": cells})
    print(f"{len(rows)} rules; `fedpeft combine show NAME` explains one, [combine] of federation.toml chooses one, and sum is the default.")


@app.command()
def show(name: Annotated[str, typer.Argument(help="A rule of the list.")]) -> None:
    """Explain one rule: its paper, what it does, its settings."""
    from fedpeft.schemes.robust import COMBINES

    explain("combine", name, COMBINES)


def _mean() -> dict[str, Any]:
    return {"rule": "sum", "against": "nobody", "least": 1, "cost": "n d", "masks": "every part", "two_factors": True}


def _rows() -> list[dict[str, Any]]:
    from fedpeft.schemes.robust import COMBINES

    return [_row(name, made()) for name, made in sorted(COMBINES.items())]


def _row(name: str, rule: Any) -> dict[str, Any]:
    masks = "every part, in groups" if rule.sum_only else "nothing"
    about = {"against": rule.against, "least": rule.least, "cost": rule.cost}
    return {"rule": name, **about, "masks": masks, "two_factors": _takes_both(rule)}


def _takes_both(rule: Any) -> bool:
    """Whether it has a meaning while A and B of a LoRA move in one round."""
    from fedpeft.errors import UpdateError
    from fedpeft.schemes import Phase
    from fedpeft.tensors import Entry, Layout

    layout = Layout.of([Entry("A", "q.lora_A.weight", (2, 4)), Entry("B", "q.lora_B.weight", (4, 2))])
    try:
        rule.check(layout, Phase("both", frozenset({"A", "B"})))
    except UpdateError:
        return False
    return True
