"""Reading the standard library's own sources: doc strings, what function bodies do, and error messages, with ``ast`` alone.

Nothing is imported or executed. Modules are visited in the order of `MODULES`, files by name, nodes in a fixed order, so two
machines with the same Python see the same sequence.
"""

from __future__ import annotations

import ast
import gc
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedpeft.errors import DataError

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

WORDS, LETTERS = 32, 180
BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
"""Fields of a statement that hold further statements."""
LEFT_OUT = frozenset({"test", "tests", "idle_test", "__pycache__"})

MODULES: dict[tuple[str, str], str] = {
    # (area, client): modules of that area that the client keeps
    ("internet", "web"): "http urllib socket ssl ftplib xmlrpc wsgiref socketserver",
    ("internet", "mail"): "email mailbox imaplib poplib smtplib nntplib mimetypes base64 quopri telnetlib",
    ("internet", "systems"): "ipaddress uuid",
    ("concurrency", "web"): "selectors queue threading",
    ("concurrency", "science"): "multiprocessing",
    ("concurrency", "systems"): "asyncio concurrent subprocess sched signal",
    ("files", "mail"): "csv gzip bz2 zipfile",
    ("files", "science"): "json pickle sqlite3 wave aifc",
    ("files", "systems"): "os pathlib shutil tempfile tarfile lzma glob fnmatch filecmp fileinput dbm shelve posixpath ntpath",
    ("files", "web"): "xml plistlib netrc",
    (
        "language",
        "tooling",
    ): "ast dis inspect importlib pkgutil symtable tokenize typing types enum modulefinder zipimport venv pickletools",
    ("language", "desktop"): "codeop pyclbr contextlib functools site",
    ("language", "science"): "collections _collections_abc dataclasses operator weakref copy abc",
    ("numbers", "science"): "_pydecimal fractions statistics random numbers datetime _pydatetime heapq bisect zoneinfo",
    ("numbers", "mail"): "calendar _strptime",
    ("testing", "tooling"): "unittest doctest trace profile pstats timeit traceback tracemalloc",
    ("testing", "desktop"): "pdb bdb cmd code",
    ("testing", "systems"): "logging warnings",
    ("testing", "web"): "pydoc",
    ("text", "tooling"): "re argparse optparse pprint reprlib shlex",
    ("text", "mail"): "textwrap codecs string gettext locale",
    ("text", "web"): "html difflib",
    ("desktop", "desktop"): "tkinter turtle curses",
    ("desktop", "web"): "webbrowser",
}


@dataclass(frozen=True)
class Document:
    """A doc string and what it documents; ``effect`` is None but for functions whose body tells."""

    area: str
    client: str
    kind: str
    name: str
    text: str
    effect: str | None


@dataclass(frozen=True)
class Message:
    """A message that a ``raise`` statement gives to its exception, values cut out."""

    client: str
    error: str
    text: str


def scan() -> tuple[list[Document], list[Message]]:
    """All documents and messages. Raises `DataError` when the standard library's sources are not on this machine."""
    documents: list[Document] = []
    messages: list[Message] = []
    with _collector_paused():
        for (area, client), names in MODULES.items():
            for name, tree in _trees(names.split()):
                documents += _documents(tree, name, area, client)
                messages += _messages(tree, client)
    if not documents:
        raise DataError(f"stdlib: no sources under {_root()}; this Python was installed without them, give a path instead")
    return documents, messages


def sentences(doc: str) -> str:
    """The first two sentences of a doc string, examples left out, at most `WORDS` words and `LETTERS` letters."""
    prose = " ".join(re.split(r"\n\s*(?:>>>|Args:|Arguments:|Example)", doc)[0].split())
    first = re.split(r"(?<=[.!?])\s+(?=[A-Z\"'`(])", prose)[:2]
    return shortened(" ".join(first))


def shortened(text: str) -> str:
    """The first words of a text: `WORDS` at most, and no more than `LETTERS` letters."""
    return textwrap.shorten(" ".join(text.split()[:WORDS]), LETTERS, placeholder="")


