"""Plans: who is asked for what in a round. Pure functions of the journal and the setup, so a restart plans the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor

from fedpeft.errors import UpdateError
from fedpeft.privacy.mechanism import Mechanism
from fedpeft.privacy.packing import Schema
from fedpeft.schemes import Phase, check_start
from fedpeft.tensors import Layout, Tensors
from fedpeft.training.outline import derive
from fedpeft.update import Grid, train_counters
from fedpeft.wire.codecs import Codec, DeltaCodec, Ring, as_delta, as_ring, choose
from fedpeft_coordinator import sharing
from fedpeft_coordinator.setup import Limits, Setup, TaskSetup
from fedpeft_coordinator.state import Round, Site, TaskRound

Load = Callable[[TaskSetup, str], Tensors]
"""The tensors of a task by digest; an empty digest means the round-0 tensors."""


@dataclass(frozen=True)
class Known:
    """What a plan is made from: the rounds so far, the sites, and the store (``shelf`` where tasks share factors).

    ``left_out`` are sites by task that kept an earlier attempt of the round from coming out: they are asked only where too few others are.
    """

    history: Sequence[Round]
    sites: Iterable[Site]
    load: Load
    shelf: sharing.Shelf | None = None
    left_out: Mapping[str, frozenset[str]] = field(default_factory=dict)


def holders(task: str, sites: Iterable[Site]) -> list[Site]:
    """Sites that may be asked to train ``task``, by name."""
    return sorted((site for site in sites if site.usable and site.trains(task)), key=lambda site: site.name)


def cohort(names: Sequence[str], limits: Limits, seed: int) -> tuple[str, ...]:
    """The part of ``names`` that is asked: all, or ``fraction`` of them (never fewer than ``min_sites``), by ``seed``; the root always."""
    wanted = max(limits.min_sites, ceil(limits.fraction * len(names)))
    ranked = sorted(names, key=lambda name: (name != limits.root, hashlib.sha256(f"{seed}\0{name}".encode()).digest()))
    return tuple(sorted(ranked[:wanted]))


def plan_round(setup: Setup, number: int, attempt: int, known: Known) -> Round:
    """Round ``number``: per task the phase, the cohort, the seed and the adapter to start from.

    A task's phases count the rounds in which it moved, not the federation's: a round that it misses must not be one of B's. Tasks that
    share factors count together.
    """
    known = replace(known, history=[row for row in known.history if row.number < number], sites=list(known.sites))
    tasks = {name: _check(setup, task, _plan(setup, task, number, known), known.load) for name, task in setup.tasks.items()}
    return Round(number, attempt, "planned", tasks)


def _plan(setup: Setup, task: TaskSetup, number: int, known: Known) -> TaskRound:
    begin, own = _begin(setup, task, known)
    phase, seed = setup.scheme.phase(own, task.layout), derive(setup.seed, number, task.name)
    able = _able(setup, task.name, known)
    names = cohort(list(able), setup.limits, seed)
    early = begin.aligned and sharing.waits(setup.sharing, phase)
    if early or len(names) < setup.limits.min_sites:  # nothing trains, so nothing is taken over
        begin = sharing.plainly(setup.tasks, task.name, known.history, known.load)
    past = sharing.latest(task.name, known.history)
    plan = TaskRound(
        task=task.name,
        phase=phase.name,
        roles=tuple(sorted(phase.roles & task.layout.roles)),
        cohort=names,
        seed=seed,
        weight_cap=_cap(setup, [able[name] for name in names]),
        before=begin.before,
        state=begin.state,
        group=begin.group if setup.sharing else "",
        number=own,
        private=tuple(sorted(phase.private & task.layout.roles)),
        settles=tuple(sorted(phase.settles & task.layout.roles)),
        means=dict(past.means) if past else {},
    )
    return skipped(plan, "it was away while its group's factor moved, and comes back in the next round of its own") if early else plan


def _able(setup: Setup, task: str, known: Known) -> dict[str, int]:
    """Examples by site that may be asked for ``task``, without those left out where enough others are."""
    able = {site.name: site.train[task] for site in holders(task, known.sites)}
    others = {name: count for name, count in able.items() if name not in known.left_out.get(task, ())}
    return others if len(others) >= setup.limits.min_sites else able


def _cap(setup: Setup, examples: Sequence[int]) -> int:
    """Examples that weigh 1: as many as the largest site has, or what the file says where nobody is to know how many that are."""
    return setup.limits.max_examples if setup.task_blind else min(setup.limits.max_examples, max(examples, default=1))


def _begin(setup: Setup, task: TaskSetup, known: Known) -> tuple[sharing.Begin, int]:
    """Where ``task`` starts, and the number of its round."""
    if setup.sharing is None or known.shelf is None:
        begin = sharing.plainly(setup.tasks, task.name, known.history, known.load)
        return begin, sharing.next_number([task.name], known.history)
    begin = sharing.begin(setup.sharing, setup.tasks, task.name, known.history, known.shelf)
    return begin, sharing.next_number([task.name, *sharing.members(begin.group, setup.tasks, known.history)], known.history)


def _check(setup: Setup, task: TaskSetup, plan: TaskRound, load: Load) -> TaskRound:
    """``plan``, or ``plan`` skipped when it cannot be carried out."""
    if plan.outcome == "skipped":
        return plan
    if len(plan.cohort) < setup.limits.min_sites:
        return skipped(plan, f"{len(plan.cohort)} site(s) hold it, cohort.min_sites = {setup.limits.min_sites}")
    if not plan.roles:
        return skipped(plan, f"phase {plan.phase!r} moves nothing of this method")
    try:
        check_start(load(task, plan.before), phase_of(plan))
    except UpdateError as fault:
        return skipped(plan, str(fault))
    return plan


def phase_of(plan: TaskRound) -> Phase:
    """The scheme's phase that ``plan`` is for."""
    return Phase(plan.phase, frozenset(plan.roles), frozenset(plan.private), frozenset(plan.settles))


