"""``[privacy]`` of a federation's file: the field, and what it cannot be combined with; each clash names both settings and a way out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, WithJsonSchema

from fedpeft import config
from fedpeft.privacy.settings import PRIVACY, Central, Client, Distributed, Example, Off
from fedpeft.schemes import Gathers
from fedpeft.update import TRAIN_COUNTERS
from fedpeft.wire.codecs import as_ring

if TYPE_CHECKING:
    from fedpeft_coordinator.config import FederationConfig

EVALUATED = ("loss", "count", "examples", "correct", "tp", "fp", "fn", "exact", "generated", "rouge")
Counted = dict[str, int]


def _schemas() -> dict[str, Any]:
    """One object for each kind, as editors take it."""
    found = []
    for kind, settings in PRIVACY.items():
        schema = TypeAdapter(settings).json_schema()
        properties = {"kind": {"const": kind}, **schema.get("properties", {})}
        required = ["kind", *schema.get("required", [])]
        found.append({**schema, "properties": properties, "required": required, "additionalProperties": False})
    return {"oneOf": [{"const": "none"}, *found]}


Privacy = Annotated[
    Any,
    BeforeValidator(lambda value: config.build(PRIVACY, value, "privacy")),
    WithJsonSchema(_schemas()),
    Field(validate_default=True),
]


def settings_of(federation: FederationConfig) -> Client | Example | None:
    """What rounds take; None where nothing is protected. Who may collude under masks may tell its noise as well."""
    privacy = federation.privacy
    if isinstance(privacy, Off):
        return None
    if isinstance(privacy, Distributed):
        from dataclasses import replace

        return replace(privacy, colluding=max(privacy.colluding, federation.secure_aggregation.colluding))
    return privacy  # type: ignore[no-any-return]


def lengths(labels: int, width: int, task: str, bins: int) -> Counted:
    """Counters that an evaluation of a task with ``labels`` on a base of ``width`` may give, by name with their lengths."""
    each = {name: labels if name in ("tp", "fp", "fn") else 1 for name in EVALUATED}
    scored = {f"{whose}.{name}": length for whose in ("adapter", "base") for name, length in each.items()}
    return {**scored, "embedding.sum": width, "embedding.count": 1, f"cosine.{task}": bins}


def _known(federation: FederationConfig) -> set[str]:
    return {*TRAIN_COUNTERS, *(name for task in federation.tasks for name in lengths(1, 1, task, 1))}


def _sum_rule(federation: FederationConfig) -> None:
    """Noise is calibrated for a sum of vectors of bounded norm."""
    privacy = federation.privacy
    if not isinstance(privacy, Client):
        return
    here, instead = f"privacy.kind = {privacy.kind!r}", "or protect single rows at the sites with privacy.kind = 'example'"
    if federation.combine is not None:
        raise ValueError(
            f"combine.kind = {federation.combine.kind!r} and {here}: noise is calibrated for a sum, the rule releases something else; set "
            f"combine = 'sum', {instead}"
        )
    if isinstance(federation.scheme, Gathers) or not federation.scheme.sum_only:
        raise ValueError(
            f"scheme.kind = {federation.scheme.kind!r} and {here}: the scheme makes its own of every site's part, noise protects the sum "
            f"alone; take alternating or ffa, {instead}"
        )
    codec = federation.wire.codec
    if federation.wire.budget is not None or (codec.kind != "none" and as_ring(codec) is None):
        raise ValueError(
            f"wire.codec = {codec.kind!r}, wire.budget = {federation.wire.budget} and {here}: a codec's own scales follow one site's "
            'values, which no norm bounds; drop both, or take codec = { kind = "ring", bits = 16 }, whose codes add up with the noise'
        )


def _clusters_rule(federation: FederationConfig) -> None:
    clusters = sorted(name for name, entry in federation.tasks.items() if entry.task.name != name)
    if clusters and not isinstance(federation.privacy, Off):
        raise ValueError(
            f"privacy.kind = {federation.privacy.kind!r} and clusters (tasks {clusters[:2]}): which cluster a site takes follows from its "
            "rows and is told without noise; leave clusters out, or privacy off"
        )


def _masks_rule(federation: FederationConfig) -> None:
    privacy, masked = federation.privacy, federation.masks
    if isinstance(privacy, Distributed) and not masked:
        raise ValueError(
            f"privacy.kind = 'distributed' and secure_aggregation.enabled = {federation.secure_aggregation.enabled!r}, cohort.min_sites "
            f"= {federation.cohort.min_sites}: a site's share of the noise hides it under masks only; set cohort.min_sites to 3 or more, "
            "or trust the coordinator with privacy.kind = 'central'"
        )


def _sampling_rule(federation: FederationConfig) -> None:
    privacy = federation.privacy
    if not isinstance(privacy, Central) or privacy.rate == 1:
        return
    here = f"privacy.rate = {privacy.rate:g}"
    if federation.masks:
        raise ValueError(
            f"{here} and secure aggregation (on from cohort.min_sites = 3): the sites of a masked sum know one another, so who was drawn "
            "is no secret and gains nothing; set privacy.rate = 1, or secure_aggregation.enabled = false"
        )
    if federation.cohort.fraction < 1:
        raise ValueError(
            f"{here} and cohort.fraction = {federation.cohort.fraction:g}: a public draw of a fixed size is no Poisson sampling; set "
            "cohort.fraction = 1"
        )


def _counters_rule(federation: FederationConfig) -> None:
    privacy = federation.privacy
    if not isinstance(privacy, Client):
        return
    known = _known(federation)
    unknown = sorted(set(privacy.counters) - known)
    if unknown:
        raise ValueError(f"privacy.counters {unknown} are counters of no task here; known are {sorted(known)}")
    scored = sorted(set(privacy.counters) - set(TRAIN_COUNTERS))
    if privacy.evaluation and not scored:
        raise ValueError(
            f"privacy.evaluation = {privacy.evaluation:g} and privacy.counters = {sorted(privacy.counters)}: an evaluation would release "
            "nothing; name counters with their largest value at one site, such as counters = { 'adapter.correct' = 100, "
            "'adapter.examples' = 100 }, or set evaluation = 0"
        )
    if scored and not privacy.evaluation:
        raise ValueError(
            f"privacy.counters {scored} and privacy.evaluation = 0: these come from evaluations, which are not released; set evaluation (4 "
            "costs a sixteenth of an adapter), or leave the counters out"
        )


def _evaluation_rule(federation: FederationConfig) -> None:
    privacy, every = federation.privacy, federation.evaluate_every
    if isinstance(privacy, Client) and every and not privacy.evaluation:
        raise ValueError(
            f"evaluate_every = {every} and privacy.evaluation = 0: scores of held-out rows are releases too and none is paid for; set "
            "privacy.evaluation (4 costs a sixteenth of an adapter) with privacy.counters, or evaluate_every = 0"
        )
    if isinstance(privacy, Example) and every:
        raise ValueError(
            f"evaluate_every = {every} and privacy.kind = 'example': DP-SGD protects rows that are trained on, nothing protects held-out "
            "ones; set evaluate_every = 0 and score the published adapters where their rows may be seen"
        )


def _gates_rule(federation: FederationConfig) -> None:
    """No gates beside a promise.

    Their mean over sites would be one more Gaussian release with every version, of as many values as the layers have inputs, with a clip
    of its own and a share of the budget that `noise_for` would have to set aside. What is published says as much to the routers arrow and
    spectr, and is paid for.
    """
    privacy = federation.privacy
    if federation.routing.gates and not isinstance(privacy, Off):
        raise ValueError(
            f"routing.gates = true and privacy.kind = {privacy.kind!r}: gates are trained on the sites' rows, one more release with every "
            "version, for which no budget is set aside; set routing.gates = false: the routers arrow and spectr read the published "
            "adapters, which are paid for"
        )


def _sharing_rule(federation: FederationConfig) -> None:
    privacy, sharing = federation.privacy, federation.sharing
    if not isinstance(privacy, Off) and sharing is not None and (sharing.report or sharing.split_after):
        raise ValueError(
            f"sharing.report = {sharing.report}, sharing.split_after = {sharing.split_after} and privacy.kind = {privacy.kind!r}: scoring "
            "every step a second time is a release that nothing pays for; set report = false and split_after = 0"
        )


RULES: Iterable[Any] = (
    _sum_rule,
    _clusters_rule,
    _masks_rule,
    _sampling_rule,
    _counters_rule,
    _evaluation_rule,
    _gates_rule,
    _sharing_rule,
)
