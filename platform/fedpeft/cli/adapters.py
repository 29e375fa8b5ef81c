"""`fedpeft adapters ...`: the registry's versions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedpeft.cli import output, sharing
from fedpeft.cli.changes import values
from fedpeft.cli.registries import HERE, AsJson, Ref, Root, placed
from fedpeft.control.place import Place, beside

app = typer.Typer(help="List, inspect, copy, share, verify and roll back published adapters.", no_args_is_help=True)
sharing.register(app)


@app.command("list")
@placed
def list_(
    task: Annotated[str | None, typer.Argument(help="Only this task.")] = None,
    registry: Place = HERE,
    json: AsJson = False,
) -> None:
    """List versions, newest last; the served one of each task is marked."""
    store = registry.open()
    versions = store.list(task)
    current = {version.task: version.digest for version in (store.get(name) for name in {v.task for v in versions})}
    if json:
        return output.emit(
            [{**v.manifest.to_json(), "number": v.number, "digest": v.digest, "current": current[v.task] == v.digest} for v in versions]
        )
    rows = [
        (
            v.task,
            str(v.number),
            "*" if current[v.task] == v.digest else "",
            v.digest[:12],
            v.manifest.method["kind"],
            str(v.manifest.round),
            _metrics(v),
        )
        for v in versions
    ]
    return output.listing(("task", "version", "served", "digest", "method", "round", "metrics"), {str(registry): rows})


def _metrics(version: Any) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in sorted(version.manifest.metrics.items()) if not name.startswith("base."))


@app.command()
@placed
def show(ref: Ref, registry: Place = HERE, json: AsJson = False) -> None:
    """Print one version's manifest: base, method, lineage, metrics, files; --json also the numbers of its router card."""
    version = registry.open().get(ref)
    found = {"digest": version.digest, "number": version.number, "path": str(version.path or ""), **version.manifest.to_json()}
    output.emit(found if json else output.brief(found))


@app.command()
@placed
def history(task: Annotated[str, typer.Argument(help="Task name.")], registry: Place = HERE) -> None:
    """Print everything that was published or rolled back for a task, oldest first."""
    output.emit(registry.open().history(task))


@app.command()
@placed
def export(
    ref: Annotated[str, typer.Argument(help="TASK, TASK@NUMBER, sha256:PREFIX, or an adapter's folder.")],
    folder: Annotated[Path, typer.Argument(help="New folder to write.")],
    form: Annotated[str, typer.Option("--format", help="peft, merged, vllm or gguf.")] = "peft",
    check: Annotated[bool, typer.Option("--check", help="Load what was written and compare its logits; fail when they differ.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="base=MODEL where it is not found by its name, quantization=nf4 as it is served, or the format's own: max_rank=64.",
        ),
    ] = None,
    registry: Place = HERE,
) -> None:
    """Write one version for another server: a PEFT folder, merged weights, vLLM's LoRA layout, or GGUF."""
    from fedpeft.bases import BaseSpec, load_base
    from fedpeft.exporting import Export, exported, make_format

    table, adapter = values(settings, "rank=16"), _adapter(ref, registry)
    spec = BaseSpec(table.pop("base", adapter.spec.base_model), table.pop("quantization", "none"))
    chosen = make_format({"kind": form, **table})
    loaded = load_base(spec) if chosen.needs_base or (check and form != "gguf") else None
    written, found = exported(chosen, Export(adapter, loaded, _files(ref, registry)), folder, check)
    print(f"{ref} written to {folder} as {form}")
    for note in written.notes:
        print(f"  {note}")
    if found is not None:
        print(f"  checked: {found.said}")


def _files(ref: str, registry: Place) -> Any:
    """The files of a version, manifest and signature too; none for a folder that is no version."""
    if (Path(ref) / "fedpeft.json").is_file():
        return None
    store = registry.open()
    return store.files(store.get(ref).digest)


@app.command()
@placed
def convert(
    ref: Annotated[str, typer.Argument(help="TASK, TASK@NUMBER, sha256:PREFIX, or an adapter's folder.")],
    folder: Annotated[Path, typer.Argument(help="New folder to write.")],
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA.")] = 16,
    base: Annotated[str | None, typer.Option(help="The base, where its name in the adapter is not found here.")] = None,
    quantization: Annotated[str, typer.Option(help="How to load the base.")] = "none",
    registry: Place = HERE,
) -> None:
    """Write an adapter as a plain LoRA that servers take, and say what that lost."""
    from fedpeft.adapters import save
    from fedpeft.adapters.convert import to_lora
    from fedpeft.bases import BaseSpec, load_base

    adapter = _adapter(ref, registry)
    loaded = load_base(BaseSpec(base or adapter.spec.base_model, quantization))  # type: ignore[arg-type]
    done = to_lora(loaded, adapter, rank)
    save(done.adapter, folder)
    print(
        f"{ref} written to {folder} as LoRA of rank {rank}: weight error {done.weight_error:.2e} of the adapter's change, "
        f"output error {done.output_error:.2e} of its effect on random tokens"
        + (f"; rank {done.enough} would bring the former to 1 %" if done.enough > rank else "")
    )


