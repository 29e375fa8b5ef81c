"""A question to the base, answered in a process of its own: ``python -m fedpeft_coordinator.apart WHAT QUESTION ANSWER``.

It ends with its answer, and what it loaded goes with it. Its faults are ours: it answers what they say, with their exit code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedpeft.errors import BaseError, FedpeftError, kind_of
from fedpeft.processes import FLAG, hold


def answer(what: str, question: dict[str, Any]) -> dict[str, Any]:
    """The answer to ``question``, which is JSON. Raises `FedpeftError`: the fault that the other process met."""
    return dict(json.loads(answer_bytes(what, question)))


def answer_bytes(what: str, question: dict[str, Any]) -> bytes:
    """As `answer`, of any kind."""
    with tempfile.TemporaryDirectory(prefix="fedpeft-") as name:
        asked, answered, log = (Path(name) / part for part in ("question", "answer", "log"))
        asked.write_text(json.dumps(question), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "fedpeft_coordinator.apart", what, str(asked), str(answered)]
        with log.open("wb") as said:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said, env={**os.environ, FLAG: "1"})
            with process:
                try:
                    code = process.wait()
                finally:
                    process.kill()
        if code == 0:
            return answered.read_bytes()
        raise _fault(code, answered, log)


def _fault(code: int, answered: Path, log: Path) -> Exception:
    """What the process that ended with ``code`` met: a fault of ours, its end by the system, or a defect."""
    kind = kind_of(code)
    if kind is not None and answered.exists():
        return kind(answered.read_text(encoding="utf-8"))
    if code < 0:
        return BaseError(f"base: the process that looks at it was ended by signal {-code}; free memory, or look into the system's log")
    return RuntimeError(f"the process that looks at the base ended with code {code}:\n{log.read_text(errors='replace')}")


def main() -> int:
    """Entry of the child."""
    from fedpeft import plugins
    from fedpeft_coordinator.laying import ANSWERS

    hold()
    what, asked, answered = sys.argv[1:]
    try:
        plugins.load()
        Path(answered).write_bytes(ANSWERS[what](json.loads(Path(asked).read_text(encoding="utf-8"))))
    except FedpeftError as fault:
        Path(answered).write_text(str(fault), encoding="utf-8")
        return fault.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
