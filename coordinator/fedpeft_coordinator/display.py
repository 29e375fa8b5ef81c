"""Progress for people: a live bar on a terminal, plain lines elsewhere; both made of events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Event = dict[str, Any]
AGAIN = {
    "NODE_UNAVAILABLE": "its machine was not reached",
    "CLIENT_APP_CRASHED": "its worker died",
    "MESSAGE_UNAVAILABLE": "the message was lost",
    "REPLY_MESSAGE_UNAVAILABLE": "its answer was lost",
}
"""Flower's faults after which a site is asked again, in words."""


@contextmanager
def shown(rounds: int, console: Console) -> Iterator[Callable[[Event], None]]:
    """A listener for events, for as long as the block runs."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("round {task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        row = bar.add_task("waiting for sites", total=rounds)

        def listen(event: Event) -> None:
            text = said(event)
            if text:
                bar.console.print(text, highlight=False, soft_wrap=True)
            if event["event"] == "plan":
                bar.update(row, description=f"round {event['round']}: {'; '.join(_phases(event))}")
            if event["event"] == "round":
                bar.update(row, completed=event["round"])

        yield listen


def said(event: Event) -> str | None:
    """One event for people; None where they need not know. An event that was cut on its way is only named."""
    line = LINES.get(event["event"])
    return f"[dim]{event['event']}[/dim]" if line and "cut" in event else line(event) if line else None


def _phases(event: Event) -> list[str]:
    return [f"{task} {found['phase']} at {len(found['cohort'])}" for task, found in event["tasks"].items() if found["outcome"] != "skipped"]


def _site(event: Event) -> str:
    if event["refused"]:
        return f"[yellow]site {escape(event['site'])} cannot take part: {escape(event['refused'])}[/yellow]"
    held = ", ".join(f"{task} ({count})" for task, count in sorted(event["tasks"].items())) or "none of the tasks"
    return f"site {escape(event['site'])} is here ({escape(event['device'] or 'device unknown')}): {escape(held)}"


def _round(event: Event) -> str:
    parts = [f"{task} {_task(found)}" for task, found in sorted(event["tasks"].items())]
    return escape(f"round {event['round']}/{event['rounds']}: {'; '.join(parts)}")


def _task(found: Event) -> str:
    if found["outcome"] == "skipped":
        return f"untouched ({found['reason']})"
    loss = "" if found["loss"] is None else f" loss {found['loss']:.4f}"
    return f"{found['phase']}{loss} from {len(found['cohort']) - len(found['drops'])} of {len(found['cohort'])} site(s)"


def _answer(event: Event) -> str | None:
    faults = {task: why for task, why in event["outcomes"].items() if why != "ok"}
    if not faults:
        return None
    return "\n".join(
        f"[yellow]round {event['round']}: {escape(event['site'])} dropped out of {escape(task)}: {escape(why)}[/yellow]"
        for task, why in faults.items()
    )


def _scores(event: Event) -> str:
    parts = [f"{task} {_values(found)}" for task, found in event["tasks"].items() if found]
    return escape(
        f"round {event['round']} scores: {'; '.join(parts) or 'none: no site holds test rows, or [privacy] pays for no evaluation'}"
    )


def _values(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in sorted(found.items()))


def _drift(event: Event) -> str | None:
    return "\n".join(f"[yellow]{escape(text)}[/yellow]" for text in event["warnings"]) or None


def _masking(event: Event) -> str:
    if event["on"]:
        return "sums are masked: the coordinator sees no site's part"
    why = "secure_aggregation.enabled = false" if event["enabled"] is False else f"cohort.min_sites = {event['sites']} is below 3"
    return f"[yellow]sites send their parts in the clear: {why}[/yellow]"


def _unscored(event: Event) -> str:
    return "\n".join(
        f"[yellow]round {event['round']}: {escape(name)} is not scored: {escape(why)}[/yellow]" for name, why in event["tasks"].items()
    )


def _clock(moment: float) -> str:
    return time.strftime("%H:%M", time.localtime(moment))


LINES: dict[str, Callable[[Event], str | None]] = {
    "site": _site,
    "round": _round,
    "answer": _answer,
    "scores": _scores,
    "drift": _drift,
    "masking": _masking,
    "unscored": _unscored,
    "published": lambda event: escape(f"published {event['task']} as {event['version'][:19]} (round {event['round']})"),
    "link": lambda event: None if "pid" in event else f"[dim]link: {escape(event['reason'])}[/dim]",
    "left": lambda event: f"[dim]site {escape(event['site'])} left[/dim]",
    "let_in": lambda event: f"site {escape(event['site'])} may join now: its key is there",
    "shut_out": lambda event: f"[yellow]site {escape(event['site'])} is shut out: its key is gone, or is another now[/yellow]",
    "admission": lambda event: f"[yellow]sites' keys stay as they were: {escape(event['reason'])}[/yellow]",
    "resting": lambda event: f"[yellow]site {escape(event['site'])} rests until {_clock(event['time'] + event['seconds'])}[/yellow]",
    "again": lambda event: (
        f"[dim]site {escape(event['site'])} is asked again: {escape(AGAIN.get(event['reason']) or event['reason'])}[/dim]"
    ),
    "stranger": lambda event: f"[yellow]node {event['node']} is turned away: {escape(event['reason'])}[/yellow]",
}
