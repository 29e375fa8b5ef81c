"""`fedpeft methods`: the taxonomy, what each method costs on a base, and what averaging it means."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from fedpeft.bases.spec import QUANTIZED
from fedpeft.cli import output

app = typer.Typer(help="List PEFT methods: family, cost, averaging, quantized bases, privacy.", invoke_without_command=True)

BaseName = Annotated[str | None, typer.Option("--base", help="Count parameters and bytes on this model (minilm, a folder, a hub name).")]
SchemeName = Annotated[str, typer.Option(help="Federated averaging scheme that the bytes are for.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HINT = "Add --base MODEL for trained parameters and bytes per round."
SCOPE = "Parameters and bytes leave the task's head out; `refused`: not on this base, `weights`: counted by its weights; show says more."
FACTS = ("averaging", "quantized bases", "client-level DP")
COSTS = ("parameters", "sent/round")


@app.callback()
def methods(
    context: typer.Context,
    base: BaseName = None,
    scheme: SchemeName = "alternating",
    family: Annotated[str | None, typer.Option(help="Only this family of the taxonomy.")] = None,
    json: AsJson = False,
) -> None:
    """List the PEFT methods that can be federated; `fedpeft methods show NAME` explains one."""
    if context.invoked_subcommand is not None:
        return
    rows = _rows(family, base, scheme)
    if json:
        return output.emit(rows)
    costs = COSTS if base is not None else ()
    groups = {name: [_cells(row) for row in rows if row["family"] == name] for name in _families(rows)}
    output.listing(("method", *costs, *FACTS), groups)
    print(f"{len(rows)} methods; `fedpeft methods show NAME` explains one. {HINT if base is None else SCOPE}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A method of the list.")], base: BaseName = None, scheme: SchemeName = "alternating"
) -> None:
    """Explain one method: what it does, its paper, its tensors, its settings, what averaging it means."""
    from fedpeft.bases import BaseSpec, load_base
    from fedpeft.errors import ConfigError
    from fedpeft.methods import METHODS, REFUSED, SPECS
    from fedpeft.methods.spec import AVERAGING

    if name in REFUSED:
        raise ConfigError(f"method: {name!r} is not offered: {REFUSED[name]}")
    _known(name, SPECS, "method")
    spec, row = SPECS[name], _row(name, _meta(base), scheme)
    if row.get("refused") and METHODS[name]().needs_weights:
        row = _row(name, load_base(BaseSpec(model=str(base)), "cpu"), scheme)
    print(f"{name}: {spec.summary}\n{spec.paper}\n")
    facts = {
        "family": spec.family,
        "acts on": spec.acts_on,
        "tensors": ", ".join(f"{role} ({source})" for role, source in spec.tensors.items()),
        "averaging": f"{spec.averaging}: {AVERAGING[spec.average]}",
        "client-level DP": spec.privacy,
        "starts as the base": _yes(spec.identity),
        "merges into the base": _yes(spec.mergeable),
        "mixed batches": _yes(spec.mixed_batch),
        "trains on bases": ", ".join(sorted(spec.bases)),
        "learning rate": f"{spec.learning_rate:g}",
        "settings": ", ".join(_setting(field) for field in dataclasses.fields(METHODS[name]) if field.init) or "none",  # type: ignore[arg-type]
        "note": spec.note,
        "on this base": row.get("refused"),
        "parameters": None if row["parameters"] is None else f"{row['parameters']:,}",
        "sent per round": _bytes(row),
    }
    for label, value in facts.items():
        if value not in ("", None, "-"):
            print(f"{label + ':':<22}{value}")


def _rows(family: str | None, base: str | None, scheme: str) -> list[dict[str, Any]]:
    from fedpeft.methods import SPECS
    from fedpeft.schemes import SCHEMES

    _known(scheme, SCHEMES, "scheme")
    if family is not None:
        _known(family, {spec.family: spec for spec in SPECS.values()}, "family")
    chosen = [name for name, spec in SPECS.items() if family in (None, spec.family)]
    loaded = _meta(base)
    return [_row(name, loaded, scheme) for name in sorted(chosen, key=lambda name: (SPECS[name].family, name))]


def _row(name: str, base: Any, scheme: str) -> dict[str, Any]:
    """The facts of one method; parameters, bytes and ``refused`` where a base was given."""
    from fedpeft.methods import SPECS

    spec = SPECS[name]
    return {
        "method": name,
        "family": spec.family,
        "averaging": spec.averaging,
        "bases": sorted(spec.bases),
        "privacy": spec.privacy,
        "learning_rate": spec.learning_rate,
        **(_cost(name, base, scheme) if base is not None else {"parameters": None, "bytes": None}),
    }


def _cost(name: str, base: Any, scheme: str) -> dict[str, Any]:
    """Trained parameters without the head, and bytes that a site sends in a round (mean over two rounds)."""
    from fedpeft.adapters import make_spec
    from fedpeft.bases import HeadSpec
    from fedpeft.bases.spec import CLASSIFIERS
    from fedpeft.errors import FedpeftError
    from fedpeft.methods import METHODS, SPECS
    from fedpeft.schemes import SCHEMES

    head = HeadSpec("classification", ("a", "b")) if base.family in CLASSIFIERS else HeadSpec("lm")
    try:
        layout = make_spec("costs", base, METHODS[name](), head).layout
        rule = SCHEMES[scheme]()
        rule.check(layout)
        sent = [rule.travels(layout, rule.phase(round, layout)) for round in (1, 2)]
    except FedpeftError as fault:
        return {"parameters": None, "bytes": None, "refused": str(fault)}
    trained = layout.subset(SPECS[name].trained)
    sizes = [4 * (part.size - part.subset({"head"}).size) for part in sent]
    return {"refused": "", "parameters": trained.size, "bytes": sum(sizes) // len(sizes)}


def _meta(base: str | None) -> Any:
    from fedpeft.bases import BaseSpec, meta_base

    return None if base is None else meta_base(BaseSpec(model=base))


def _families(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["family"] for row in rows))


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    costs = () if "refused" not in row else ((_why(row["method"]), "-") if row["refused"] else (f"{row['parameters']:,}", _bytes(row)))
    quantized = [name for name in QUANTIZED if name in row["bases"]]
    return (
        row["method"],
        *costs,
        _short(row["averaging"]),
        "all" if len(quantized) == len(QUANTIZED) else ", ".join(quantized) or "none",
        row["privacy"],
    )


def _why(name: str) -> str:
    from fedpeft.methods import METHODS

    return "weights" if METHODS[name]().needs_weights else "refused"


def _short(averaging: str) -> str:
    """The first two schemes of a list, and how many more there are."""
    first, *more = averaging.split(", ")
    return ", ".join([first, *more[:1]]) + (f" and {len(more) - 1} more" if len(more) > 1 else "")


def _bytes(row: Mapping[str, Any]) -> str:
    return "-" if row["bytes"] is None else output.size(row["bytes"])


def _setting(field: dataclasses.Field[Any]) -> str:
    return f"{field.name} = {field.default!r}" if field.default is not dataclasses.MISSING else field.name


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _known(name: str, table: Mapping[str, Any], noun: str) -> None:
    from fedpeft.errors import ConfigError

    if name not in table:
        raise ConfigError(f"{noun}: {name!r} is not known; choose one of {sorted(table)}")
