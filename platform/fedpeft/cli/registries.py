"""Which registry a verb works on: a folder here, or a control plane far away."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fedpeft.control.place import Place

HERE = Place()
Root = Annotated[
    str,
    typer.Option(
        "--registry",
        envvar="FEDPEFT_REGISTRY",
        help="Folder of the registry, or grpc://HOST:PORT.",
        show_default="that of the federation here",
    ),
]
Who = Annotated[
    Path | None,
    typer.Option(
        "--identity",
        envvar="FEDPEFT_IDENTITY",
        help="What to show there: a certificate NAME.pem (NAME.key and ca.crt lie beside it), or NAME.token (ca.crt lies beside it).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Ref = Annotated[str, typer.Argument(help="TASK (latest), TASK@NUMBER, TASK@ALIAS or sha256:PREFIX.")]


def placed(verb: Callable[..., None]) -> Callable[..., None]:
    """``verb``, whose parameter ``registry`` is a `Place`, as a command with the options ``--registry`` and ``--identity``."""
    hints, taken = get_type_hints(verb, include_extras=True), inspect.signature(verb)
    options = {"registry": (Root, HERE.given), "identity": (Who, None)}
    asked = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        for name, (hint, default) in options.items()
    ]
    own = [
        given.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, given in taken.parameters.items()
        if name != "registry"
    ]

    @wraps(verb)
    def command(*, registry: str, identity: Path | None, **rest: Any) -> None:
        verb(registry=Place(registry, identity), **rest)

    command.__signature__ = taken.replace(parameters=[*own, *asked])  # type: ignore[attr-defined]
    command.__annotations__ = {given.name: given.annotation for given in (*own, *asked)} | {"return": None}
    return command