@app.command()
@placed
def merge(
    refs: Annotated[
        list[str],
        typer.Argument(help="Adapters of one base (TASK, TASK@NUMBER, sha256:PREFIX or a folder), each with its weight: triage=0.7."),
    ],
    out: Annotated[Path, typer.Option("--out", help="New folder to write.")],
    how: Annotated[str, typer.Option(help="cat, svd, arithmetic, ties, dare or knots.")] = "svd",
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting of the rule, such as rank=16 or density=0.3.")] = None,
    origin: Annotated[str | None, typer.Option(help="The adapter that all started from, for methods without a neutral start.")] = None,
    registry: Place = HERE,
) -> None:
    """Make several adapters one, exactly (cat) or by a rule, and say what its rank lost."""
    from fedpeft.adapters import save
    from fedpeft.merging import make_rule, merged

    rule = make_rule({"kind": how, **values(settings, "rank=16")})
    shares = [_weighted(ref, 1.0 / len(refs)) for ref in refs]
    adapters = [_adapter(ref, registry) for ref, _ in shares]
    done = merged(adapters, [share for _, share in shares], rule, origin=_adapter(origin, registry) if origin else None)
    save(done.adapter, out)
    size = done.adapter.tensors.flat.size
    print(f"{len(refs)} adapters merged by {how} into {out}, {size:,} values; lost to its rank: {done.lost:.2%} of the energy")


@app.command()
@placed
def cluster(
    refs: Annotated[list[str] | None, typer.Argument(help="LoRA adapters of one base; every served one when left out.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="New folder: one merged adapter for each cluster.")] = None,
    how: Annotated[str, typer.Option(help="How a cluster is merged, as in merge.")] = "svd",
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting of the rule, such as rank=16 or density=0.3.")] = None,
    registry: Place = HERE,
    json: AsJson = False,
) -> None:
    """Say which tasks' adapters point the same way, and make each cluster one servable adapter."""
    from fedpeft.merging import make_rule
    from fedpeft.merging.clusters import clusters, cosines

    rule = make_rule({"kind": how, **values(settings, "rank=16")})
    names = refs or sorted({version.task for version in registry.open().list()})
    adapters = [_adapter(ref, registry) for ref in names]
    similar = cosines([adapter.tensors for adapter in adapters])
    labels = clusters(similar)
    rows = [{"adapter": name, "cluster": label, "cosines": row} for name, label, row in zip(names, labels, similar.tolist(), strict=True)]
    if json:
        output.emit(rows)
    else:
        cells = [
            (name, label, *(f"{value:.2f}" for value in row)) for name, label, row in zip(names, labels, similar.tolist(), strict=True)
        ]
        output.table("cosines of the adapters' products", ("adapter", "cluster", *names), cells)
    if out is not None:
        for label in sorted(set(labels)):
            _merged_cluster([a for a, found in zip(adapters, labels, strict=True) if found == label], rule, out / str(label))


def _merged_cluster(adapters: list[Any], rule: Any, folder: Path) -> None:
    import sys

    from fedpeft.adapters import save
    from fedpeft.merging import merged

    done = merged(adapters, [1.0 / len(adapters)] * len(adapters), rule)
    save(done.adapter, folder)
    tasks = ", ".join(adapter.spec.task for adapter in adapters)
    print(f"{folder}: {tasks}; lost to the rank {done.lost:.2%} of the energy", file=sys.stderr)


def _weighted(ref: str, share: float) -> tuple[str, float]:
    """``ref=weight``, or ``ref`` alone with the equal share."""
    name, found, text = ref.rpartition("=")
    try:
        return (name, float(text)) if found else (ref, share)
    except ValueError:
        return ref, share


def _adapter(ref: str, registry: Place) -> Any:
    """From a folder, or from the registry."""
    from fedpeft.adapters import load

    return load(Path(ref)) if (Path(ref) / "fedpeft.json").is_file() else registry.open().load(ref)


@app.command()
@placed
def pull(
    ref: Ref,
    source: Annotated[str, typer.Option("--from", help="Folder of the registry to copy from, or grpc://HOST:PORT.")],
    registry: Place = HERE,
) -> None:
    """Copy one version from another registry, after checking its files and signature; a broken pull goes on where it stopped."""
    from fedpeft.registry import Registry

    version = Registry(Path(registry.given or beside(Path()))).pull(Place(source, registry.identity).open(), ref)
    print(f"{version.task}@{version.number} sha256:{version.digest[:12]} is in {registry}")


@app.command()
def verify(ref: Annotated[str | None, typer.Argument(help="One version; all when left out.")] = None, registry: Root = HERE.given) -> None:
    """Check files, checksums, signatures and the history chain."""
    from fedpeft.errors import AdapterError

    place = Place(registry)
    faults = place.near().verify(ref)
    if faults:
        raise AdapterError("\n".join(faults))
    print(f"{ref or place}: every checksum, signature and history link holds")


@app.command()
@placed
def rollback(task: Annotated[str, typer.Argument(help="Task name.")], ref: Ref, registry: Place = HERE) -> None:
    """Serve an earlier version of a task again; nothing is deleted."""
    version = registry.open().rollback(task, ref)
    print(f"{task} now serves version {version.number} (sha256:{version.digest[:12]})")
