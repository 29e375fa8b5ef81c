"""Verbs that begin something: init, example, certificates."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

KINDS = ("federation", "site", "central")


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    for verb in (init, example, certificates):
        app.command()(verb)


def init(
    folder: Annotated[Path, typer.Argument(help="A new folder, its name is the federation's; or one that init made, for more sites.")],
    site: Annotated[list[str], typer.Option(help="A site's name; may be given again.")],
    task: Annotated[
        list[str] | None, typer.Option(help="NAME=LABEL,LABEL for classification, NAME for text; may be given again. None: add the sites.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Name by which sites reach the coordinator; beyond this machine with TLS and keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where the coordinator listens.")] = 8000,
    base: Annotated[str, typer.Option(help="The frozen base: minilm, a Hugging Face id, or a whole path.")] = "minilm",
) -> None:
    """Write a federation's files: a folder for the coordinator's machine and one for each site's, with keys; nothing else to fill in."""
    from fedpeft.cli.starter import Starter, add, tasks_of, write

    if not task:
        _tell_sites(add(folder, site))
        for name in site if (folder / "keys").exists() else ():
            print(f"{folder / 'coordinator/sites' / name}.pub: bring it to sites/ at the coordinator, which lets {name} in within seconds")
        return
    made = write(folder, Starter(folder.resolve().name.lower(), tuple(site), tasks_of(task), host, port, base))
    print(f"{made[0]}: bring it to {host}, and run there: fedpeft coordinator up federation.toml")
    _tell_sites(made[1:])
    if (folder / "keys").exists():
        print(f"{folder / 'keys'}: keep it; its ca.key signs keys for more sites (fedpeft init {folder} --site NAME)")


def _tell_sites(places: Sequence[Path]) -> None:
    for place in places:
        rows = ", ".join(f"{name}.jsonl" for name in tomllib.loads((place / "site.toml").read_text(encoding="utf-8"))["data"])
        print(f"{place}: bring it to {place.name}, put its rows beside it ({rows}), and run there: fedpeft client join site.toml")


def example(kind: Annotated[str, typer.Argument(help="federation, site or central.")]) -> None:
    """Print a TOML file in which every table and key is explained, to copy and edit."""
    import fedpeft
    from fedpeft.errors import ConfigError

    if kind not in KINDS:
        raise ConfigError(f"example: {kind!r} is not known; choose one of {list(KINDS)}")
    package = Path(fedpeft.__file__).parent
    folder = package / "examples"  # of a wheel; a source tree has them in deploy
    print(
        (folder if folder.is_dir() else package.parents[1] / "deploy/configs").joinpath(f"{kind}.toml").read_text(encoding="utf-8"), end=""
    )


def certificates(
    out: Annotated[Path, typer.Argument(help="Folder of the keys; a CA that is there is used again.")],
    host: Annotated[list[str] | None, typer.Option(help="A name or address of the coordinator; its server certificate is made.")] = None,
    site: Annotated[list[str] | None, typer.Option(help="A site: its key pair for the link, and its certificate.")] = None,
    client: Annotated[
        list[str] | None, typer.Option(metavar="ROLE:NAME", help="A certificate: reader, site, publisher, monitor, operator.")
    ] = None,
    token: Annotated[list[str] | None, typer.Option(metavar="ROLE:NAME", help="A token in place of a certificate.")] = None,
    days: Annotated[int, typer.Option(min=1, help="How long they hold.")] = 365,
) -> None:
    """Make a private CA, the coordinator's certificate, sites' keys, and certificates or tokens with roles; each may be given again."""
    from fedpeft.issuing import issue

    before = set(out.glob("*"))
    issue(out, host or [], site or [], client or [], days, token or [])
    for path in sorted(set(out.glob("*")) - before):
        print(path)
