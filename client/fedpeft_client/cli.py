"""`fedpeft client`: join a federation, or see beforehand what would leave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpeft.cli.changes import table
from fedpeft.cli.registries import HERE, placed
from fedpeft.control.place import Place

if TYPE_CHECKING:
    from fedpeft_client.config import SiteConfig
    from fedpeft_client.dry_run import Forecast
    from fedpeft_client.supervisor import Running

app = typer.Typer(name="client", help="A site: its rows, its policy, its warm base.", no_args_is_help=True)
Site = Annotated[Path, typer.Argument(help="The site's TOML file (`fedpeft example site` prints one).", metavar="SITE.TOML")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change one setting, as in --set policy.max_rank=16.", metavar="A.B=VALUE")
]


@app.command()
def join(site: Site) -> None:
    """Join the federation and stay until interrupted: runs the SuperNode and the worker, and restarts what dies."""
    from fedpeft.processes import end_service
    from fedpeft_client.join import join as run

    end_service(run(site, _Display()))


@app.command()
def identity(site: Site) -> None:
    """Print this site's name and public key, a line for the table peers of the other sites' files."""
    from fedpeft_client.config import load_site
    from fedpeft_client.secure import Secure

    settings = load_site(site)
    print(f'{settings.name} = "{Secure(settings.name, settings.state).keys.public()}"')


@app.command()
def serve(
    site: Annotated[Path | None, typer.Argument(help="The site's TOML file; its tables serve and base count.", metavar="SITE.TOML")] = None,
    registry: Annotated[
        str | None, typer.Option(envvar="FEDPEFT_REGISTRY", help="Folder of the registry or grpc://HOST:PORT, watched for new versions.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Answer an OpenAI-compatible HTTP API from the registry's adapters until interrupted; new versions are swapped in meanwhile."""
    from fedpeft.processes import end_service
    from fedpeft_client.serve.run import serve as run

    end_service(run(site, registry, table(overrides, "policy.max_rank=16")))


