"""`fedpeft adapters push|alias|watch|trust`: versions between registries, and names for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedpeft.cli import output
from fedpeft.cli.registries import HERE, AsJson, Ref, Root, Who, near, opened


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    for verb in (push, alias, watch, trust):
        app.command()(verb)


def push(
    ref: Ref,
    to: Annotated[str, typer.Option("--to", help="grpc://HOST:PORT, or the folder of a registry that trusts this one.")],
    registry: Root = HERE,
    identity: Who = None,
) -> None:
    """Publish a version elsewhere, signed by this registry; a broken push goes on where it stopped."""
    from fedpeft.registry.manifest import NAME, SIGNATURE

    source, target = near(registry), opened(to, identity)
    if hasattr(target, "push"):
        version = target.push(source, ref)
    else:
        found = source.get(ref)
        files = source.files(found.digest)
        signature = files.pop(SIGNATURE)
        files.pop(NAME)
        version = target.accept(found.manifest, files, signature, f"push/{found.digest}")
    print(f"{version.task}@{version.number} sha256:{version.digest[:12]} is in {to}")


def alias(
    task: Annotated[str, typer.Argument(help="Task name.")],
    name: Annotated[str | None, typer.Argument(help="Alias to set, such as prod; without it, all are listed.")] = None,
    ref: Annotated[str | None, typer.Argument(help="What it points at from now on: a number, an alias, or a version's reference.")] = None,
    registry: Root = HERE,
    identity: Who = None,
) -> None:
    """List a task's aliases, or point one at a version; every move is signed and logged."""
    from fedpeft.errors import AdapterError

    store = opened(registry, identity)
    if name is None:
        store.get(task)
        return output.emit(store.aliases(task))
    if ref is None:
        raise AdapterError(f"alias {name}: say what it points at, as in `fedpeft adapters alias {task} {name} 3`")
    moved = store.alias(task, name, ref)
    return print(f"{task}@{name} is sha256:{moved.digest[:12]} (move {moved.number})")


def watch(
    tasks: Annotated[list[str] | None, typer.Argument(help="Only these tasks.")] = None,
    registry: Root = HERE,
    identity: Who = None,
    from_start: Annotated[bool, typer.Option("--from-start", help="Begin with what already happened.")] = False,
    json: AsJson = False,
) -> None:
    """Print new versions and moved aliases of a far registry as they come, until interrupted."""
    from fedpeft.control.address import is_address
    from fedpeft.errors import ConfigError

    if not is_address(registry):
        raise ConfigError(f"watch: {registry} is a folder; give grpc://HOST:PORT of a `fedpeft coordinator serve` on it")
    for change in opened(registry, identity).watch(tuple(tasks or ()), from_start):
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
    registry: Annotated[Path, typer.Option("--registry", envvar="FEDPEFT_REGISTRY", help="Folder of the registry.")] = Path(HERE),
) -> None:
    """Accept versions that the owner of a signing key made, from now on."""
    import re

    from fedpeft.errors import ConfigError

    if not re.fullmatch(r"[0-9a-f]{64}", key):
        raise ConfigError(f"key {key!r}: is no public key; give 64 hex digits, as a refused push names them")
    near(str(registry)).objects.keys.trust(key)
    print(f"{registry}: versions signed by {key[:16]} are accepted")
