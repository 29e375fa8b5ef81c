"""Tokens that callers show: a file of who holds which, by SHA-256, so that whoever reads it can show none."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from fedpeft.certificates import LABEL, Holder
from fedpeft.errors import ConfigError
from fedpeft.registry.manifest import sha256

LINE = re.compile(rf"([a-z]+):({LABEL}) ([0-9a-f]{{64}}) (\d{{4}}-\d\d-\d\d)")
BEGINNING = datetime.min.replace(tzinfo=UTC)


@dataclass
class Tokens:
    """The tokens of the file ``path``, read again when it changes; while it cannot be read, nobody holds any."""

    path: Path
    _stamp: tuple[int, int] = (0, 0)
    _holders: dict[str, Holder] = field(default_factory=dict)

    def holder(self, token: str) -> Holder | None:
        """Who holds ``token``; None when nobody does. Raises `ConfigError` when the file cannot be read."""
        stamp = self._stamp_now()
        if stamp != self._stamp:
            self._holders, self._stamp = self._read(), stamp
        return self._holders.get(sha256(token.encode()))

    def _stamp_now(self) -> tuple[int, int]:
        try:
            found = self.path.stat()
        except OSError:
            return 0, -1
        return found.st_mtime_ns, found.st_size

    def check(self) -> None:
        """Raise `ConfigError` when the file cannot be read."""
        self._read()

    def _read(self) -> dict[str, Holder]:
        try:
            lines = [line.strip() for line in self.path.read_text(encoding="ascii").splitlines()]
        except (OSError, UnicodeDecodeError) as fault:
            raise ConfigError(f"control.tokens: {self.path} cannot be read: {fault}; `fedpeft certificates --token` writes it") from None
        rows = [(number, LINE.fullmatch(line)) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
        torn = [number for number, row in rows if row is None]
        if torn:
            raise ConfigError(f"control.tokens: {self.path}: lines {torn} are not ROLE:NAME SHA256 YYYY-MM-DD; see `fedpeft certificates`")
        return {row[3]: Holder(row[1], row[2], BEGINNING, _midnight(row[4])) for _, row in rows if row}


def _midnight(day: str) -> datetime:
    return datetime.fromisoformat(day).replace(tzinfo=UTC)
