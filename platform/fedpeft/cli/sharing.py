"""`fedpeft adapters push|alias|watch|trust`: versions between registries, and names for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpeft.cli import output
from fedpeft.cli.registries import HERE, AsJson, Ref, Root, placed
from fedpeft.control.place import Place

if TYPE_CHECKING:
    from fedpeft.registry import Registry, Version


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    for verb in (push, alias, watch):
        app.command()(placed(verb))
    app.command()(trust)


def push(
    ref: Ref,
    to: Annotated[str, typer.Option("--to", help="grpc://HOST:PORT, or the folder of a registry that trusts this one.")],
    registry: Place = HERE,
) -> None:
    """Publish a version elsewhere, signed by this registry; a broken push goes on where it stopped."""
    source, target = registry.near(), Place(to, registry.identity)
    version = target.far().push(source, ref) if target.is_far else _given(source, ref, target.near())
    print(f"{version.task}@{version.number} sha256:{version.digest[:12]} is in {to}")


def _given(source: Registry, ref: str, target: Registry) -> Version:
    """Publish a version of ``source`` in ``target``, as a push does."""
    from fedpeft.registry.manifest import NAME, SIGNATURE

    found = source.get(ref)
    files = source.files(found.digest)
    signature = files.pop(SIGNATURE)
    files.pop(NAME)
    return target.accept(found.manifest, files, signature, f"push/{found.digest}")


def alias(
    task: Annotated[str, typer.Argument(help="Task name.")],
    name: Annotated[str | None, typer.Argument(help="Alias to set, such as prod; without it, all are listed.")] = None,
    ref: Annotated[str | None, typer.Argument(help="What it points at from now on: a number, an alias, or a version's reference.")] = None,
    registry: Place = HERE,
) -> None:
    """List a task's aliases, or point one at a version; every move is signed and logged."""
    from fedpeft.errors import AdapterError

    store = registry.open()
    if name is None:
        store.get(task)
        return output.emit(store.aliases(task))
    if ref is None:
        raise AdapterError(f"alias {name}: say what it points at, as in `fedpeft adapters alias {task} {name} 3`")
    moved = store.alias(task, name, ref)
    return print(f"{task}@{name} is sha256:{moved.digest[:12]} (move {moved.number})")


def watch(
    tasks: Annotated[list[str] | None, typer.Argument(help="Only these tasks.")] = None,
    registry: Place = HERE,
    from_start: Annotated[bool, typer.Option("--from-start", help="Begin with what already happened.")] = False,
    json: AsJson = False,
) -> None:
    """Print new versions and moved aliases as they come, until interrupted."""
    for change in registry.watch(tuple(tasks or ()), from_start):
        print(_line(change) if not json else _json(change), flush=True)


def _line(change: Any) -> str:
    if change.WhichOneof("change") == "alias":
        return f"{change.task}@{change.alias.alias} -> sha256:{change.alias.digest[:12]} by {change.alias.by or '-'}"
    return f"{change.task}@{change.version.number} {change.version.action} sha256:{change.version.digest[:12]}"


def _json(change: Any) -> str:
    from google.protobuf.json_format import MessageToDict

    return output.line(MessageToDict(change, preserving_proto_field_name=True))


def trust(
    key: Annotated[str, typer.Argument(help="Public signing key, 64 hex digits; a refused push names it.")],
    registry: Root = HERE.given,
) -> None:
    """Accept versions that the owner of a signing key made, from now on."""
    import re

    from fedpeft.errors import ConfigError

    if not re.fullmatch(r"[0-9a-f]{64}", key):
        raise ConfigError(f"key {key!r}: is no public key; give 64 hex digits, as a refused push names them")
    place = Place(registry)
    place.near().objects.keys.trust(key)
    print(f"{place}: versions signed by {key[:16]} are accepted")
