"""`fedpeft schemes`: how adapters may be averaged, what a site sends for it, and what it loses."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fedpeft.cli import output
from fedpeft.cli.explaining import explain

app = typer.Typer(
    help="List federated averaging schemes: what travels, what is exact, what secure aggregation allows.", invoke_without_command=True
)

WIDTH, RANK = 768, 8
ROUNDS = (3, 4, 5, 6)
"""Rounds whose bytes are shown: after any that only find factors."""


@app.callback()
def schemes(context: typer.Context, json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the schemes; `fedpeft schemes show NAME` explains one."""
    if context.invoked_subcommand is not None:
        return
    rows = _rows()
    if json:
        return output.emit(rows)
    cells = [(r["scheme"], r["adapter"], f"{r['share']:.2f}", _yes(r["exact"]), _yes(r["sum_only"])) for r in rows]
    columns = ("scheme", "adapter", "sent", "exact", "sums alone suffice")
    output.listing(columns, {f"of one {WIDTH} x {WIDTH} layer; sent: values a site sends per round, over those of its adapter": cells})
    print(f"{len(rows)} schemes; `fedpeft schemes show NAME` explains one. What sums suffice for can run under secure aggregation.")
    print("`fedpeft combine` lists the rules that may stand in for the mean where some sites lie.")


@app.command()
def show(name: Annotated[str, typer.Argument(help="A scheme of the list.")]) -> None:
    """Explain one scheme: its paper, what each side does, its settings."""
    from fedpeft.schemes import SCHEMES

    explain("scheme", name, SCHEMES)


def _rows() -> list[dict[str, Any]]:
    from fedpeft.schemes import SCHEMES

    return [row for name, made in sorted(SCHEMES.items()) if (row := _row(name, made()))]


def _row(name: str, scheme: Any) -> dict[str, Any] | None:
    """On the first of a few adapters that the scheme takes."""
    from fedpeft.errors import UpdateError

    for adapter, layout in _layouts().items():
        try:
            scheme.check(layout)
        except UpdateError:
            continue
        sent = [scheme.travels(layout, scheme.phase(round, layout)).size for round in ROUNDS]
        whole = layout.subset(layout.roles - {"A2", "B2"}).size
        exact = scheme.exact(layout)
        return {"scheme": name, "adapter": adapter, "share": sum(sent) / len(sent) / whole, "exact": exact, "sum_only": scheme.sum_only}
    return None


def _layouts() -> dict[str, Any]:
    from fedpeft.tensors import Entry, Layout

    def factors(tail: str, rank: int) -> list[Entry]:
        return [Entry(f"A{tail}", f"q.lora_A{tail}.weight", (rank, WIDTH)), Entry(f"B{tail}", f"q.lora_B{tail}.weight", (WIDTH, rank))]

    lora = factors("", RANK)
    road = [Entry(role, f"q.road_{role}", (WIDTH,)) for role in ("alpha", "theta")]
    return {
        f"lora r={RANK}": Layout.of(lora),
        f"lora r={RANK} extra={4 * RANK}": Layout.of([*lora, *factors("2", 4 * RANK)]),
        f"core r={4 * RANK}": Layout.of([*factors("", 4 * RANK), Entry("R", "q.lora_R.weight", (4 * RANK, 4 * RANK))]),
        "road": Layout.of(road),
    }


def _yes(value: bool) -> str:
    return "yes" if value else "no"
