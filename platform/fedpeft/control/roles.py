"""Who may call what: the one table of roles and methods."""

from __future__ import annotations

ROLES = ("reader", "site", "publisher", "monitor", "operator")
"""``reader`` pulls and asks; ``site`` is a reader that trains; ``publisher`` pushes and moves aliases; ``monitor`` sees the federation."""
LOOK = frozenset(ROLES)
WRITE = frozenset({"publisher", "operator"})
OPERATE = frozenset({"operator"})
SEE = frozenset({"monitor", "operator"})

ALLOWED: dict[str, frozenset[str]] = {
    "/fedpeft.v1.Registry/List": LOOK,
    "/fedpeft.v1.Registry/Get": LOOK,
    "/fedpeft.v1.Registry/Heads": LOOK,
    "/fedpeft.v1.Registry/History": LOOK,
    "/fedpeft.v1.Registry/Pull": LOOK,
    "/fedpeft.v1.Registry/Aliases": LOOK,
    "/fedpeft.v1.Registry/Watch": LOOK,
    "/fedpeft.v1.Registry/Staged": WRITE,
    "/fedpeft.v1.Registry/Push": WRITE,
    "/fedpeft.v1.Registry/SetAlias": WRITE,
    "/fedpeft.v1.Registry/Rollback": OPERATE,
    "/fedpeft.v1.Router/Route": LOOK,
    "/fedpeft.v1.Router/Cards": LOOK,
    "/fedpeft.v1.Federation/Status": SEE,
    "/fedpeft.v1.Federation/Events": SEE,
    "/grpc.health.v1.Health/Check": LOOK,
    "/grpc.health.v1.Health/List": LOOK,
    "/grpc.health.v1.Health/Watch": LOOK,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": LOOK,
}
"""A method that is not listed may be called by nobody."""


def may(role: str, method: str) -> bool:
    """Whether ``role`` may call ``method``."""
    return role in ALLOWED.get(method, frozenset())