def effect(node: Function) -> str | None:
    """What the body of a function does, from its statements alone.

    ``answers``: every value returned is a truth value; ``returns``: another value; ``acts``: none, but it does something. None
    for generators, empty and abstract bodies, and for those that only check and raise.
    """
    body = [statement for statement in node.body if not _idle(statement)]
    own = list(_statements(body, inside=False))
    if not body or any(isinstance(getattr(part, "value", None), ast.Yield | ast.YieldFrom) for part in own):
        return None
    values = [part.value for part in own if isinstance(part, ast.Return) and part.value is not None]
    values = [value for value in values if not (isinstance(value, ast.Constant) and value.value is None)]
    if values:
        return "answers" if all(_truth(value) for value in values) else "returns"
    return None if any(isinstance(part, ast.Raise | ast.Assert) for part in own) else "acts"


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No cyclic collection inside: syntax trees have no cycles, and each pass over torch's many objects costs more than the parsing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _trees(names: Sequence[str]) -> Iterator[tuple[str, ast.Module]]:
    """Parsed files of the named modules; those that this Python lacks are passed by."""
    root = _root()
    for name in names:
        single, package = root / f"{name}.py", root / name
        files = [single] if single.is_file() else sorted(package.rglob("*.py"), key=lambda path: path.as_posix())
        for path in files:
            parts = path.relative_to(root).with_suffix("").parts
            if LEFT_OUT.isdisjoint(parts):
                yield [part for part in parts if part != "__init__"][-1], _parsed(path)


def _parsed(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(path.read_bytes())


def _documents(tree: ast.Module, module: str, area: str, client: str) -> Iterator[Document]:
    for node, kind in _definitions(tree):
        doc = ast.get_docstring(node, clean=False)
        if doc:
            does = effect(node) if isinstance(node, Function) and node.name != "__init__" else None
            yield Document(area, client, kind, getattr(node, "name", module), sentences(doc), does)


def _definitions(node: Definition) -> Iterator[tuple[Definition, str]]:
    """The module, its classes and functions and their methods; nothing inside functions."""
    if isinstance(node, ast.Module):
        yield node, "module"
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield child, "exception" if _is_exception(child) else "class"
            yield from _definitions(child)
        elif isinstance(child, Function):
            yield child, "function"


def _is_exception(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).endswith(("Error", "Exception", "Warning")) for base in node.bases)


def _idle(statement: ast.stmt) -> bool:
    constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return constant or isinstance(statement, ast.Pass)


def _statements(body: Sequence[ast.AST], inside: bool) -> Iterator[ast.AST]:
    """All statements of a body at any depth; those of functions and classes defined in it only with ``inside``."""
    waiting = list(body)
    while waiting:
        node = waiting.pop()
        yield node
        if inside or not isinstance(node, Function | ast.ClassDef):
            for part in BLOCKS:
                waiting += getattr(node, part, ())


def _truth(value: ast.expr) -> bool:
    """Whether an expression is a truth value by its form."""
    if isinstance(value, ast.Constant):
        return isinstance(value.value, bool)
    if isinstance(value, ast.BoolOp):
        return all(_truth(part) for part in value.values)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        return value.func.id in {"isinstance", "issubclass", "bool", "any", "all", "hasattr", "callable"}
    return isinstance(value, ast.Compare) or (isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.Not))


def _messages(tree: ast.Module, client: str) -> Iterator[Message]:
    for node in _statements(tree.body, inside=True):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name) and node.exc.args:
            text = _template(node.exc.args[0])
            if text:
                cut = re.sub(r"%(\(\w+\))?[-#0-9.*]*[a-zA-Z]|\{[^}]*\}", "…", text)
                yield Message(client, node.exc.func.id, shortened(cut))


def _template(value: ast.expr) -> str | None:
    """The text of a message expression, ``…`` for each value that is put in; None when there is no text."""
    if isinstance(value, ast.Constant):
        return value.value if isinstance(value.value, str) else None
    if isinstance(value, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in value.values)
    if isinstance(value, ast.BinOp):
        left, right = _template(value.left), _template(value.right) if isinstance(value.op, ast.Add) else ""
        return None if left is None and not right else f"{left or '…'}{right if right is not None else '…'}"
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "format":
        return _template(value.func.value)
    return None
