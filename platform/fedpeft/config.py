"""TOML to frozen, validated models: unknown keys are errors, and every fault of a file is reported at once."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from fedpeft.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")
_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}
NAME = r"[a-z0-9][a-z0-9._-]{0,62}"
"""What a federation, a site or a task may be called."""
NOT_TOML = (tomllib.TOMLDecodeError, ValueError, RecursionError)
"""A number of thousands of digits is a plain ValueError, a nest of thousands of brackets ends the stack."""


class Section(BaseModel):
    """A TOML table: immutable, and an unknown key is a fault."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


def load(path: Path | str, model: type[Model], overrides: Mapping[str, str] | None = None) -> Model:
    """Read ``path`` into ``model``; relative paths inside stay as written.

    ``overrides`` are ``a.b=value`` settings of the command line, values in TOML form (a bare word is a string).

    Raises:
        ConfigError: the file is missing or is not TOML, or its content has faults; all of them are named, one a line.
    """
    return with_overrides(model, overrides or {}, str(path), read_toml(Path(path)))


def with_overrides(model: type[Model], overrides: Mapping[str, str], where: str, table: dict[str, Any] | None = None) -> Model:
    """``table`` (none: the defaults) as ``model``, with `load`'s ``overrides``. Raises `ConfigError` that lists every fault."""
    table = {} if table is None else table
    for key, value in overrides.items():
        override(table, key, value)
    return parse(table, model, where)


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file. Raises `ConfigError` when it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; give the path of a TOML file (`fedpeft init` makes them, `fedpeft example` prints one with every key)"
        ) from None
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(f"{path}: cannot be read: {fault}") from None
    except NOT_TOML as fault:
        raise ConfigError(f"{path}: not valid TOML: {fault}") from None


def parse(table: Mapping[str, Any], model: type[Model], where: str) -> Model:
    """Validate ``table`` as ``model``. Raises `ConfigError` that lists every fault with ``where``, key and value."""
    try:
        return model.model_validate(dict(table))
    except ValidationError as faults:
        raise ConfigError("\n".join(_lines(faults, model, where))) from None


def build(table: Mapping[str, type[T]], value: Any, noun: str) -> T:
    """Build the plug-in that ``value["kind"]`` names in ``table`` from the other keys of ``value``.

    A bare name stands for a table with that kind alone; a list, where ``table`` has a ``compose``, for one of several parts.

    Raises:
        ValueError: unknown kind, unknown key or a value of the wrong type; the message names what is allowed.
    """
    if any(type(value) is kind for kind in table.values()):
        return value  # type: ignore[no-any-return]
    if isinstance(value, str):
        value = {"kind": value}
    if isinstance(value, list) and "compose" in table:
        value = {"kind": "compose", "parts": value}
    if not isinstance(value, Mapping) or "kind" not in value:
        raise ValueError(f"{noun}: needs a table with kind = one of {sorted(table)}")
    if not isinstance(value["kind"], str) or value["kind"] not in table:
        raise ValueError(f"{noun}: unknown kind {value['kind']!r}; known kinds are {sorted(table)}")
    chosen = table[value["kind"]]
    settings = {key: item for key, item in value.items() if key != "kind"}
    known = [field.name for field in dataclasses.fields(chosen) if field.init]  # type: ignore[arg-type]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{value['kind']}: unknown keys {unknown}; known keys are {known}")
    try:
        return _adapter(chosen).validate_python(settings)  # type: ignore[no-any-return]
    except ValidationError as faults:
        raise ValueError("; ".join(f"{value['kind']}.{_key(f['loc'])}: {f['msg']} (got {f['input']!r})" for f in faults.errors())) from None


def describe(plugin: Any) -> dict[str, Any]:
    """The table that `build` turns back into ``plugin``: its kind and its settings, JSON-ready."""
    return {"kind": type(plugin).kind, **_adapter(type(plugin)).dump_python(plugin, mode="json")}


def plugin(table: Mapping[str, type[Any]], noun: str) -> Any:
    """A pydantic field type that `build` fills from ``table``."""
    return Annotated[Any, BeforeValidator(lambda value: build(table, value, noun))]


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    """Compiling a dataclass's schema costs milliseconds, and plans are described and built in every round."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def override(table: dict[str, Any], key: str, text: str) -> None:
    """Set ``a.b`` in ``table``. Raises `ConfigError` when ``a`` is no table."""
    *parents, last = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {key}={text}: {parent} is not a table of the file; name a key such as base.model")
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except NOT_TOML:
        table[last] = text


def _key(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location)


def _lines(faults: ValidationError, model: type[BaseModel], where: str) -> list[str]:
    return [f"{where}: {_line(dict(fault), model)}" for fault in faults.errors(include_url=False)]


def _line(fault: dict[str, Any], model: type[BaseModel]) -> str:
    key = _key(fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{key}: unknown key; known keys are {_known(model, fault['loc'][:-1])}"
    if fault["type"] == "missing":
        return f"{key}: is required; known keys are {_known(model, fault['loc'][:-1])}"
    seen = f" (got {fault['input']!r})" if not isinstance(fault["input"], dict) else ""
    return f"{key}{': ' if key else ''}{fault['msg'].removeprefix('Value error, ')}{seen}"


def _known(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the model at ``path``; a dict of tables passes its key by."""
    current: Any = model
    for part in path:
        fields = getattr(current, "model_fields", {})
        if part in fields:
            current = _inner(fields[part].annotation)
    return sorted(getattr(current, "model_fields", {}))


def _inner(annotation: Any) -> Any:
    """The first pydantic model inside an annotation such as ``dict[str, Model]`` or ``Model | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_inner(argument) for argument in getattr(annotation, "__args__", ()))
    return next((found for found in inner if found is not None), None)
