"""What of a task's delta leaves: codes of the grid, or the bytes of the plan's codec; what either loses is kept for the next round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedpeft.privacy.mechanism import protect
from fedpeft.privacy.noise import SecureNoise
from fedpeft.privacy.packing import Schema
from fedpeft.schemes import Gathers
from fedpeft.tensors import Tensors
from fedpeft.update import Counters, Grid, Update, train_counters
from fedpeft.wire import masking
from fedpeft.wire.codecs import receive, seed_of, send
from fedpeft.wire.vector import Vector
from fedpeft_client.personal import Own
from fedpeft_client.plan import Work
from fedpeft_client.secure import NOTHING

if TYPE_CHECKING:
    from fedpeft.privacy.secagg import Instance


@dataclass(frozen=True)
class Sent:
    """``update`` is what the coordinator will read; ``message`` is the codec's, None where the update's codes travel."""

    update: Update
    message: bytes | None = None


def contribution(work: Work, delta: Tensors, weighted: tuple[float, Counters], own: Own, site: str) -> tuple[Sent, Own]:
    """What leaves of ``delta`` with its weight and counters, and what the site keeps for itself.

    The residual is kept of roles whose next delta lives in the same coordinates, not of probes or controls beside them. Where there are
    none, values are rounded by the plan's seed, which is unbiased and gives the same bytes when the plan is sent again.

    Under a mechanism the delta is clipped and weighs as much as any other site's, and counters are in one vector with it.

    Raises:
        UpdateError: the delta is not finite or leaves the round's grid.
        PrivacyError: it is not finite, or the mechanism names counters that are not here.
    """
    if work.mechanism is not None:
        return Sent(protect(delta, weighted[1], work.mechanism, SecureNoise())), own
    if work.codec is None and work.lanes is None:
        return Sent(Update.encode(delta, *weighted, work.grid)), own
    kept = kept_roles(work)
    residual = own.residual(delta.layout) if kept else None
    seed = None if kept else seed_of(work.plan.seed, work.plan.task, site)
    sent, lost = _written(work, delta, residual, weighted, seed)
    return sent, own.with_residual(lost.pick(kept))


def _written(
    work: Work, delta: Tensors, residual: Tensors | None, weighted: tuple[float, Counters], seed: int | None
) -> tuple[Sent, Tensors]:
    if work.codec is not None:
        message, lost = send(work.codec, delta, residual, seed)
        return Sent(Update.encode(receive(work.codec, message, delta), *weighted, work.grid), message), lost
    assert work.lanes is not None
    whole = Update.encode(delta if residual is None else delta + residual, *weighted, work.grid)
    update, lost = work.lanes.send(whole, seed)
    return Sent(update), lost


def kept_roles(work: Work) -> frozenset[str]:
    """The roles whose change travels as it is and that the coordinator moves by its mean alone; none where a scheme makes more of it."""
    own = work.spec.layout.subset(work.phase.roles)
    plain = work.up.subset(own.roles) == own and not work.phase.settles and not isinstance(work.scheme, Gathers)
    return own.roles if plain else frozenset()


def vector_of(work: Work, instance: Instance) -> Vector:
    """What the masked vector of ``work`` holds, and in how many bits; under a mechanism counters are among its values."""
    if work.mechanism is not None:
        return Vector(Schema(work.sent, work.grid, {}), work.lanes)
    if work.scores:
        return Vector(Schema(NOTHING, Grid(len(instance.members)), masking.counters_of(work.plan.masking.counters)))
    return Vector(Schema(work.up, work.grid, train_counters(work.plan.task_blind)), work.lanes)
