"""What a plan asks of the site against what site.toml allows; pure checks, one function per rule, and what they need to know of today."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, time
from fnmatch import fnmatchcase
from typing import Any

from fedpeft.errors import PolicyError
from fedpeft_client import audit
from fedpeft_client.config import SiteConfig


@dataclass(frozen=True)
class Ask:
    """What one task of a plan asks: ``base`` are identity and model name, ``modules`` the tensors that would leave.

    ``encoders`` are models beside the base that would embed rows. ``at`` is when it is asked, ``sent_today`` the bytes that left today.
    ``accounted``: something protects the answer and is charged; ``epsilon`` is what the task has then spent, None before that is known.
    ``cohort`` is the number of sites asked, or under secure aggregation the fewest over which the sum is opened. With
    ``task_blind`` a task that the site may not train is one that it holds nothing of.
    """

    task: str
    base: tuple[str, ...]
    method: str
    rank: int
    upload_bytes: int
    cohort: int
    steps: int
    secure_aggregation: bool = False
    accounted: bool = False
    task_blind: bool = False
    epsilon: float | None = None
    modules: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ()
    at: time | None = None
    sent_today: int = 0
    day_left: int = 0


def today(site: SiteConfig) -> dict[str, Any]:
    """When it is, and what the audit log says left today; the log is read where its bytes are limited alone."""
    now, limited = datetime.now().astimezone(), site.policy.max_upload_mb_per_day is not None
    sent = audit.sent_today(site.state / "audit.jsonl", now.astimezone(UTC).date()) if limited else 0
    clock = now.astimezone(UTC)
    return {"at": now.time(), "sent_today": sent, "day_left": DAY - (clock.hour * 3600 + clock.minute * 60 + clock.second)}


class RestingError(PolicyError):
    """A plan that the site would carry out at another time, ``seconds`` from now."""

    def __init__(self, text: str, seconds: int) -> None:
        super().__init__(text)
        self.seconds = seconds


DAY = 86_400
Rule = Callable[[Ask, SiteConfig], str | None]


def check(ask: Ask, site: SiteConfig) -> tuple[str, ...]:
    """Check every rule; return their names.

    Raises:
        RestingError: no rules but those of a time of the day are broken.
        PolicyError: the plan breaks rules; each is named with what was asked and what is allowed.
    """
    faults = {name: fault for name, rule in RULES.items() if (fault := rule(ask, site)) is not None}
    told = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
    if faults and faults.keys() <= LATER.keys():
        raise RestingError(f"policy of {site.name} lets task {ask.task!r} wait: {told}", max(LATER[name](ask, site) for name in faults))
    if faults:
        raise PolicyError(f"policy of {site.name} refuses task {ask.task!r}: {told}; change the plan, or [policy] in the site's file")
    return tuple(RULES)


def _tasks(ask: Ask, site: SiteConfig) -> str | None:
    allowed = sorted(site.allowed_tasks)
    return None if ask.task in allowed or ask.task_blind else f"asked {ask.task!r}, allowed {allowed}"


def _bases(ask: Ask, site: SiteConfig) -> str | None:
    allowed = site.policy.bases
    return None if not allowed or set(ask.base) & set(allowed) else f"asked {' '.join(ask.base)}, allowed {list(allowed)}"


def _encoders(ask: Ask, site: SiteConfig) -> str | None:
    allowed = site.policy.encoders
    beyond = sorted(set(ask.encoders) - set(allowed))
    return f"asked to embed rows with {beyond}, allowed {list(allowed)} beside the site's own base" if beyond else None


def _methods(ask: Ask, site: SiteConfig) -> str | None:
    allowed = site.policy.methods
    return None if not allowed or ask.method in allowed else f"asked {ask.method!r}, allowed {list(allowed)}"


def _rank(ask: Ask, site: SiteConfig) -> str | None:
    return _at_most(ask.rank, site.policy.max_rank)


def _upload(ask: Ask, site: SiteConfig) -> str | None:
    megabytes = ask.upload_bytes / 1e6
    limit = site.policy.max_upload_mb
    return None if megabytes <= limit else f"asked {megabytes:.3f} MB, allowed at most {limit:g} MB"


def _hours(ask: Ask, site: SiteConfig) -> str | None:
    hours = site.policy.hours
    if hours is None or ask.at is None:
        return None
    first, last = map(time.fromisoformat, hours.split("-"))
    inside = first <= ask.at < last if first < last else ask.at >= first or ask.at < last
    return None if inside else f"asked at {ask.at:%H:%M}, allowed {hours}"


def _until_hours(ask: Ask, site: SiteConfig) -> int:
    assert site.policy.hours is not None
    assert ask.at is not None
    first = time.fromisoformat(site.policy.hours.split("-")[0])
    return ((first.hour - ask.at.hour) * 3600 + (first.minute - ask.at.minute) * 60 - ask.at.second) % DAY


def _daily(ask: Ask, site: SiteConfig) -> str | None:
    limit, total = site.policy.max_upload_mb_per_day, (ask.sent_today + ask.upload_bytes) / 1e6
    return None if limit is None or total <= limit else f"asked, with what left today, {total:.3f} MB, allowed at most {limit:g} MB a day"


def _cohort(ask: Ask, site: SiteConfig) -> str | None:
    least = site.policy.min_cohort
    return None if ask.cohort >= least else f"asked a cohort of {ask.cohort}, allowed at least {least}"


def _secure(ask: Ask, site: SiteConfig) -> str | None:
    required = site.policy.require_secure_aggregation
    return "asked without secure aggregation, allowed only with it" if required and not ask.secure_aggregation else None


def _blind(ask: Ask, site: SiteConfig) -> str | None:
    required = site.policy.require_task_blind
    return "asked without hiding who holds the task, allowed only with it" if required and not ask.task_blind else None


def _epsilon(ask: Ask, site: SiteConfig) -> str | None:
    limit = site.policy.max_epsilon
    if limit is None:
        return None
    if not ask.accounted:
        return f"asked without privacy accounting, allowed at most epsilon {limit:g}"
    if ask.epsilon is None or ask.epsilon <= limit:
        return None
    return (
        f"asked epsilon {ask.epsilon:.4g} at delta {site.policy.delta:g} with all that the task has spent here, allowed at most {limit:g}"
    )


def _modules(ask: Ask, site: SiteConfig) -> str | None:
    allowed = site.policy.modules
    beyond = [name for name in ask.modules if not any(fnmatchcase(name, pattern) for pattern in allowed)]
    return f"asked {len(beyond)} other tensors ({', '.join(beyond[:2])}), allowed {list(allowed)}" if allowed and beyond else None


def _steps(ask: Ask, site: SiteConfig) -> str | None:
    return _at_most(ask.steps, site.policy.max_steps)


def _at_most(asked: int, limit: int) -> str | None:
    return None if asked <= limit else f"asked {asked}, allowed at most {limit}"


RULES: dict[str, Rule] = {
    "tasks": _tasks,
    "bases": _bases,
    "encoders": _encoders,
    "methods": _methods,
    "modules": _modules,
    "max_rank": _rank,
    "max_upload_mb": _upload,
    "max_upload_mb_per_day": _daily,
    "hours": _hours,
    "min_cohort": _cohort,
    "require_secure_aggregation": _secure,
    "require_task_blind": _blind,
    "max_epsilon": _epsilon,
    "max_steps": _steps,
}
LATER: dict[str, Callable[[Ask, SiteConfig], int]] = {"hours": _until_hours, "max_upload_mb_per_day": lambda ask, _site: ask.day_left}
"""Rules that a plan breaks for a while only: seconds until it does not."""
