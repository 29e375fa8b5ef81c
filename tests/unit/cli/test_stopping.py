"""How processes answer who asks them to end: services in order, all else as interrupted."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import typer

from fedpeft.cli.main import main
from fedpeft.processes import end_service, interruptible
from fedpeft_client.supervisor import Supervisor


def test_sigterm_within_a_verb_is_an_interrupt_that_takes_down_what_was_begun(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    taken_down = []
    app = typer.Typer()

    @app.command()
    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            taken_down.append(True)

    monkeypatch.setattr(sys.modules[main.__module__], "command", lambda: typer.main.get_command(app))
    monkeypatch.setattr(sys, "argv", ["fedpeft"])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        main()
    assert (left.value.code, taken_down) == (130, [True])
    assert capsys.readouterr().err == "fedpeft: interrupted; the same command goes on from the last committed step\n"
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_service_that_sigterm_ended_is_done_and_one_that_sigint_ended_was_interrupted(tmp_path: Path) -> None:
    end_service(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        end_service(signal.SIGINT)
    for first, second in ((signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)):
        site = Supervisor((), tmp_path / "supervisor.json")
        site.stop(first)
        site.stop(second)
        assert site.run() == first
