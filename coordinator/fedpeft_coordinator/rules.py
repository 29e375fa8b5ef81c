"""Combinations of settings that cannot hold: each is refused when the file is read, naming both settings and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedpeft.privacy.secagg import LEAST
from fedpeft.privacy.settings import Client
from fedpeft.schemes import Gathers
from fedpeft.schemes.robust import Buckets, Rooted
from fedpeft.wire.codecs import Ring, as_ring
from fedpeft_coordinator import private_rules

if TYPE_CHECKING:
    from fedpeft_coordinator.config import FederationConfig
    from fedpeft_coordinator.starting import Start

SPLIT_ANEW = frozenset({"fedex", "fedsb", "fedsvd", "flexlora", "flora", "sketch"})
"""Schemes whose factors jump to where the coordinator splits them."""


def _cohort_rule(federation: FederationConfig) -> None:
    cohort = federation.cohort
    if cohort.wait_for_sites is not None and cohort.wait_for_sites < cohort.min_sites:
        raise ValueError(
            f"cohort.wait_for_sites = {cohort.wait_for_sites} is below cohort.min_sites = {cohort.min_sites}: "
            "the first round could never reach its quorum; raise the former or lower the latter"
        )


def _training_rule(federation: FederationConfig) -> None:
    for name in federation.tasks:
        settings = federation.settings(name)
        if settings.warmup >= settings.steps > 0 and settings.warmup > 0:
            raise ValueError(
                f"training.warmup = {settings.warmup} and training.steps = {settings.steps} (task {name}): the learning rate would never "
                "be reached; make warmup smaller than steps"
            )


def _checkpoint_rule(federation: FederationConfig) -> None:
    kind = type(federation.method).kind
    checkpointed = [name for name in federation.tasks if federation.settings(name).checkpoint_activations]
    if checkpointed and kind.startswith("prefix"):
        raise ValueError(
            f"method.kind = {kind!r} and training.checkpoint_activations = true (tasks {checkpointed}): prefixes live in the attention "
            "cache, which activation checkpointing recomputes without; switch one of them off"
        )


def _gathers_rule(federation: FederationConfig) -> None:
    rule, scheme = federation.combine, federation.scheme.kind
    if rule is not None and isinstance(federation.scheme, Gathers):
        raise ValueError(
            f"combine.kind = {rule.kind!r} and scheme.kind = {scheme!r}: the scheme makes its own of the "
            "sites' parts; set combine = 'sum', or a scheme that works from the mean, such as alternating"
        )


def _least_rule(federation: FederationConfig) -> None:
    rule, least = federation.combine, federation.cohort.min_sites
    if rule is not None and rule.least > least:
        raise ValueError(
            f"combine.kind = {rule.kind!r} needs {rule.least} sites in a round and cohort.min_sites = {least}: smaller rounds would be "
            f"lost; set cohort.min_sites to {rule.least} or more"
        )


def _root_rule(federation: FederationConfig) -> None:
    root, rooted = federation.cohort.root, isinstance(federation.combine, Rooted)
    if rooted and (root is None or federation.cohort.min_sites < 2):
        raise ValueError(
            f"combine.kind = {federation.combine.kind!r} needs cohort.root, the site with clean rows that the others are measured by, and "
            f"cohort.min_sites of at least 2; they are {root!r} and {federation.cohort.min_sites}"
        )
    if root is not None and not rooted:
        raise ValueError(f"cohort.root = {root!r} has no use without combine.kind = 'fltrust'; set both or neither")


def _start_rule(federation: FederationConfig) -> None:
    for start in (federation.start, *(entry.start for entry in federation.tasks.values())):
        _fits_data(start)


def _fits_data(start: Start | None) -> None:
    if start is not None and start.how.needs_samples and start.data is None:
        raise ValueError(
            f"start.kind = {start.how.kind!r} needs start.data, rows that the coordinator may see: a path or a source, such as "
            '{ kind = "eva", data = "proxy.jsonl" }; without such rows take pissa or olora'
        )
    if start is not None and start.data is not None and not start.how.needs_samples:
        raise ValueError(f"start.kind = {start.how.kind!r} and start.data: this start looks at weights alone; leave start.data out")


def _secure_rule(federation: FederationConfig) -> None:
    if not federation.masks:
        return
    secure, off = federation.secure_aggregation, "or let sites send in the clear with secure_aggregation.enabled = false"
    if federation.cohort.min_sites < LEAST:
        raise ValueError(
            f"secure_aggregation.enabled = true and cohort.min_sites = {federation.cohort.min_sites}: below {LEAST} sites a sum shows what "
            f"each one sent; raise cohort.min_sites, {off}"
        )
    if not federation.scheme.sum_only:
        raise ValueError(
            f"scheme.kind = {federation.scheme.kind!r} and secure aggregation (on from cohort.min_sites = {LEAST}): the scheme needs every "
            f"site's part, masks show their sum alone; take a scheme such as alternating, {off}"
        )
    rule = federation.combine
    if rule is not None and not rule.sum_only:
        raise ValueError(
            f"combine.kind = {rule.kind!r} and secure aggregation (on from cohort.min_sites = {LEAST}): the rule compares parts, masks "
            f"show their sum alone; set combine.kind = 'buckets', which compares masked sums of groups, or combine = 'sum', {off}"
        )
    if isinstance(rule, Buckets) and rule.size < (secure.least or LEAST):
        raise ValueError(
            f"combine.size = {rule.size} and secure_aggregation.least = {secure.least or LEAST}: no group's sum would ever be opened; "
            "raise the former or lower the latter"
        )
    if secure.colluding + 2 * secure.dropping >= 1:
        raise ValueError(
            f"secure_aggregation.colluding = {secure.colluding:g} and dropping = {secure.dropping:g} leave no quorum; "
            "colluding + 2 dropping must be below 1"
        )


def _sharing_rule(federation: FederationConfig) -> None:
    sharing = federation.sharing
    if sharing is None:
        return
    if federation.scheme.kind != "alternating" or federation.combine is not None:
        raise ValueError(
            f"sharing.share = {sharing.share!r} with scheme.kind = {federation.scheme.kind!r}: one factor must stand still while the "
            "other moves, and steps of tasks are added up; set scheme.kind = 'alternating' and no combine rule, or leave [sharing] out"
        )
    if len(federation.tasks) < 2:
        raise ValueError("[sharing] needs two tasks or more; with one there is nobody to share with")
    if federation.start is not None and federation.start.how.needs_samples:
        raise ValueError(
            f"[sharing] and start.kind = {federation.start.how.kind!r}: the start would give each task a factor of its own; take "
            "pissa or olora, which look at weights alone, or leave start out"
        )
    if (sharing.report or sharing.split_after) and not (sharing.report and federation.evaluate_every):
        raise ValueError(
            f"sharing.report = {str(sharing.report).lower()}, sharing.split_after = {sharing.split_after} and evaluate_every = "
            f"{federation.evaluate_every}: what sharing gains is seen where rounds are scored; set report = true and evaluate_every >= 1"
        )


def _down_rule(federation: FederationConfig) -> None:
    down, scheme = federation.wire.down.kind, federation.scheme.kind
    if down == "none":
        return
    if federation.wire.down.masked:
        raise ValueError(
            f"wire.down = {down!r}: its scales are for sums over sites; take one such as int8, int4 or onebit for the way down"
        )
    if scheme in SPLIT_ANEW:
        raise ValueError(
            f"wire.down = {down!r} and scheme.kind = {scheme!r}: the scheme splits factors anew, which is no small step that a codec could "
            "write; leave wire.down out, or take a scheme that moves by the mean, such as alternating"
        )
    if federation.sharing is not None:
        raise ValueError(
            f"wire.down = {down!r} and [sharing]: what a codec leaves out differs from task to task, so the factor would be shared no "
            "more; leave one of them out"
        )


def _blind_rule(federation: FederationConfig) -> None:
    if not federation.secure_aggregation.task_blind:
        return
    clusters = any(entry.task.name != name for name, entry in federation.tasks.items())
    if not federation.masks or federation.combine is not None or federation.routing.gates or clusters:
        raise ValueError(
            "secure_aggregation.task_blind = true hides who holds which task in one masked sum over all sites, so it needs "
            f"cohort.min_sites = {LEAST} or more (or enabled = true), combine = 'sum', and no clusters and routing.gates; "
            "change those, or leave task_blind out"
        )
    if isinstance(federation.privacy, Client):
        raise ValueError(
            f"secure_aggregation.task_blind = true and privacy.kind = {federation.privacy.kind!r}: noise over sites divides by all that "
            "answer, so zeros of those who hold nothing would thin the mean; set privacy.kind = 'example', or leave one of them out"
        )
    if "max_examples" not in federation.model_fields_set:
        raise ValueError(
            "secure_aggregation.task_blind = true and no max_examples: how many rows a site has stays with it, so the file must say how "
            "many weigh 1; set max_examples to about what the largest site has of a task"
        )


def _wire_rule(federation: FederationConfig) -> None:
    wire = federation.wire
    if wire.budget is not None and wire.codec.kind != "none":
        raise ValueError(f"wire.codec = {wire.codec.kind!r} and wire.budget = {wire.budget}: the budget picks the codec; set one of them")
    if federation.masks and wire.codec.kind != "none" and as_ring(wire.codec) is None:
        raise ValueError(
            f"wire.codec = {wire.codec.kind!r} and secure aggregation (on from cohort.min_sites = {LEAST}): sites would write in scales of "
            "their own, which have no sum under masks; take ring, int8, int4, int3 or int2, or let sites send in the clear with "
            "secure_aggregation.enabled = false"
        )


def _scales_rule(federation: FederationConfig) -> None:
    """A ring's first scales are of what training can move a value by."""
    wire = federation.wire
    narrow = isinstance(wire.codec, Ring) or (federation.masks and (wire.budget is not None or wire.codec.kind != "none"))
    boundless = [name for name in federation.tasks if narrow and not federation.settings(name).travel("")]
    if boundless:
        raise ValueError(
            f"wire.codec or budget with public scales, and training.optimizer = 'sgd' with clip = 0 (tasks {boundless}): nothing says how "
            "far the first round moves a value, which its scales need; set training.clip, or leave codec and budget out"
        )


RULES = (
    _cohort_rule,
    _training_rule,
    _checkpoint_rule,
    _gathers_rule,
    _least_rule,
    _root_rule,
    _start_rule,
    *private_rules.RULES,
    _secure_rule,
    _sharing_rule,
    _wire_rule,
    _scales_rule,
    _blind_rule,
    _down_rule,
)
