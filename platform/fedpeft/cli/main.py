"""Entry point: builds the command tree and turns every fault into one line and a documented exit code."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import click
import typer

from fedpeft import plugins
from fedpeft.errors import FedpeftError, StorageError
from fedpeft.processes import hold, interruptible

DEFECT = 70
INTERRUPTED = 130
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def main() -> None:
    """Run the command line and exit with its code (see `fedpeft.errors`)."""
    hold()
    with interruptible():
        code = run(sys.argv[1:])
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run ``arguments`` and return the exit code; faults go to stderr as one line each."""
    try:
        plugins.load()
        result = command()(args=arguments, prog_name="fedpeft", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        return _interrupted() if code == INTERRUPTED else code  # so typer says that it was
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as fault:
        fault.show()
        return fault.exit_code
    except FedpeftError as fault:
        return _say(str(fault), fault.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _interrupted()
    except BrokenPipeError:
        return _broken_pipe()
    except OSError as fault:
        return _os_fault(fault)
    except Exception as fault:  # noqa: BLE001 - the process edge: a defect is logged whole and said in one line
        return _defect(fault)


@cache
def command() -> click.Command:
    """`tree` as click runs it, built once in a process."""
    return typer.main.get_command(tree())


def tree() -> typer.Typer:
    """The whole command tree: the platform's verbs and what installed rooms add under ``fedpeft.commands``."""
    from fedpeft.cli import adapters, answers, audit, central, combine, compare, inspection, ledger, methods, parity, schemes, setup

    app = typer.Typer(
        name="fedpeft",
        help="Federated multi-task PEFT: small task adapters on data that never moves.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    setup.register(app)
    inspection.register(app)
    answers.register(app)
    parity.register(app)
    compare.register(app)
    app.add_typer(adapters.app, name="adapters")
    app.add_typer(ledger.app, name="ledger")
    app.add_typer(methods.app, name="methods")
    app.add_typer(schemes.app, name="schemes")
    app.add_typer(combine.app, name="combine")
    app.add_typer(audit.app, name="audit")
    app.add_typer(central.app, name="central")
    for entry in sorted(entry_points(group="fedpeft.commands"), key=lambda entry: entry.name):
        try:
            app.add_typer(entry.load(), name=entry.name)
        except ModuleNotFoundError as missing:
            app.command(entry.name, help=f"needs `pip install 'fedpeft[{entry.name}]'` ({missing.name} is missing)")(_absent(entry.name))
    return app


def _absent(extra: str) -> Callable[[], None]:
    def explain() -> None:
        raise FedpeftError(f"{extra}: not installed; run pip install 'fedpeft[{extra}]'")

    return explain


def _say(message: str, code: int) -> int:
    for line in message.splitlines() or [""]:
        print(f"fedpeft: {line}", file=sys.stderr)
    return code


def _interrupted() -> int:
    return _say("interrupted; the same command goes on from the last committed step", INTERRUPTED)


def _broken_pipe() -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _os_fault(fault: OSError) -> int:
    where = f"{fault.filename}: " if fault.filename else ""
    if fault.errno in NO_SPACE:
        return _say(f"{where}no space left; free some and run the same command again, nothing committed is lost", StorageError.exit_code)
    return _say(f"{where}{fault.strerror or fault}; check the path and its permissions", StorageError.exit_code)


def _defect(fault: Exception) -> int:
    import traceback

    handle, path = tempfile.mkstemp(prefix="fedpeft-defect-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as log:
        traceback.print_exception(fault, file=log)
    return _say(
        f"a defect of fedpeft: {type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''} (traceback: {Path(path)})", DEFECT
    )