def mechanism_of(plan: TaskRound) -> Mechanism:
    """How the sum of ``plan`` is noised. Raises `PrivacyError` where it is not."""
    return Mechanism.from_json(plan.privacy or {})


def sampled(plan: TaskRound) -> bool:
    """Whether who takes part is a secret of the coordinator's dice."""
    return bool(plan.privacy) and mechanism_of(plan).rate < 1


def expected(plan: TaskRound) -> int:
    """The sites that may be said to take part: those asked, or under sampling as many as are to be expected, whoever was drawn."""
    if not sampled(plan):
        return len(plan.cohort)
    mechanism = mechanism_of(plan)
    return max(1, floor(mechanism.rate * mechanism.sites))


def grid_of(plan: TaskRound, limits: Limits) -> Grid:
    """The fixed-point grid of the round: wide enough for the whole cohort, and for noise where there is some."""
    if plan.privacy:
        return mechanism_of(plan).grid
    return Grid(max(len(plan.cohort), 1), limits.reach)


def codec_of(size: int, sites: int, limits: Limits) -> DeltaCodec | None:
    """How a site writes ``size`` values in scales of its own: the federation's codec, or what its byte budget picks; None sends codes.

    Raises:
        ConfigError: no codec fits the budget.
    """
    return as_delta(choose(limits.budget, size, masked=False, sites=sites) if limits.budget else limits.codec)


def ring_of(setup: Setup, narrow: int, size: int, sites: int) -> Ring | None:
    """The ring of ``narrow`` of the ``size`` values that a site sends; None where all keep 32 bits. Raises as `fitting_ring` does."""
    limits = setup.limits
    if setup.secure is None:
        found: Codec | None = limits.codec
    else:
        found = fitting_ring(limits.budget, narrow, size, sites) if limits.budget else as_ring(limits.codec)
    return found if isinstance(found, Ring) and narrow else None


def fitting_ring(budget: int, narrow: int, size: int, sites: int) -> Codec:
    """The ring that keeps most of ``narrow`` of ``size`` values within ``budget`` bytes, counting the rest, weight and counters.

    Raises:
        ConfigError: none fits.
    """
    beside = size - narrow + Schema(Layout(()), Grid(sites), train_counters(True)).size
    return choose(budget, narrow, masked=True, sites=sites, beside=4 * beside)


def skipped(plan: TaskRound, reason: str) -> TaskRound:
    """``plan`` not carried out: the adapter stays as it is, bit for bit."""
    return replace(plan, outcome="skipped", reason=reason)


def counted(task: str, site: str, history: Sequence[Round]) -> int:
    """The task's own number of the last round that moved it with a contribution of ``site``; 0 when there is none."""
    rows = (past.tasks[task] for past in reversed(history) if task in past.tasks)
    return next((row.number for row in rows if row.after and site in row.cohort and site not in row.drops), 0)


def changed_since(task: str, have: str, history: Sequence[Round], current: str) -> frozenset[str] | None:
    """Roles that moved since the task's adapter was ``have``; None when ``have`` is no adapter of this federation's past."""
    if have == current:
        return frozenset()
    roles: frozenset[str] = frozenset()
    wanted = current
    for past in reversed(history):
        row = past.tasks.get(task)
        if row is None or not row.after:
            continue
        if wanted not in (row.after, row.alone):  # the task took over its group's factor in between
            return None
        roles |= row.moves
        if have in (row.before, row.alone):
            return roles
        wanted = row.before
    return None