@app.command()
@placed
def evaluate(
    site: Site,
    registry: Place = HERE,
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score this site's test rows by the served adapter alone, with the site's private pair, and with the pair weighed row by row."""
    from dataclasses import asdict

    from fedpeft.cli import output
    from fedpeft_client.config import load_site
    from fedpeft_client.own_scores import score

    found = score(load_site(site, table(overrides, "policy.max_rank=16")), registry.open())
    if json:
        return output.emit([asdict(one) for one in found])
    for one in found:
        rows = [(how, *(f"{value:.4f}" for value in scores.values())) for how, scores in one.scores.items()]
        output.table(f"{one.task}: {one.rows} rows, mean weight {one.weight:.2f}", ("pair", *one.scores["shared"]), rows)
    return None


@app.command("dry-run")
def dry_run(
    site: Site,
    plan: Annotated[Path, typer.Option(help="The federation's TOML file.", metavar="FEDERATION.TOML")],
    number: Annotated[int, typer.Option("--round", min=1, help="Which round; schemes may train other tensors in each.")] = 1,
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Print exactly what would leave this site in one round: tensors, counters, weight, bytes, epsilon. Nothing is sent."""
    from fedpeft.cli import output
    from fedpeft_client.config import load_site
    from fedpeft_client.dry_run import as_json, forecast, read_plan

    settings = load_site(site, table(overrides, "policy.max_rank=16"))
    found = forecast(settings, read_plan(plan), number)
    if json:
        return output.emit(as_json(found))
    return _print(settings, found, number)


@app.command("audit")
def audit_(site: Site, json: Annotated[bool, typer.Option("--json", help="Print every field, as JSON.")] = False) -> None:
    """Print what has left this site so far: when, for which round and task, how many bytes, masked or not. Nothing is sent."""
    from fedpeft.cli import output
    from fedpeft_client import audit
    from fedpeft_client.config import load_site

    path = load_site(site).state / "audit.jsonl"
    found = audit.read(path)
    if json:
        return output.emit(found)
    columns = ("time (UTC)", "round", "kind", "task", "bytes", "what", "masks", "outcome")
    output.listing(columns, {f"what has left by {path}": [_left(one) for one in found]})
    return print(f"{len(found)} answers, {output.size(sum(map(_bytes, found)))} in all; --json shows every field")


def _left(one: dict[str, Any]) -> tuple[str, ...]:
    """One answer as a row."""
    counters = f"{len(one['counters'])} counters"
    what = f"values of {', '.join(one['tensors'])}; {counters}" if one["tensors"] else counters
    round_ = f"{one['federation']} {one['round']}"
    return (
        one["time"][:19],
        round_,
        one["kind"],
        one["task"],
        str(_bytes(one)),
        what,
        one["masked"].split(" ")[0] or "none",
        one["outcome"],
    )


def _bytes(one: dict[str, Any]) -> int:
    """All that travelled; records of old versions count values alone."""
    return int(one.get("bytes") or sum(one["tensors"].values()))


@app.command()
@placed
def start(
    site: Site,
    plan: Annotated[Path, typer.Option(help="The federation's TOML file, with the new task.", metavar="FEDERATION.TOML")],
    task: Annotated[str, typer.Option(help="The new task.")],
    registry: Place = HERE,
    fit: Annotated[bool, typer.Option("--fit", help="Fit the weights to the rows' loss; for tasks of text.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which served adapters are near this site's rows of a new task, and how the task may start from them. Nothing is sent."""
    from fedpeft.cli import output
    from fedpeft_client.cold_start import propose
    from fedpeft_client.config import load_site
    from fedpeft_client.dry_run import read_plan

    found = propose(load_site(site), read_plan(plan).task(task), registry.open(), fit)
    if json:
        return output.emit({"task": task, "rows": found.rows, "weights": dict(found.route.weights), "scores": dict(found.route.scores)})
    rows = [(name, f"{score:.3f}", f"{found.route.weights.get(name, 0.0):.3f}") for name, score in sorted(found.route.scores.items())]
    output.table(f"{task}: {found.rows} rows, {found.route.why}", ("adapter", "score", "weight"), rows)
    if not found.route.weights:
        return print(f"no served adapter is near; start {task} fresh")
    shares = ", ".join(f'"{name}" = {weight:.3f}' for name, weight in sorted(found.route.weights.items()))
    for name in sorted(found.route.weights):
        print(f"fedpeft adapters export {name} {name} --registry {registry}")
    return print(f'[tasks.{task}]\nstart = {{ kind = "mixture", adapters = {{ {shares} }} }}')


def _print(site: SiteConfig, found: list[Forecast], number: int) -> None:
    from fedpeft.cli import output

    for one in found:
        rows = [] if one.refused else [(line.name, line.role, "x".join(map(str, line.shape)), str(line.bytes)) for line in one.tensors]
        output.listing(("tensor", "role", "shape", "bytes"), {f"{one.task}: round {number}, phase {one.phase}": rows})
        if one.refused:
            print(f"  REFUSED, nothing leaves: {one.refused}")
        print(f"  weight   {one.examples} examples: {one.weight}")
        print(f"  counters {_counters({name: count for name, count in one.counters.items() if name not in one.routing})}")
        print(f"  bytes    {one.bytes} ({output.size(one.bytes)}) of at most {site.policy.max_upload_mb:g} MB")
        if one.routing:
            size = output.size(one.routing_bytes)
            print(f"  routing  {_counters(one.routing)}: {size} in an answer of its own, before a version is published")
        if one.scores and one.tested:
            print(f"  scores   sums over the {one.tested} test rows for {', '.join(one.scores)}, where rounds are scored")
        if one.private and not one.refused:
            print(f"  stays    roles {', '.join(one.private)}: trained here, never sent")
        print(f"  masks    {'on: the coordinator sees the sum over sites alone' if one.masked else 'off: the coordinator sees all of it'}")
        print(f"  epsilon  {one.epsilon}")
        print(f"  policy   checked {', '.join(one.rules)}\n")


def _counters(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none"


class _Display:
    """One live line on a terminal; elsewhere a line whenever something changed."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._status: Any = None
        self._last = ""

    def __call__(self, site: SiteConfig, running: list[Running], trouble: str) -> None:
        from fedpeft_client.join import line

        text = line(site, running, trouble, steps=self._console.is_terminal)
        if text == self._last:
            return
        self._last = text
        if not self._console.is_terminal:
            print(text, flush=True)
        elif self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._status.update(text)
