"""``start`` in federation.toml: where the adapters of round 0 come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from fedpeft import config
from fedpeft.config import Section
from fedpeft.tasks import Source


class Start(Section):
    """One of `fedpeft.adapters.starts`.

    ``data`` are rows that the coordinator may see; where they have a column ``task``, each task gets its own.
    """

    how: Any
    data: Source | None = None

    def rooted(self, folder: Path) -> Start:
        """With relative paths taken from ``folder``."""
        from fedpeft.adapters.starts import Files

        how = self.how.rooted(folder) if isinstance(self.how, Files) else self.how
        if self.data is None or self.data.path is None:
            return self.model_copy(update={"how": how})
        data = self.data.model_copy(update={"path": str(folder / Path(self.data.path).expanduser())})
        return self.model_copy(update={"how": how, "data": data})


def _table(value: Any) -> Any:
    from fedpeft.adapters.starts import STARTS

    table = {"kind": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping) or "how" in table:
        return table
    data = table.get("data")
    how = config.build(STARTS, {key: setting for key, setting in table.items() if key != "data"}, "start")
    return {"how": how, "data": {"path": data} if isinstance(data, str) else data}


StartTable = Annotated[Start | None, BeforeValidator(_table)]
"""A name of a start, or a table with its settings and ``data``."""
