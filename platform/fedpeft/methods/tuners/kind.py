"""From a row of the table to a method: one frozen dataclass type per tuner, whose fields are the row's settings."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.methods import values
from fedpeft.methods.protocol import Method
from fedpeft.methods.tuners.row import Row
from fedpeft.tensors import Entry, Layout

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.bases.spec import HeadSpec
    from fedpeft.methods.protocol import Entries

TARGETS = Annotated[tuple[str, ...], Field(min_length=1)]


@dataclasses.dataclass(frozen=True)
class Tuner:
    """What all tuners share; `tuner` adds a row's settings as fields. It satisfies `Method`."""

    kind: ClassVar[str]
    row: ClassVar[Row]

    @property
    def needs_weights(self) -> bool:
        """Whether peft takes the start or the places of a trained role from the base's weights."""
        return self.row.measures or bool(self.row.spec.trained - set(self.row.start))

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Put peft's layers on ``model`` and return the module to call. Raises `AdapterError` when peft cannot."""
        from fedpeft.methods.tuners.live import put_on
        from fedpeft.methods.tuners.virtual import put_before

        put = put_before if self.row.place in ("tokens", "cache") else put_on
        return put(model, head, self.kind, self.row, self._arguments())

    def entries(self, model: nn.Module) -> Entries:
        """All that peft trains, under the row's roles, and the head."""
        from fedpeft.methods.attached import attached_to, head_entries

        prefix = "base_model." if self.row.place in ("tokens", "cache") else values.PREFIX
        return {name: (self.row.role(name)[0], p) for name, p in attached_to(model).own.items()} | head_entries(model, prefix)

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """As the row says, head fresh."""
        if entry.role == "head":
            return values.head(entry, rng, config)
        start = self.row.start.get(entry.role)
        return start.draw(entry, rng) if start else None

    def lr_scale(self, role: str) -> float:
        """Nothing is folded: peft's own scales stay in its forward."""
        return 1.0

    def peft_config(self, base_model: str, head: HeadSpec, layout: Layout) -> dict[str, Any]:
        """The row's peft type with the modules that ``layout`` names; a type that peft refuses where it would lose tensors."""
        return values.common(base_model, head, layout) | {
            **self._arguments(),
            **({"target_modules": self._modules(layout)} if self.row.place in ("linear", "norms", "embeddings") else {}),
            "peft_type": self.row.peft if self.row.portable else f"FEDPEFT_{self.row.peft}",
            "modules_to_save": values.head_modules(layout),
        }

    def detach(self, model: nn.Module) -> None:
        """Give the model its own modules and values back."""
        from fedpeft.methods.attached import end
        from fedpeft.methods.prompted import Prompted, release

        if isinstance(model, Prompted):
            release(model)
        else:
            end(model)

    def _arguments(self) -> dict[str, Any]:
        plain = {part: getattr(self, name) for name, item in self.row.settings.items() for part in item.name.split(",")}
        named = {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}
        return {**named, **self.row.fixed, **({"target_modules": list(self._targets)} if self._targets else {})}

    @property
    def _targets(self) -> tuple[str, ...]:
        return getattr(self, "targets", ())

    def _modules(self, layout: Layout) -> list[str]:
        own = (entry.name for entry in layout.entries if entry.role != "head")
        return list(dict.fromkeys(self.row.role(name)[1].removeprefix(values.PREFIX) for name in own))


def tuner(kind: str, row: Row) -> type[Method]:
    """The method type of ``row``: a frozen dataclass with the row's settings, and ``targets`` where it takes linear layers."""
    fields = [(name, item.type, dataclasses.field(default=item.default)) for name, item in row.settings.items()]
    if row.place == "linear":
        fields.append(("targets", TARGETS, dataclasses.field(default=row.targets)))
    name = "".join(part.capitalize() for part in kind.split("-"))
    about = {"__module__": __name__, "kind": kind, "row": row, "__doc__": f"{row.spec.summary} ({row.spec.paper})."}
    made = dataclasses.make_dataclass(name, fields, bases=(Tuner,), namespace=about, frozen=True)
    return cast("type[Method]", made)
